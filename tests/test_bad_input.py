"""Bad input through the command line: exit 1, where and what and a hint, no traceback, no folder left or changed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from command_line import ASSETS, BYTES, SMALL, TINY, call, compile_, done, refused
from tiny_models import VOCAB, Bag, TinyModel, program_of

from tcal_compiler import api


@pytest.fixture(autouse=True)
def _open_the_tiny_teacher_once(monkeypatch):
    """What is refused behind the teacher's loading is refused before anything changes it."""
    real = api.open_source

    def once(spec: str, **options: object):
        if spec != TINY:
            return real(spec, **options)
        key = tuple(sorted(options.items()))
        if key not in _OPENED:
            _OPENED[key] = real(spec, **options)
        return _OPENED[key]

    monkeypatch.setattr(api, "open_source", once)


_OPENED: dict[object, object] = {}


# Teachers


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> Path:
    """Files and folders that are no teacher, or not one that can be converted."""
    import transformers

    folder = tmp_path_factory.mktemp("teachers")
    whole = Path(TINY).read_bytes()
    (folder / "truncated.pt2").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt2").write_bytes(b"")
    (folder / "noise.pt2").write_bytes(bytes(range(256)) * 9)
    torch.save(Bag(), folder / "pickle.pt")
    (folder / "old_pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    torch.save(Bag().state_dict(), folder / "weights.pt")
    (folder / "nothing").mkdir()
    models = {
        "not_causal": TinyModel("bidirectional", layers=1),
        "prefix": TinyModel("prefix", layers=1),
        "no_attention": Bag(),
        "half_causal": TinyModel(("is_causal", "bidirectional")),
        "small_vocabulary": TinyModel(layers=1),
    }
    for name, model in models.items():
        torch.export.save(program_of(model.eval()), folder / f"{name}.pt2")
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCAB, **sizes)).save_pretrained(folder / "bert")
    shutil.copytree(ASSETS / "teacher", folder / "cut_weights")
    weights = folder / "cut_weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    return folder


TEACHERS = [
    ("missing.pt2", "TeacherError", "no such file"),
    ("truncated.pt2", "TeacherError", "truncated or damaged"),
    ("empty.pt2", "TeacherError", "empty (0 bytes)"),
    ("noise.pt2", "TeacherError", "unknown format"),
    ("pickle.pt", "TeacherError", "is a pickle"),
    ("old_pickle.pt", "TeacherError", "is a pickle"),
    ("weights.pt", "TeacherError", "weights (a dictionary"),
    ("nothing", "TeacherError", "without config.json"),
    ("bert", "TeacherError", "is not a causal language model"),
    ("cut_weights", "TeacherError", "cannot load the weights"),
    ("not_causal.pt2", "UnsupportedModelError", "not causal"),
    ("prefix.pt2", "UnsupportedModelError", "not provably causal"),
    ("no_attention.pt2", "UnsupportedModelError", "no softmax attention"),
    ("half_causal.pt2", "UnsupportedModelError", "is not causal: changing"),
    ("small_vocabulary.pt2", "DataError", "tokenizer of another model"),
]


@pytest.mark.parametrize("name, kind, words", TEACHERS, ids=[t[0] for t in TEACHERS])
def test_teachers(teachers, tmp_path, name, kind, words, monkeypatch):
    tokenizer = BYTES
    if "causal" in name or name in ("prefix.pt2", "no_attention.pt2"):  # made for a vocabulary of 64
        monkeypatch.setattr("tcal_compiler.runtime.tokenizer.ByteTokenizer.num_tokens", VOCAB)
        monkeypatch.setattr(
            "tcal_compiler.runtime.tokenizer.ByteTokenizer.encode",
            lambda self, t, special=False: [b % 64 for b in t.encode()],
        )
    refused(compile_(teachers / name, *tokenizer, out=tmp_path / "up" / "run"), kind, words)
    assert not (tmp_path / "up").exists()


def test_factories(tmp_path):
    for spec in ("no_such_module_here:make", "math:no_such_name", "math:sqrt", "platform:node", "sys:exit"):
        refused(compile_(spec, out=tmp_path / "run"), "TeacherError", spec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["truncated.pt2", "pickle.pt", "bert", "missing"])
def test_inspect_refuses_the_same(teachers, name):
    refused(call("tcal", "inspect", teachers / name, "--json"), "TeacherError")


def test_inspect_lists_what_cannot_be_converted(teachers):
    found = json.loads(done("tcal", "inspect", teachers / "not_causal.pt2", "--json"))
    assert found["sites"] == [] and "not causal" in found["refused"][0]["reason"]
    found = json.loads(done("tcal", "inspect", teachers / "no_attention.pt2", "--json"))
    assert found["sites"] == found["refused"] == []


def test_tokenizers(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    for given, words in [
        ((), "no tokenizer beside the teacher"),
        (("--tokenizer", tmp_path / "none"), "no such tokenizer"),
        (("--tokenizer", tmp_path), "holds no tokenizer"),
        (("--tokenizer", tmp_path / "broken"), "cannot read the tokenizer"),
        (("--tokenizer", ASSETS / "teacher"), "tokenizer of another model"),
    ]:
        refused(compile_(TINY, *given, out=tmp_path / "run"), "DataError", words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, kind, words",
    [
        (("--policy", "unifrom:25%"), "ConfigError", "did you mean uniform?"),
        (("--calib", "missing.txt"), "DataError", "no such file"),
        (("--calib", "empty.txt"), "DataError", "holds no text"),
        (
            ("--calib", "short.txt", "--calib-length", "64"),
            "DataError",
            "Try: --calib-sequences 3 --calib-length 16, or",
        ),
        (("--calib", "latin.txt"), "DataError", "is not UTF-8"),
        (("--tokenizer", "missing"), "DataError", "no such tokenizer"),
    ],
)
def test_what_needs_no_teacher_is_refused_before_one_is_loaded(tmp_path, monkeypatch, options, kind, words):
    monkeypatch.setattr(api, "open_source", lambda *_, **__: pytest.fail("a teacher is loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a" * 190)
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 50)
    refused(compile_(TINY, *options, out=tmp_path / "run"), kind, words)


# Options, plans and calibration text: one folder that must stay empty for all of them.

OPTIONS = [
    (("--policy", "uniform:9"), "keep 9 of 4"),
    (("--policy", "uniform:250%"), "from 0% to 100%"),
    (("--policy", "keep=7"), "no convertible site has number [7]"),
    (("--policy", "unifrom:2"), "unknown policy"),
    (("--policy", ""), "--policy '': unknown policy"),
    (("--policy", "keep=0,0,2"), "Try: keep=0,2"),
    (("--policy", "uniform:inf%"), "no number"),
    (("--init", "closedform"), "init = 'closedform'"),
    (("--align-steps", "-1"), "align.steps = -1"),
    (("--calib-length", "3"), "calib.length = 3"),
    (("--seed", "99999999999999"), "seed = 99999999999999"),
    (("--align-steps", "99999999999999999999"), "align.steps = 99999999999999999999"),
    (("--device", "quantum"), "unknown device 'quantum'"),
    (("--device", "meta"), "unknown device 'meta'"),
    (("--device", "cuda:77"), "cuda:77 is not here"),
    (("--config", "missing.toml"), "no such file"),
    (("--config", "long" * 100), "cannot be read as TOML"),
    (("--plan", "missing.toml"), "cannot be read as a plan"),
]


@pytest.mark.parametrize("options, words", OPTIONS, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_options(tmp_path, options, words):
    refused(compile_(TINY, *BYTES, *options, out=tmp_path / "run"), "ConfigError", words)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(tmp_path):
    refused(compile_(TINY, *BYTES, "--device", "cuda", out=tmp_path / "run"), "ConfigError", "0 CUDA devices", "cpu")


CONFIGS = [
    ("[calib]\nlenght = 64", "did you mean calib.length?"),
    ("polcy = 'none'", "did you mean policy?"),
    ("zzz = 1", "keys are policy"),
    ("[align]\nsteps = '3'", "align.steps = '3'"),
    ("[align]\nlr_new = nan", "align.lr_new = nan"),
    ("calib = 3", "calib"),
    ("[calib]\ntext = 3", "calib.text = 3"),
    ('init_without = ["gate"]', "init_without.0 = 'gate'"),
    ('init_without = ["ridge"]\ninit = "taylor"', "taylor has no ridge; its parts are decay"),
    ('init_without = ["decay"]\ninit = "naive"', "only closed-form and taylor have parts"),
    ('init_without = ["decay", "decay"]', "names a part twice"),
    ("seed = = 1", "cannot be read as TOML"),
    ("a = " + "[" * 9000, "cannot be read as TOML"),
]


@pytest.mark.parametrize("text, words", CONFIGS, ids=[c[1] for c in CONFIGS])
def test_configuration_files(tmp_path, text, words):
    file = tmp_path / "tcal.toml"
    file.write_text(text)
    result = compile_(TINY, *BYTES, "--config", file, out=tmp_path / "run")
    refused(result, "ConfigError", words, str(file))
    assert not (tmp_path / "run").exists()


TEXTS = [
    ("empty.txt", b"", "holds no text"),
    ("blank.txt", b" \n\n\t", "holds no text"),
    ("short.txt", b"Only a few words.", "has at most about 17 tokens, but 14 sequences of 48"),
    ("latin1.txt", "caf\xe9 ".encode("latin-1") * 900, "is not UTF-8: byte 0xe9"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
    ("keys.jsonl", b'{"txet": "a"}\n', "no string under"),
    ("list.jsonl", b"[1]\n", "line 1"),
    ("deep.jsonl", b"[" * 99_999 + b"\n", "line 1"),
    ("cut.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "zst"),
    ("text.pdf", b"%PDF", "none of the suffixes"),
    ("missing.txt", None, "no such file"),
    ("folder.txt", "folder", "cannot be read"),
]


@pytest.mark.parametrize("name, raw, words", TEXTS, ids=[t[0] for t in TEXTS])
def test_calibration_texts(tmp_path, name, raw, words):
    file = tmp_path / name
    if raw == "folder":
        file.mkdir()
    elif raw is not None:
        file.write_bytes(raw)
    refused(compile_(TINY, *BYTES, "--calib", file, out=tmp_path / "run"), "DataError", name, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_longer_sequences_than_the_context(tmp_path):
    long = ("--calib-length", "5000", "--calib-sequences", "1")
    result = compile_("embedded", *long, out=tmp_path / "run")
    refused(result, "ConfigError", "calib.length", "5000 tokens, but the teacher's context holds")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        (("--calib", "a\udcff.txt"), "is no file name"),
        (("-o", "x" * 300), "of 300 characters"),
        (("--tokenizer", "z" * 5000), "of 5000 characters"),
        (("--calib-length", str(10**12)), "calib.length"),
        (("--calib-sequences", str(10**7)), "calib.sequences"),
    ],
    ids=["surrogate", "long folder", "long tokenizer", "length", "sequences"],
)
def test_names_and_sizes_beyond_any_machine(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    refused(
        call("tcal-compile", TINY, *(() if "-o" in words else ("-o", "run")), *words, "--quiet"),
        "ConfigError",
        expected,
    )
    assert not list(tmp_path.iterdir())


def test_a_core_that_no_onnx_model_can_hold_is_told_before_anything_is_done(tmp_path):
    model = TinyModel(("is_causal", "quadratic bias"), vocab=256)
    torch.export.save(program_of(model, 256), tmp_path / "t.pt2")
    words = (tmp_path / "t.pt2", "--tokenizer", "bytes", "-o", tmp_path / "out", *SMALL)
    message = refused(call("tcal-compile", *words), "UnsupportedModelError", "1 attention cores cannot carry a state")
    assert "blocks.1.attn: a position bias on the scores" in message and "tcal align" in message
    assert not (tmp_path / "out").exists() and call("tcal", "plan", *words).code == 0
