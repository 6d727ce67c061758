"""Small files that stand for, or say that they are, gigabytes: refused by what reads them, without the memory."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fuzz
import numpy as np
import pytest
import zstandard
from fuzz_targets import Target, make_targets, put

from tcal_compiler.config import load_config
from tcal_compiler.errors import DataError, TeacherError
from tcal_compiler.runtime.declared_size import check_folder
from tcal_compiler.runtime.session_state import SessionState
from tcal_compiler.runtime.tokenizer import read_tokenizer

HUGE = 1 << 40
Edit = Callable[[dict[str, bytes]], dict[str, bytes]]
Files = dict[str, bytes]


@dataclass(frozen=True)
class Case:
    """An edit of the first seed of a target. sparse: a file that is made 1 TiB long without taking space for it."""

    target: str
    edit: Edit
    outcome: str
    sparse: str = ""


def json_edit(name: str, **values: object) -> Edit:
    return lambda files: files | {name: json.dumps(json.loads(files[name]) | values).encode()}


def header_edit(name: str, **values: object) -> Edit:
    """Of the first tensor in a safetensors file."""

    def edit(files: Files) -> Files:
        raw = files[name]
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        first = next(k for k in header if k != "__metadata__")
        header[first] |= values
        text = json.dumps(header).encode()
        return {name: len(text).to_bytes(8, "little") + text + raw[end:]}

    return edit


def rezip(files: Files, change: Callable[[str, bytes], bytes] = lambda name, content: content, **options: int) -> Files:
    out, (name,) = io.BytesIO(), files
    with zipfile.ZipFile(io.BytesIO(files[name])) as old, zipfile.ZipFile(out, "w", **options) as new:
        for entry in old.namelist():
            new.writestr(entry, change(entry, old.read(entry)))
    return {name: out.getvalue()}


def bomb(files: Files) -> Files:
    """An entry of 64 MiB of zeros, compressed."""
    return rezip(files, lambda n, c: bytes(1 << 26) if n.endswith("byteorder") else c, compression=zipfile.ZIP_DEFLATED)


def overlapping(files: Files) -> Files:
    """A directory of 200 entries that all say they are one and the same 10 kB of the file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("model/archive_format", b"pt2")
        z.writestr("model/models/model.json", bytes(10_000))
        for i in range(200):
            copy = zipfile.ZipInfo(f"model/data/{i}")
            first = z.infolist()[1]
            copy.file_size = copy.compress_size = first.file_size
            copy.header_offset, copy.CRC = first.header_offset, first.CRC
            z.filelist.append(copy)
            z._didModify = True
    return {"model.pt2": out.getvalue()}


def weight_sizes(files: Files) -> Files:
    """Sizes of 1 TiB in the tables of an exported program."""

    def change(name: str, content: bytes) -> bytes:
        return content.replace(b'{"as_int": 64}', b'{"as_int": 274877906944}') if name.endswith(".json") else content

    edited = rezip(files, change)
    assert edited != rezip(files)
    return edited


def zst(content: Callable[[], zstandard.ZstdCompressionChunker | bytes]) -> Edit:
    return lambda files: {"a.jsonl.zst": content()}  # type: ignore[dict-item]


def zst_bomb() -> bytes:
    """Some 30 kB that become 1 GiB, in a frame that does not say so."""
    frame, zeros, parts = zstandard.ZstdCompressor(level=1).compressobj(), b" " * (1 << 24), []
    for _ in range(64):
        parts.append(frame.compress(zeros))
    return b"".join([*parts, frame.flush()])


def parquet_bomb(files: Files) -> Files:
    """One row of 32 MiB of spaces."""
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [" " * (1 << 25)]}), out, compression="zstd", use_dictionary=False)
    assert len(out.getvalue()) < 1 << 20
    return {"a.parquet": out.getvalue()}


def gguf_edit(key: str, value: int) -> Edit:
    """A 32-bit number in the head of a GGUF file."""

    def edit(files: Files) -> Files:
        raw = files["model.gguf"]
        at = raw.index(key.encode()) + len(key) + 4
        return {"model.gguf": raw[:at] + value.to_bytes(4, "little") + raw[at + 4 :]}

    return edit


def gguf_count(at: int) -> Edit:
    return lambda files: {
        "model.gguf": files["model.gguf"][:at] + HUGE.to_bytes(8, "little") + files["model.gguf"][at + 8 :]
    }


def few_words(files: Files) -> Files:
    """2000 rows that are all the same 4 MiB, which a dictionary holds once."""
    import pyarrow
    from pyarrow import parquet

    words = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), [" " * (1 << 22)])
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": words}), out, compression="zstd")
    assert len(out.getvalue()) < 1 << 20
    return {"a.parquet": out.getvalue()}


DOUBLE = {"type": "Replace", "pattern": {"String": "o"}, "content": "oo"}
FILL = {"type": "Replace", "pattern": {"Regex": "x?"}, "content": "o"}


def forty_times(rule: object) -> Case:
    rules = {"type": "Sequence", "normalizers": [rule] * 40}
    return Case("tokenizer", json_edit("tokenizer.json", normalizer=rules), "DataError")


NESTED: list[object] = [json.loads("[" * 100 + "]" * 100)] * 5000  # 1 MB of JSON, and some fifty times that as objects
NESTED_TEXT = json.dumps(NESTED).encode()
LONG_KEYS = b"".join(b"[k%d%s]\n" % (i, b".a" * 50) for i in range(1000))


def in_program(behind: bytes, put: Callable[[bytes], bytes]) -> Edit:
    """NESTED in a program's tables, as the value behind a text."""

    def change(name: str, content: bytes) -> bytes:
        head, found, tail = content.partition(behind)
        return head + found + put(tail) if found and name.endswith("model.json") else content

    return lambda files: rezip(files, change)


CASES = {
    "lists in lists in a manifest": Case("manifest", json_edit("tcal.json", config={"x": NESTED}), "RunFolderError"),
    "lists in lists in the settings of a tokenizer": Case(
        "tokenizer", json_edit("tokenizer_config.json", x=NESTED), "DataError"
    ),
    "lists in lists in a tokenizer": Case("tokenizer", json_edit("tokenizer.json", x=NESTED), "DataError"),
    "lists in lists in a configuration": Case("checkpoint", json_edit("config.json", x=NESTED), "TeacherError"),
    "lists in lists in a session's": Case("onnx", json_edit("genai_config.json", x=NESTED), "ExportError"),
    "lists in lists in a row": Case("text", lambda files: {"a.jsonl": b'{"text": "a"}\n' + NESTED_TEXT}, "DataError"),
    "lists in lists in a program": Case(
        "pt2", in_program(b"{", lambda tail: b'"x": ' + NESTED_TEXT + b", " + tail), "TeacherError"
    ),
    "lists in lists in a text in a program": Case(
        "pt2", in_program(b'"in_spec": "', lambda tail: NESTED_TEXT + tail[tail.index(b'", "') :]), "TeacherError"
    ),
    "a manifest of many names": Case(
        "manifest", json_edit("tcal.json", **{str(i): i for i in range(100_000)}), "RunFolderError"
    ),
    "many keys of many parts": Case("plan.toml", lambda files: {"plan.toml": LONG_KEYS}, "ConfigError"),
    "a manifest of 1 TiB": Case("manifest", dict, "RunFolderError", sparse="tcal.json"),
    "a plan of 1 TiB": Case("plan.toml", dict, "ConfigError", sparse="plan.toml"),
    "a key of many parts": Case("plan.toml", lambda files: {"plan.toml": b"a." * 30_000 + b"a=1"}, "ConfigError"),
    "a number of many digits": Case("plan.toml", lambda files: {"plan.toml": b"a=" + b"9" * 20_000}, "ConfigError"),
    "a text of 1 TiB": Case("text", lambda files: {"a.txt": b"a"}, "DataError", sparse="a.txt"),
    "a zstd bomb": Case("text", zst(zst_bomb), "DataError"),
    "a zstd frame that says 1 TiB": Case(
        "text", zst(lambda: b"\x28\xb5\x2f\xfd\xe0" + HUGE.to_bytes(8, "little") + b"\x01\0\0"), "DataError"
    ),
    "a parquet bomb": Case("text", parquet_bomb, "DataError"),
    "a parquet dictionary": Case("text", few_words, "DataError"),
    "a tokenizer of 1 TiB": Case("tokenizer", lambda files: files, "DataError", sparse="tokenizer.json"),
    "settings of a tokenizer of 1 TiB": Case(
        "tokenizer", lambda files: files, "DataError", sparse="tokenizer_config.json"
    ),
    "a tokenizer that doubles a text again and again": forty_times(DOUBLE),
    "one that fills every gap": forty_times(FILL),
    "a configuration of 1 TiB": Case("checkpoint", dict, "TeacherError", sparse="config.json"),
    "weights of another shape": Case(
        "safetensors", header_edit("weights.safetensors", shape=[1 << 38]), "RunFolderError"
    ),
    "weights of 1 TiB": Case("safetensors", lambda files: files, "RunFolderError", sparse="weights.safetensors"),
    "a header of 1 TiB": Case(
        "safetensors", lambda files: {n: HUGE.to_bytes(8, "little") + c[8:] for n, c in files.items()}, "RunFolderError"
    ),
    "an ONNX model of 1 TiB": Case("onnx", dict, "ExportError", sparse="model.onnx"),
    "a session's configuration of 1 TiB": Case("onnx", dict, "ExportError", sparse="genai_config.json"),
    "a zip bomb": Case("pt2", bomb, "TeacherError"),
    "one entry many times": Case("pt2", overlapping, "TeacherError"),
    "sizes in an exported program": Case("pt2", weight_sizes, "TeacherError"),
    "a large vocabulary": Case("checkpoint", json_edit("config.json", vocab_size=1 << 24), "TeacherError"),
    "a large width": Case("checkpoint", json_edit("config.json", hidden_size=1 << 20), "TeacherError"),
    "many layers": Case("checkpoint", json_edit("config.json", num_hidden_layers=1 << 31), "TeacherError"),
    "a large packed model": Case(
        "checkpoint",
        json_edit("config.json", vocab_size=1 << 24, quantization_config={"quant_method": "fp8"}),
        "TeacherError",
    ),
    "many GGUF tensors": Case("gguf", gguf_count(8), "TeacherError"),
    "many GGUF keys": Case("gguf", gguf_count(16), "TeacherError"),
    "many GGUF layers": Case("gguf", gguf_edit("llama.block_count", 1 << 30), "TeacherError"),
    "a wide GGUF model": Case("gguf", gguf_edit("llama.feed_forward_length", 1 << 30), "TeacherError"),
}


@pytest.fixture(scope="module")
def targets(shared_run, tmp_path_factory) -> dict[str, Target]:
    return {t.name: t for t in make_targets(shared_run, tmp_path_factory.mktemp("seeds"))}


@pytest.mark.parametrize("kind", sorted({c.target for c in CASES.values()}))
def test_large_declarations_are_refused_without_the_memory(targets, tmp_path, kind):
    """All of a target in one child process, where the fuzzer watches memory and time."""
    target, cases = targets[kind], [c for c in CASES.values() if c.target == kind]
    left, current = iter(cases), list[Case]()

    def make(rng: object) -> Files:
        current[:] = [next(left)]
        return current[0].edit(target.seeds[0])

    def read(folder: Path) -> None:
        for case in current:
            if case.sparse:
                os.truncate(folder / case.sparse, HUGE)
        target.read(folder)

    tally = fuzz.fuzz(Target(kind, 1, make, read, target.seeds), len(cases), seed=0, work=tmp_path)
    assert tally.findings == [] and dict(tally.outcomes) == {cases[0].outcome: len(cases)}


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_would_be_downloaded_is_not(targets, tmp_path, key):
    """transformers takes such a name for a repository of native code, where the package kernels is installed."""
    target = targets["checkpoint"]
    put(tmp_path / "teacher", json_edit("config.json", **{key: "kernels-community/flash-attn2"})(target.seeds[0]))
    target.read(tmp_path / "teacher")


def test_files_that_are_no_part_of_a_model_may_be_anything(targets, tmp_path):
    put(tmp_path / "tokenizer", targets["tokenizer"].seeds[0])
    os.mkfifo(tmp_path / "tokenizer" / "pipe.json")
    (tmp_path / "tokenizer" / "text.txt").touch()
    os.truncate(tmp_path / "tokenizer" / "text.txt", HUGE)
    assert read_tokenizer(tmp_path / "tokenizer").encode("old")


def test_a_link_that_cannot_be_followed(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("long" * 100)
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_written(targets, tmp_path):
    """A chat template whose name is a path outside the folder."""
    templates = [{"name": "default", "template": "x"}, {"name": "../../outside", "template": "y"}]
    put(tmp_path / "bad", json_edit("tokenizer_config.json", chat_template=templates)(targets["tokenizer"].seeds[0]))
    (tmp_path / "a/b").mkdir(parents=True)
    with pytest.raises(DataError, match="cannot be written"):
        read_tokenizer(tmp_path / "bad").save(tmp_path / "a/b")
    assert not list(tmp_path.rglob("outside*"))


def test_a_tokenizer_whose_rules_give_up(targets, tmp_path):
    """Of a pattern that takes time without end, the library says so with what is no Exception."""
    split = {"type": "Split", "pattern": {"Regex": "^(a+)+b"}, "behavior": "Isolated", "invert": False}
    put(tmp_path / "bad", json_edit("tokenizer.json", pre_tokenizer=split)(targets["tokenizer"].seeds[0]))
    with pytest.raises(DataError, match=r"fail on this text.*retry-limit"):
        read_tokenizer(tmp_path / "bad").encode("a" * 40 + "!")


def test_tables_that_a_configuration_makes(targets, tmp_path):
    from transformers import GPTJConfig

    put(tmp_path / "teacher", targets["checkpoint"].seeds[0])
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}
    check_folder(GPTJConfig(**sizes, n_positions=1 << 20), tmp_path / "teacher")
    with pytest.raises(TeacherError, match="tables of 8589934592 values"):
        check_folder(GPTJConfig(**sizes, n_positions=1 << 30), tmp_path / "teacher")


def test_a_configuration_of_1_tib_and_a_device_as_text(tmp_path):
    from tcal_compiler.errors import ConfigError
    from tcal_compiler.runtime.data import read_text

    (tmp_path / "c.toml").touch()
    os.truncate(tmp_path / "c.toml", HUGE)
    with pytest.raises(ConfigError, match=f"{HUGE}|too large|far more"):
        load_config(tmp_path / "c.toml", {})
    (tmp_path / "a.txt").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="no plain file"):
        read_text(tmp_path / "a.txt")


READ_FROM = {  # what is read as a whole, or opened by other libraries
    "plan.toml": ["plan.toml"],
    "tokenizer": ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"],
    "checkpoint": ["generation_config.json", "model.safetensors", "model.safetensors.index.json"],
    "manifest": [".lock"],
}


@pytest.mark.parametrize("kind", READ_FROM)
def test_pipes_and_devices_are_not_waited_for(targets, tmp_path, kind):
    """A pipe that nobody writes to, and a device without end, in place of every file."""
    target, refused = (
        targets[kind],
        {"plan.toml": "ConfigError", "tokenizer": "DataError", "checkpoint": "TeacherError"},
    )
    left, current = iter([(n, odd) for n in READ_FROM[kind] for odd in (True, False)]), []

    def read(folder: Path) -> None:
        for name, pipe in current:
            (folder / name).unlink(missing_ok=True)
            os.mkfifo(folder / name) if pipe else (folder / name).symlink_to("/dev/zero")
        target.read(folder)

    def make(rng: object) -> Files:
        current[:] = [next(left)]
        return target.seeds[0]

    count = 2 * len(READ_FROM[kind])
    tally = fuzz.fuzz(Target(kind, 1, make, read, target.seeds), count, seed=0, work=tmp_path)
    wanted = {refused[kind]: count} if kind in refused else {"accepted": 1, "RunFolderError": 1}
    assert tally.findings == [] and dict(tally.outcomes) == wanted


def test_saved_states_that_say_more_than_they_hold(tmp_path):
    from tcal_compiler.errors import ExportError

    good = SessionState(3, np.ones((1, 3), np.int64), (np.zeros((1, 2, 4), np.float32),), "m")
    good.save(tmp_path / "good.npz")
    assert SessionState.load(tmp_path / "good.npz").length == 3
    np.savez_compressed(tmp_path / "bomb.npz", mask=good.mask, model=np.array("m"), value_0=np.zeros(1 << 22))
    raw = (tmp_path / "good.npz").read_bytes()
    shape = b"(1, 2, 4), }        "
    assert shape in raw
    wide = rezip({"x": raw}, lambda n, c: c.replace(shape, b"(1, 2, 99999999), } "))["x"]
    (tmp_path / "wide.npz").write_bytes(wide)
    for name in ("bomb", "wide"):
        with pytest.raises(ExportError, match="no saved state"):
            SessionState.load(tmp_path / f"{name}.npz")
