"""Run folders that are foreign, damaged, incomplete or on a full disk: exit 1, a hint, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from command_line import ASSETS, BYTES, HELD_OUT, SMALL, TINY, call, compile_, contents, done, refused
from tiny_models import TinyModel, llama, program_of

from tcal_compiler.errors import ExportError
from tcal_compiler.runtime.onnx_export import check_model

# Output folders


@pytest.fixture(scope="module")
def planned_once(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("planned") / "run"
    done("tcal", "plan", TINY, *BYTES, "-o", place, *SMALL)
    return place


@pytest.fixture
def planned(planned_once, tmp_path) -> Path:
    """A run of the tiny teacher that has only its plan."""
    return Path(shutil.copytree(planned_once, tmp_path / "planned"))


def test_output_that_is_something_else(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    before = contents(tmp_path)
    for out, words in [("thesis", "not a run folder and not empty"), ("file", "not a folder"), ("file/run", "")]:
        refused(compile_(TINY, *BYTES, out=tmp_path / out), "RunFolderError", words)
    assert contents(tmp_path) == before
    refused(compile_("missing.pt2", out=tmp_path / "thesis"), "RunFolderError")  # before the teacher is looked for


@pytest.mark.parametrize("layers", [1, 4])
def test_output_of_another_teacher(planned, tmp_path, layers):
    other = tmp_path / "other.pt2"
    torch.export.save(program_of(TinyModel(layers=layers, vocab=256), 256), other)
    before = contents(planned)
    refused(compile_(other, *BYTES, out=planned), "RunFolderError", "belongs to another teacher", "-o")
    assert contents(planned) == before


def test_a_teacher_of_other_sizes_is_refused_before_it_is_loaded(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "llama"
    llama(vocab_size=256).save_pretrained(folder)
    done("tcal", "plan", folder, *BYTES, "-o", run, *SMALL)
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    (other / "model.safetensors").unlink()
    before = contents(run)
    words = (f"{folder} (intermediate_size 48)", f"{other} (intermediate_size 50)")
    refused(compile_(other, *BYTES, out=run), "RunFolderError", "belongs to another teacher", *words, "-o")
    assert contents(run) == before


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda t: t.replace('= "gdn"', '= "gnd"', 1), "mixer is 'gnd'"),
        (lambda t: t[: len(t) // 2] + "[[", "cannot be read as a plan"),
        (lambda t: t.replace("layer = 3", "layer = 9"), "convertible sites are [0, 1, 2, 3]"),
        (lambda t: "", "no [[site]] tables"),
    ],
)
def test_a_broken_edit_of_the_plan(planned, edit, words):
    file = planned / "plan.toml"
    file.write_text(edit(file.read_text()))
    before = contents(planned)
    refused(compile_(TINY, *BYTES, out=planned), "ConfigError", "plan.toml", words)
    assert contents(planned) == before


def test_a_damaged_manifest(planned):
    (planned / "tcal.json").write_text('{"stages": ')
    before = contents(planned)
    for words in (("tcal", "verify", planned), ("tcal-compile", TINY, *BYTES, "-o", planned, *SMALL)):
        refused(call(*words), "RunFolderError", "tcal.json")
    assert contents(planned) == before


def test_a_page_of_a_comparison_is_never_written_over_something_else(planned, tmp_path):
    before = contents(planned)
    others = folder, pipe, loop = [tmp_path / f"{n}.html" for n in ("folder", "pipe", "loop")]
    folder.mkdir()
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for page in (planned / "tcal.json", planned, planned / "report.html", tmp_path / "notes.md", "", folder, pipe):
        refused(call("tcal", "compare", planned, planned, "--html", page), "ConfigError", "Try: --html both.html")
    refused(call("tcal", "compare", planned, planned, "--html", loop), "ConfigError", "symbolic links")
    refused(compile_(TINY, "--calib", loop, out=tmp_path / "run"), "ConfigError", "calib.text", "symbolic links")
    assert contents(planned) == before and sorted(tmp_path.iterdir()) == sorted([planned, *others])
    assert pipe.is_fifo()


def test_a_comparison_names_the_run_whose_manifest_is_damaged(shared_run, finished):
    manifest = json.loads((finished / "tcal.json").read_text())
    manifest["stages"]["align"]["evidence"]["curve"] = "x"
    (finished / "tcal.json").write_text(json.dumps(manifest))
    for words in ((shared_run, finished), (finished, shared_run, "--json")):
        refused(call("tcal", "compare", *words), "RunFolderError", str(finished), "what this program does not write")


def test_a_run_folder_is_no_teacher(planned):
    before = contents(planned)
    refused(call("tcal", "export", planned, "-o", planned), "TeacherError", "is a run folder, not a teacher", "-o ")
    assert contents(planned) == before


def test_a_second_process_on_a_run_folder(planned):
    from tcal_compiler.runtime.run_folder import RunFolder

    before = contents(planned)
    with RunFolder.open_existing(planned, write=True):
        for words in (
            ("tcal-compile", TINY, *BYTES, "-o", planned, *SMALL),
            ("tcal", "report", planned),
            ("tcal", "verify", planned),
            ("tcal", "eval", planned, "--text", HELD_OUT),
        ):
            refused(call(*words), "RunFolderError", f"in use by another process (pid {os.getpid()})")
    assert contents(planned) == before


# Full disks


@pytest.mark.parametrize("stage", ["plan", "calibrate", pytest.param("align", marks=pytest.mark.slow), "export"])
def test_a_disk_that_fills_up_in_a_stage(shared_run, tmp_path, stage, monkeypatch):
    """The stages before it stay complete, and the same command goes on when there is room again."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    place = {
        "plan": "tcal_compiler.conversion.plan_to_toml",
        "calibrate": "tcal_compiler.conversion.save_weights",
        "align": "tcal_compiler.resume.Checkpoint.save",
        "export": "tcal_compiler.runtime.program_file.torch.export.save",
    }[stage]
    config = tmp_path / "tcal.toml"
    calib, steps = "[calib]\nsequences = 6\nlength = 48\n", "[align]\nsteps = 6\ncheckpoint_every = 2\nbatch = 2\n"
    config.write_text(f"local_window = 8\n{calib}{steps}")
    words = ("tcal", stage, TINY, *BYTES, "-o", tmp_path / "up" / "run", "--config", config, "--quiet")

    def fail(*_: object, **__: object) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        refused(call(*words), "StageError", f"stage {stage}", "no space left", "bytes free")
    if stage == "plan":
        assert not (tmp_path / "up").exists()
        return
    run = tmp_path / "up" / "run"
    stages = json.loads((run / "tcal.json").read_text())["stages"]
    order = ["plan", "calibrate", "align", "distill", "export"]
    assert list(stages) == order[: order.index(stage)]
    assert not list(run.glob(".tmp-*"))
    if stage != "export":  # exporting takes long, and goes on in the same way
        assert "is complete" in done(*words)


@pytest.mark.parametrize("size", ["16k", "700k", pytest.param("2m", marks=pytest.mark.slow)])
def test_a_disk_that_is_really_full(tmp_path, size):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        words = ("tcal-compile", TINY, *BYTES, "-o", place / "run", "--align-steps", "2", *SMALL)
        refused(call(*words), "StageError", "no space left")
        if (place / "run").exists():
            manifest = json.loads((place / "run/tcal.json").read_text())
            owned = {f for s in manifest["stages"].values() for f in s["files"]}
            assert manifest["stages"] and set(contents(place / "run")) >= owned | {"tcal.json"}
            assert not list((place / "run").glob(".tmp-*"))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_memory_that_runs_out_is_a_stage_error(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("tcal_compiler.conversion.collect_taps", fail)
    result = compile_(TINY, *BYTES, out=tmp_path / "run")
    refused(result, "StageError", "stage calibrate", "out of memory", "--calib-sequences")


# Commands on run folders


def test_commands_on_a_run_without_the_stages_they_need(planned, tmp_path):
    before = contents(planned)
    refused(call("tcal", "eval", planned, "--text", HELD_OUT), "RunFolderError", "stage calibrate is not complete")
    refused(call("tcal", "verify", planned, "--quiet"), "RunFolderError", "is not complete")
    refused(call("tcal", "generate", planned, "x"), "RunFolderError", "stage export is not complete")
    assert contents(planned) == before
    for words in (("eval", "--text", HELD_OUT), ("verify",), ("generate", "x"), ("report",)):
        name, *rest = words
        refused(call("tcal", name, tmp_path / "none", *rest), "RunFolderError", "no such run folder")
        refused(call("tcal", name, tmp_path, *rest), "RunFolderError", "is not a run folder")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("file", ["onnx/model.onnx", "student.pt2", "onnx/genai_config.json", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_damaged_artifacts(finished, file, damage):
    path = finished / file
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[: len(raw) // 2], "gone": b"", "noise": b"\x07" * len(raw)}[damage])
    if damage == "gone":
        path.unlink()
    verdict = call("tcal", "verify", finished, "--quiet")
    assert verdict.code == 1 and f"FAIL file {file}" in verdict.out and "Traceback" not in verdict.err
    if file != "weights.safetensors":
        refused(call("tcal", "generate", finished, "The"), "RunFolderError", file)
        refused(call("tcal", "eval", finished, "--text", HELD_OUT, "--quiet"), "RunFolderError", file)


def test_a_model_that_is_none_is_told_with_what_to_try(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x\n")
    with pytest.raises(ExportError, match=r"model\.onnx: is no valid ONNX model: .*\n  Try: export again"):
        check_model(path, "ort")


GENERATE = [
    (("",), "DataError", "is empty"),
    (("The", "--temperature", "-1"), "ConfigError", "temperature"),
    (("The", "--temperature", "nan"), "ConfigError", "temperature"),
    (("The", "--top-k", "0"), "ConfigError", "top_k"),
    (("The", "--top-p", "1.5"), "ConfigError", "top_p"),
    (("half \ud800 a character",), "DataError", "is not UTF-8 at character 5"),
    (("word " * 4000,), "DataError", "context"),
]


@pytest.mark.parametrize("words, kind, said", GENERATE, ids=[g[2] for g in GENERATE])
def test_generate(shared_run, words, kind, said):
    refused(call("tcal", "generate", shared_run, *words), kind, said)


def test_eval_texts(finished, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    calibration = ASSETS / "text" / "calibration.txt"
    renamed = tmp_path / "renamed.txt"
    renamed.write_text(calibration.read_text()[5000:400_000])
    before = contents(finished)
    for text, words in [
        (short, "has 10 tokens, but 1 sequences of 48"),
        (calibration, "calibrated on"),
        (renamed, "passages were calibrated on"),
        (tmp_path / "missing.txt", "no such file"),
    ]:
        refused(call("tcal", "eval", finished, "--text", text, "--quiet"), "DataError", text.name, words)
    assert contents(finished) == before
    assert call("tcal", "eval", finished, "--text", HELD_OUT, "--length", "1").code == 2


def test_the_teacher_of_a_run_that_moved_or_changed(finished, tmp_path):
    for command in (("eval", finished, "--text", HELD_OUT), ("verify", finished)):
        refused(call("tcal", *command, "--quiet", "--teacher", tmp_path / "gone.pt2"), "TeacherError", "no such file")
    other = tmp_path / "other.pt2"
    torch.export.save(program_of(TinyModel(vocab=256), 256), other)
    result = call("tcal", "verify", finished, "--quiet", "--teacher", other)
    refused(result, "RunFolderError", "was made from another teacher", "--teacher")
