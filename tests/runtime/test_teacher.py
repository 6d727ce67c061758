"""Every form of teacher, and what is said about files that are none."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim, export, save

from tcal_compiler.errors import DataError, TeacherError
from tcal_compiler.runtime.teacher import (
    check_tokenizer,
    find_tokenizer,
    fingerprint,
    load_teacher,
    load_tokenizer,
)
from tcal_compiler.runtime.tokenizer import ByteTokenizer, HfTokenizer

VOCAB = 64
IDS = torch.zeros(2, 8, dtype=torch.int64)
ANY = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


class Tiny(nn.Module):
    """Embedding and head; `shape` picks what the border looks like."""

    def __init__(self, shape: str = "plain", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(VOCAB, 8, dtype=dtype)
        self.head = nn.Linear(8, VOCAB, dtype=dtype)

    def forward(self, ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> object:
        x = self.embed(ids.long())
        if position_ids is not None:
            x = x + position_ids[..., None].to(x.dtype)
        logits = self.head(x)
        shapes = {"dict": {"logits": logits, "hidden": x}, "tuple": (logits, x), "last": logits[:, -1], "ids": ids}
        return shapes.get(self.shape, logits)


class Evil:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def saved(path: Path, model: nn.Module, args: tuple[torch.Tensor, ...] = (IDS,), dims: object = ANY) -> Path:
    shapes = tuple(dims for _ in args)
    save(export(model.eval(), args, dynamic_shapes=shapes), path.with_suffix(".pt2"))
    if path.suffix != ".pt2":
        path.with_suffix(".pt2").rename(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A transformers folder with two weight shards and a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="8KB")
    vocab = {w: i for i, w in enumerate(["<unk>", "the", "old", "man"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def refused(spec: object, message: str, **options: object) -> TeacherError:
    with pytest.raises(TeacherError, match=message) as e:
        load_teacher(str(spec), **options)
    return e.value


@pytest.mark.parametrize("name", ["t.pt2", "t.pt", "t.bin"])
@pytest.mark.parametrize("shape", ["plain", "dict", "tuple"])
def test_programs_load_whatever_their_name(tmp_path, name, shape):
    teacher = load_teacher(str(saved(tmp_path / name, Tiny(shape))))
    assert teacher.kind == "program" and teacher.module is None and teacher.program is not None
    assert teacher.info["vocab_size"] == VOCAB and teacher.info["context_length"] is None
    assert Path(teacher.source).is_absolute() and teacher.tokenizer_dir is None


def test_a_program_with_positions_and_a_bound(tmp_path):
    dims = {0: Dim("batch"), 1: Dim("length", max=99)}
    teacher = load_teacher(str(saved(tmp_path / "t.pt2", Tiny(), (IDS, IDS), dims)))
    assert teacher.info["context_length"] == 99


@pytest.mark.parametrize(
    "shape, args, dims, message",
    [
        ("plain", (IDS,), None, "batch is fixed at 2 and length is fixed at 8"),
        ("plain", (IDS,), {0: Dim.DYNAMIC}, r"length is fixed at 8 \(ids int64 \[s\d+, 8\]\)"),
        ("plain", (IDS.float(),), ANY, "its inputs are ids float32"),
        ("plain", (IDS.int(),), ANY, "its inputs are ids int32"),
        ("plain", (IDS, IDS.float()), ANY, "expected input_ids"),
        ("last", (IDS,), ANY, r"first output is float32 \[s\d+, 64\]; expected logits"),
        ("ids", (IDS,), ANY, "first output is int64"),
    ],
)
def test_programs_with_another_border(tmp_path, shape, args, dims, message):
    error = refused(saved(tmp_path / "t.pt2", Tiny(shape), args, dims), message)
    assert "Dim.DYNAMIC" in error.hint and "save(program" in error.hint


def test_a_second_input_that_is_no_position(tmp_path):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tiny()

        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.inner(ids) * attention_mask[..., None]

    refused(saved(tmp_path / "t.pt2", Masked(), (IDS, IDS)), "second input must be position_ids")


def test_float64_weights_are_refused_in_a_program_and_converted_in_a_module(tmp_path, monkeypatch):
    refused(saved(tmp_path / "t.pt2", Tiny(dtype=torch.float64)), "weights are float64")
    (tmp_path / "wide_factory.py").write_text("import torch\ndef make(): return torch.nn.Linear(2, 2).double()\n")
    monkeypatch.chdir(tmp_path)
    module = load_teacher("wide_factory:make").module
    assert module is not None and not module.training
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_program_of_half_precision_is_refused(tmp_path, dtype):
    refused(saved(tmp_path / "t.pt2", Tiny(dtype=dtype)), f"weights are {str(dtype)[6:]}, such as")


def test_a_program_cut_at_any_point_is_refused(tmp_path):
    whole = saved(tmp_path / "t.pt2", Tiny()).read_bytes()
    file = tmp_path / "cut.pt2"
    for cut in [0, 1, 2, 3, 4, 29, 30, *range(64, len(whole), 197), len(whole) - 22, len(whole) - 1]:
        file.write_bytes(whole[:cut])
        refused(file, "is empty|truncated or damaged|unknown format")


def test_a_program_with_a_changed_byte_is_refused(tmp_path):
    file = saved(tmp_path / "t.pt2", Tiny())
    whole = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as z:
        info = next(i for i in z.infolist() if i.filename.endswith("weight_0"))
    whole[info.header_offset + 1000] ^= 1
    file.write_bytes(whole)
    refused(file, "is damaged: ")


def test_a_program_of_another_torch_names_this_one(tmp_path):
    file, other = saved(tmp_path / "t.pt2", Tiny()), tmp_path / "other.pt2"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            text = old.read(name)
            new.writestr(name, text.replace(b"aten.linear", b"mine.linear") if name.endswith("model.json") else text)
    refused(other, f"torch {torch.__version__} cannot load".replace("+", r"\+"))


def test_a_program_with_a_pickle_inside_is_not_loaded(tmp_path):
    file, other, trace = saved(tmp_path / "t.pt2", Tiny()), tmp_path / "other.pt2", tmp_path / "trace"
    torch.save((Evil(trace),), tmp_path / "evil.pt")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            evil = "sample_inputs" in name
            new.writestr(name, (tmp_path / "evil.pt").read_bytes() if evil else old.read(name))
    refused(other, "pickled objects")
    assert not trace.exists()


def test_pickles_are_refused_without_running_them(tmp_path):
    trace = tmp_path / "trace"
    torch.save(Tiny(), tmp_path / "m.pt")
    torch.save(Evil(trace), tmp_path / "e.pt")
    (tmp_path / "p.pt").write_bytes(pickle.dumps(Evil(trace)))
    for name in ("m.pt", "e.pt", "p.pt"):
        error = refused(tmp_path / name, "can run any code")
        assert "export(model" in error.hint and "torch.int64" in error.hint
    assert not trace.exists()
    with pytest.warns(UserWarning, match="runs code"):
        teacher = load_teacher(str(tmp_path / "m.pt"), allow_pickle=True)
    assert teacher.kind == "pickle" and isinstance(teacher.module, Tiny)
    with pytest.warns(UserWarning):
        refused(tmp_path / "e.pt", "holds a NoneType", allow_pickle=True)


def test_weights_without_a_model(tmp_path):
    from safetensors.torch import save_file

    torch.save(Tiny().state_dict(), tmp_path / "w.pt")
    for options in ({}, {"allow_pickle": True}):
        refused(tmp_path / "w.pt", "a dictionary of 3 entries", **options)
    save_file(Tiny().state_dict(), tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "weights without a model")


def test_a_pickle_cut_at_any_point_is_refused(tmp_path):
    torch.save(Tiny(), tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    for cut in range(1, len(whole), 331):
        (tmp_path / "c.pt").write_bytes(whole[:cut])
        refused(tmp_path / "c.pt", "truncated|unknown format", allow_pickle=True)


def test_other_files(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "s.pt")
    refused(tmp_path / "s.pt", "TorchScript")
    (tmp_path / "t.txt").write_text("hello")
    refused(tmp_path / "t.txt", "unknown format .starts with b'hello'")
    refused(tmp_path / "none.pt2", "no such file")
    for name in ("", "x" * 300, "~nobody-of-that-name/x"):
        refused(name, "no such file")
    refused(tmp_path, "a folder without config.json; seen: ")
    with zipfile.ZipFile(tmp_path / "z.pt2", "w") as z:
        z.writestr("a/b", "c")
    refused(tmp_path / "z.pt2", "unknown format")


def test_a_transformers_folder(llama):
    teacher = load_teacher(str(llama))
    assert teacher.kind == "transformers" and teacher.module is not None and teacher.tokenizer_dir == llama
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}
    known = {"vocab_size": VOCAB, "context_length": 128, "family": "llama", "bos_token_id": 1, "eos_token_id": 2}
    assert known.items() <= teacher.info.items()
    assert teacher.module.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    tokenizer = load_tokenizer(teacher)
    assert tokenizer.encode("the old man") == [1, 2, 3] and tokenizer.decode([1, 3]) == "the man"
    assert tokenizer.num_tokens == 4 and tokenizer.eos_token_id == 2


def test_the_teacher_that_ships():
    teacher = load_teacher("embedded")
    assert teacher.kind == "transformers" and teacher.source == "embedded"
    tokenizer = load_tokenizer(teacher)
    assert tokenizer.num_tokens == teacher.info["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("The old man went home.")) == "The old man went home."


def test_missing_and_truncated_shards(copy):
    shards = sorted(copy.glob("*.safetensors"))
    assert len(shards) > 1
    whole = shards[0].read_bytes()
    for cut in [0, 1, 7, 8, 20, len(whole) // 3, len(whole) // 2, len(whole) - 1]:
        shards[0].write_bytes(whole[:cut])
        refused(copy, "cannot load the weights")
    shards[0].unlink()
    refused(copy, "cannot load the weights: .*files and bytes")


def test_weights_that_the_files_do_not_hold(copy):
    index = copy / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    shard = data["weight_map"]["lm_head.weight"]
    from safetensors.torch import load_file, save_file

    save_file({k: v for k, v in load_file(copy / shard).items() if k != "lm_head.weight"}, copy / shard)
    del data["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(data))
    refused(copy, r"1 weights of the model are not in its files .missing_keys.: \['lm_head.weight'\]")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "nonsense"}, "config.json: cannot be read"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "cannot be read"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "not a causal language model: model_type 'bert'",
        ),
        ({"model_type": "distilbert"}, "not a causal language model"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a causal language model"),
        ({"hidden_size": 32}, "cannot load the weights|mismatched"),
        ({"num_hidden_layers": 3}, "9 weights of the model are not in its files"),
    ],
)
def test_configs_that_do_not_fit(copy, change, message):
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(copy, message)


def test_damaged_configs(copy):
    file = copy / "config.json"
    whole = file.read_text().rstrip()
    for cut in range(0, len(whole), 100):
        file.write_text(whole[:cut])
        refused(copy, "config.json: cannot be read")


FACTORY = """
import torch
def make(): return torch.nn.Linear(2, 2)
def pair(): return torch.nn.Linear(2, 2), {folder!r}
def fails(): raise RuntimeError("no weights here")
def number(): return 3
class Models:
    make = staticmethod(make)
"""


def test_factories(tmp_path, monkeypatch, llama):
    (tmp_path / "my_factories.py").write_text(FACTORY.format(folder=str(llama)))
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher("my_factories:make")
    assert teacher.kind == "factory" and teacher.source == "my_factories:make" and teacher.info["vocab_size"] is None
    assert load_teacher("my_factories:Models.make").module is not None
    assert load_teacher("my_factories:pair").tokenizer_dir == llama
    refused("my_factories:fails", "RuntimeError: no weights here")
    refused("my_factories:number", "returned int")
    refused("my_factories:none", "AttributeError")
    refused("no_such_module_of_ours:make", "No module named 'no_such_module_of_ours'")


def test_tokenizers_found_given_and_missing(tmp_path, llama):
    file = saved(tmp_path / "t.pt2", Tiny())
    with pytest.raises(DataError, match="no tokenizer beside"):
        load_tokenizer(load_teacher(str(file)))
    assert load_teacher(str(file), tokenizer=str(llama)).tokenizer_dir == llama
    assert find_tokenizer(file, str(llama / "tokenizer.json")) == llama
    for wrong in (tmp_path / "none", tmp_path, file):
        with pytest.raises(DataError):
            load_teacher(str(file), tokenizer=str(wrong))
    with pytest.raises(DataError, match="255, but the teacher's vocabulary has 64 entries"):
        load_tokenizer(load_teacher(str(file), tokenizer="bytes"))
    shutil.copy(llama / "tokenizer.json", tmp_path)
    teacher = load_teacher(str(file))
    assert teacher.tokenizer_dir == tmp_path.resolve() and load_tokenizer(teacher).encode("man") == [3]
    (tmp_path / "tokenizer.json").write_text('{"truncated')
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(teacher)


def test_a_tokenizer_of_another_model(llama):
    with pytest.raises(DataError, match="up to 255, but the teacher's vocabulary has 100 entries"):
        check_tokenizer(ByteTokenizer(), 100)
    check_tokenizer(ByteTokenizer(), 256)
    with pytest.warns(UserWarning, match="256 ids and the teacher's vocabulary 1000"):
        check_tokenizer(ByteTokenizer(), 1000)


def test_bytes_and_saved_tokenizers(tmp_path, llama):
    text = "Zwölf 🦊\n"
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.eos_token_id is None
    found = load_tokenizer(load_teacher(str(llama)))
    assert isinstance(found, HfTokenizer)
    found.save(tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_the_fingerprint_sees_every_part():
    a = {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor(True), "h": torch.ones(3, dtype=torch.bfloat16)}
    first = fingerprint(a, "code")
    assert len(first) == 64 and first == fingerprint(dict(reversed(list(a.items()))), "code")
    assert first == fingerprint(a | {"w": torch.arange(6.0).view(2, 3).t().contiguous().t()}, "code")
    changes = [
        fingerprint(a, "code2"),
        fingerprint(a | {"w": a["w"].view(3, 2)}, "code"),
        fingerprint(a | {"w": a["w"].view(torch.int32)}, "code"),
        fingerprint(a | {"w": a["w"] + torch.tensor([[0, 0, 0], [0, 0, 1e-6]])}, "code"),
        fingerprint({"v" if k == "w" else k: v for k, v in a.items()}, "code"),
        fingerprint({k: v for k, v in a.items() if k != "b"}, "code"),
    ]
    assert len({first, *changes}) == 7
    assert fingerprint({"e": torch.empty(0, 3)}, "") != fingerprint({"e": torch.empty(3, 0)}, "")
