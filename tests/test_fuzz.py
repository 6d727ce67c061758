"""A few mutated files of every kind, the kinds of damage that fuzzing has found, and a fuzzer that sees faults."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest
from fuzz_targets import Target, make_targets, put, read_manifest, run_folder_files, small_tokenizer

from tcal_compiler.errors import DataError, ExportError, RunFolderError, TeacherError
from tcal_compiler.runtime.program_file import load_program
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.teacher import load_teacher
from tcal_compiler.runtime.tokenizer import read_tokenizer

INPUTS = 40


@pytest.fixture(scope="module")
def targets(shared_run, tmp_path_factory) -> dict[str, Target]:
    return {t.name: t for t in make_targets(shared_run, tmp_path_factory.mktemp("seeds"))}


def test_mutated_files_are_read_or_refused(targets, tmp_path):
    assert len(targets) == 10
    for target in targets.values():
        (tmp_path / target.name).mkdir()
        count = max(4, INPUTS * target.share // 1000)
        tally = fuzz.fuzz(target, count, seed=0, work=tmp_path / target.name)
        assert tally.findings == [] and sum(tally.outcomes.values()) == count


def fails(folder: Path) -> None:
    raise KeyError("x")


def beside(folder: Path) -> Path:
    """A folder whose name begins with that of the input's."""
    return folder.with_name(folder.name + "2")


def in_a_sibling(folder: Path) -> None:
    beside(folder).mkdir(exist_ok=True)
    (beside(folder) / "stolen").write_text("x")


def relative_to_an_open_folder(folder: Path) -> None:
    parent = os.open(folder.parent, os.O_RDONLY)
    os.rename(folder / "a", "stolen", dst_dir_fd=parent)


def through_a_link(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent)
    (folder / "link" / "stolen").mkdir(exist_ok=True)


def takes(megabytes: int) -> Callable[[Path], object]:
    return lambda folder: bytearray(b"x") * (megabytes << 20)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "exception": (fails, "KeyError at"),
    "death": (lambda folder: os._exit(7), "process ended with 7"),
    "hang": (lambda folder: time.sleep(60), "more than"),
    "write": (lambda folder: (folder.parents[1] / "stolen").write_text("x"), "open ("),
    "write beside": (in_a_sibling, "open ("),
    "remove": (lambda folder: (folder.parents[1] / "none").unlink(), "os.remove"),
    "rename": (lambda folder: (folder / "a").rename(folder.parent / "stolen"), "os.rename"),
    "rename within a folder": (relative_to_an_open_folder, "os.rename"),
    "link": (lambda folder: os.link(folder / "a", folder.parent / "stolen"), "os.link"),
    "symlink": (lambda folder: (folder.parent / "stolen").symlink_to(folder / "a"), "os.symlink"),
    "folder through a link": (through_a_link, "os.mkdir"),
    "mode": (lambda folder: folder.parent.chmod(0o755), "os.chmod"),
    "network": (lambda folder: socket.create_connection(("127.0.0.1", 9), 0.1), "socket."),
    "process": (lambda folder: os.system("true"), "os.system"),
    "addresses": (lambda folder: bytearray(2 * fuzz.MOST_ADDRESSES), "MemoryError"),
    "memory": (takes(100), "MiB for 3 bytes"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fuzzer_sees(name, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "MOST_SECONDS", 5.0 if name == "memory" else 0.5)  # whose pages take their time
    read, words = FAULTS[name]
    tally = fuzz.fuzz(Target("faulty", 1, lambda rng: {"a": rng.randbytes(3)}, read), 1, seed=0, work=tmp_path)
    assert any(words in f for f in tally.findings), tally.findings


def test_the_fuzzer_allows_what_stays_inside_and_twice_the_file(tmp_path):
    def read(folder: Path) -> None:
        (folder / "link").symlink_to(folder.parent)  # nothing goes through it
        (folder / "a").rename(folder / "b")
        (folder / "link").unlink()
        here = os.open(folder, os.O_RDONLY)
        os.link("b", "c", src_dir_fd=here, dst_dir_fd=here)
        takes(60)(folder)

    large = bytes(40 << 20)
    tally = fuzz.fuzz(Target("good", 1, lambda rng: {"a": large}, read), 1, seed=0, work=tmp_path)
    assert tally.findings == [] and 59 << 20 <= tally.most_memory < 70 << 20
    broken = Target("broken", 1, lambda rng: {}, lambda folder: fails(folder), ({"a": b"x"},))
    with pytest.raises(RuntimeError, match="KeyError"):
        fuzz.fuzz(broken, 1, seed=0, work=tmp_path)


# Found by fuzzing, and mended.


MANIFESTS: dict[str, Callable[[str], str]] = {
    "deep": lambda text: '{"a": ' + "[" * 20_000,
    "no plan": lambda text: json.dumps(json.loads(text) | {"plan": {}}),
    "no configuration": lambda text: json.dumps(json.loads(text) | {"config": {}}),
    "another plan": lambda text: text.replace('"keep":[0]', '"keep":"0"'),
    "endless seconds": lambda text: text.replace('"seconds":', '"seconds":1e999,"old":'),
    "no distances": lambda text: text.replace('"distance"', '"distant"'),
    "no hashes": lambda text: text.replace('"hashes"', '"hash"'),
    "no teacher": lambda text: text.replace('"info"', '"information"'),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_record_something_else(shared_run, tmp_path, name):
    files = run_folder_files(shared_run)
    text = json.dumps(json.loads(files["tcal.json"]), separators=(",", ":"))
    edited = MANIFESTS[name](text)
    assert edited != text
    put(tmp_path / "run", files | {"tcal.json": edited.encode()})
    with pytest.raises(RunFolderError, match="damaged"):
        read_manifest(tmp_path / "run")


def test_a_configuration_of_the_session_that_is_too_deep_and_a_state_that_is_too_large(shared_run, tmp_path):
    shutil.copytree(shared_run / "onnx", tmp_path / "onnx")
    (tmp_path / "onnx/genai_config.json").write_text('{"model": ' + "[" * 20_000)
    with pytest.raises(ExportError, match="RecursionError"):
        OnnxSession(tmp_path / "onnx")
    config = json.loads((shared_run / "onnx/genai_config.json").read_text())
    for length in (-(2**70), 2**63, 0, True):
        config["model"]["context_length"] = length
        (tmp_path / "onnx/genai_config.json").write_text(json.dumps(config))
        with pytest.raises(ExportError, match="no number of tokens"):
            OnnxSession(tmp_path / "onnx")
    session = OnnxSession(shared_run / "onnx")
    for rows in (1 << 40, 1 << 62):
        with pytest.raises(ExportError, match="cannot be held"):
            session.reset(batch=rows)


@pytest.mark.parametrize("name", [b"MatMul", b"logits", b"input_ids", b"tcal_weights"])
def test_names_in_a_model_that_are_no_text(shared_run, tmp_path, capsys, name):
    shutil.copytree(shared_run / "onnx", tmp_path / "onnx")
    file = tmp_path / "onnx/model.onnx"
    file.write_bytes(file.read_bytes().replace(name, b"\xbf" * len(name)))
    with pytest.raises(ExportError, match="utf-8"):
        OnnxSession(tmp_path / "onnx")
    assert capsys.readouterr().out == ""


PARQUET = (  # number 1785 of the target text, seed 2: its statistics once ended the process in native code
    "c-oy(!A`<J5S>=ikbntjw&^A{*#k7j0D=ZgjF%~aV8n<-qVd*110>R7Db`=`2Rw83<X3R??B_UJ5Iq{-VQ2Tv&U>?y?O?aU63k;k"
    "n*!_roP6d0;AZ3s|6w2|jwfc$cp$=&6AB_De@=AYpSYzI-D|mGKv~ZZOAMIB4hn3cung0fX4YUo_ZJ-_^-Cq2CDq;57Oe|KQP|rC"
    "EWry^Ftk~J<W3x>0!!z&jYQ}^hk0n5RG=>uZgSHClcjkTv<zRRnMxUbsp=o9^{QCOe|N?Ua!Aq|=#46z>F;}7;}*3l?U&NWN|Ft5"
    "(@0~tdv$xdYS&mOhZ4sqag8fnAVz2pv57du`Y`5f8}U+Z>WJqt@e>IRx%Ae%o~)z#meh%L?X@yCn(<9L+7#i&+AiPUjmqC=dz}YE"
    "Or79y?uNzwbXs(Rz>ma}8_dSOCyr{Ra;d^iIp!C7Y={2M7s8;B9s"
)


def test_a_parquet_file_with_damaged_statistics(tmp_path):
    (tmp_path / "a.parquet").write_bytes(zlib.decompress(base64.b85decode(PARQUET)))
    code = "import sys; from tcal_compiler.runtime.data import read_text; read_text(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "a.parquet"], capture_output=True, text=True)
    assert "DataError" in result.stderr and result.returncode == 1


def test_a_tokenizer_that_loads_but_cannot_encode(tmp_path):
    small_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    read_tokenizer(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        read_tokenizer(tmp_path)


def test_a_program_that_is_no_archive_and_a_configuration_of_other_types(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"PK\x03\x04")
    with pytest.raises(TeacherError, match="damaged"):
        load_program(tmp_path / "model.pt2", allow_pickle=False)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": [true, 3]}')
    with pytest.raises(TeacherError, match="not a causal language model"):
        load_teacher(str(tmp_path))
