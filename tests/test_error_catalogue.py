"""Every typed error, raised through the command line: it says where, what with the values seen, and what to try."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from command_line import ASSETS, BYTES, SMALL, TINY, call, refused
from tiny_models import TinyModel, program_of

from tcal_compiler import errors
from tcal_compiler.errors import TcalError

Words = tuple[object, ...]
CONVERT = ("tcal", "align", TINY, *BYTES)


def unknown_layer(folder: Path, _: Path) -> Words:
    return (*CONVERT, "--policy", "keep=7", "-o", folder / "out", *SMALL)


def missing_teacher(folder: Path, _: Path) -> Words:
    return "tcal", "inspect", folder / "missing.pt2"


def attention_that_sees_the_future(folder: Path, _: Path) -> Words:
    torch.export.save(program_of(TinyModel("bidirectional", layers=1, vocab=256).eval(), 256), folder / "both_ways.pt2")
    return "tcal", "plan", folder / "both_ways.pt2", *BYTES, "-o", folder / "out", *SMALL


def short_text(folder: Path, _: Path) -> Words:
    (folder / "short.txt").write_text("Only a few words.")
    return (*CONVERT, "--calib", folder / "short.txt", "-o", folder / "out", *SMALL)


def no_run(folder: Path, _: Path) -> Words:
    return "tcal", "report", folder / "none"


def diverging_loss(folder: Path, _: Path) -> Words:
    (folder / "tcal.toml").write_text("[align]\nsteps = 3\nlr_new = 1e30\nwarmup = 0\nscore_every = 1\n")
    return (*CONVERT, "--config", folder / "tcal.toml", "-o", folder / "out", *SMALL)


def changed_weights(folder: Path, run: Path) -> Words:
    shutil.copytree(run, folder / "run")
    raw = bytearray((folder / "run/weights.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "run/weights.safetensors").write_bytes(raw)
    return "tcal", "verify", folder / "run", "--quiet"


def half_a_model(folder: Path, run: Path) -> Words:
    shutil.copytree(run, folder / "run")
    model = folder / "run/onnx/model.onnx"
    whole = sha256(model.read_bytes()).hexdigest()
    model.write_bytes(model.read_bytes()[:1000])
    manifest = folder / "run/tcal.json"  # which says the same, so that the session has to notice
    manifest.write_text(manifest.read_text().replace(whole, sha256(model.read_bytes()).hexdigest()))
    return "tcal", "generate", folder / "run", "The"


CATALOGUE: dict[type[TcalError], tuple[Callable[[Path, Path], Words], str, str]] = {
    # class: how to raise it, where it must say it happened, a value that it must show
    errors.ConfigError: (unknown_layer, "--policy", "[7]"),
    errors.TeacherError: (missing_teacher, "missing.pt2", "no such file"),
    errors.UnsupportedModelError: (attention_that_sees_the_future, "teacher", "blocks.0.attn"),
    errors.DataError: (short_text, "short.txt", "17 tokens"),
    errors.RunFolderError: (no_run, "none", "no such run folder"),
    errors.StageError: (diverging_loss, "align", "step 1"),
    errors.ParityError: (changed_weights, "verify", "2 of 7 checks"),
    errors.ExportError: (half_a_model, "model.onnx", "onnxruntime"),
}


def test_the_catalogue_is_complete():
    def below(kind: type[TcalError]) -> set[type[TcalError]]:
        return {kind, *(k for sub in kind.__subclasses__() for k in below(sub))}

    assert ASSETS.is_dir() and set(CATALOGUE) == below(TcalError) - {TcalError}


@pytest.mark.parametrize("kind", CATALOGUE, ids=lambda k: k.__name__)
def test_error(kind, tmp_path, shared_run):
    make, where, value = CATALOGUE[kind]
    words = make(tmp_path, shared_run)
    plain = call(*words)
    if kind is errors.ParityError:  # the checks stand on stdout
        assert "FAIL" in plain.out
        plain = type(plain)(plain.code, "", plain.err)
    message = refused(plain, kind.__name__, where, value)
    assert re.fullmatch(rf"{kind.__name__}: .+: .+\n  Try: .+\n", message)
    with pytest.raises(kind) as caught:
        call(*words, "--debug")
    error = caught.value
    assert where in error.where and value in f"{error.what}" and len(error.hint) > 5
    assert message.strip() == f"{kind.__name__}: {error}"
