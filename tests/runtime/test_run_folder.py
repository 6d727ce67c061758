"""The run folder: commits, full disks, foreign and damaged folders. Kills: test_run_folder_kill.py."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tcal_compiler.errors import RunFolderError, StageError
from tcal_compiler.runtime import durable
from tcal_compiler.runtime.durable import write_atomic
from tcal_compiler.runtime.manifest import hash_json
from tcal_compiler.runtime.run_folder import RunFolder


def create(path: Path, fingerprint: str = "f" * 64, **options: object) -> RunFolder:
    return RunFolder.create_or_open(
        path, teacher_fingerprint=fingerprint, teacher_source="tiny", config_json={"a": 1}, **options
    )


def run_stage(run: RunFolder, name: str, files: dict[str, str], config: object = 0, **evidence: object) -> bool:
    """True when the stage had to run."""
    with run.stage(name, config=config, inputs=["x"]) as stage:
        if stage.done:
            return False
        for rel, text in files.items():
            (stage.dir / rel).parent.mkdir(parents=True, exist_ok=True)
            (stage.dir / rel).write_text(text)
        stage.evidence = dict(evidence)
    return True


def listing(path: Path) -> set[str]:
    """All files below path but the manifest and the lock."""
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {"tcal.json", ".lock"}


def test_a_stage_runs_once_and_again_when_its_config_inputs_or_files_change(tmp_path):
    path = tmp_path / "deep" / "run"
    with create(path) as run:
        assert run_stage(run, "plan", {"plan.toml": "keep = [0]"}, config={}, sites=2, loss=float("nan"))
        assert not run_stage(run, "plan", {}, config={})
        assert run_stage(run, "export", {"onnx/model.onnx": "m", "onnx/a.json": "j"})
    with create(path) as run:
        with run.stage("plan", config={}, inputs=["x"]) as stage:
            assert stage.done and stage.evidence == {"sites": 2, "loss": "NaN"}
        assert run.verify_files() == {}
        assert run_stage(run, "export", {"onnx/model.onnx": "m2"}, config=1)  # onnx/a.json is no longer part of it
        assert listing(path) == {"plan.toml", "onnx/model.onnx"}
        (path / "plan.toml").write_text("keep = [1]")
        assert "another sha256" in run.verify_files()["plan.toml"]
        (path / "onnx/model.onnx").unlink()
        assert run.changed("export") == {"onnx/model.onnx": "is missing"}
        assert run_stage(run, "export", {"onnx/model.onnx": "m2"}, config=1)


def test_a_record_counts_work_from_before_its_block(tmp_path):
    with create(tmp_path / "run") as run:
        with run.stage("eval", config=0, inputs=0) as stage:
            stage.seconds = 100.0
        assert 100 <= run.manifest.stages["eval"].seconds < 200


def test_a_users_edit_stays_until_its_stage_runs_again(tmp_path):
    with create(tmp_path / "run") as run:
        run_stage(run, "plan", {"plan.toml": "old"}, config={})
    (tmp_path / "run/plan.toml").write_text("edited")
    with create(tmp_path / "run"):
        assert (tmp_path / "run/plan.toml").read_text() == "edited"


def test_no_resume_runs_each_stage_once_more_without_its_checkpoints(tmp_path):
    with create(tmp_path / "run") as run:
        run_stage(run, "a", {"a": "1"})
        with pytest.raises(KeyboardInterrupt), run.stage("b", config=0, inputs=["x"]) as stage:
            (stage.scratch / "step").write_text("10")
            raise KeyboardInterrupt
    with create(tmp_path / "run", resume=False) as run:
        with run.stage("b", config=0, inputs=["x"]) as stage:
            assert not stage.done and not any(stage.scratch.iterdir())
        assert run_stage(run, "a", {"a": "2"})
        assert not run_stage(run, "a", {"a": "3"})


def test_stage_hash_changes_with_what_a_stage_made(tmp_path):
    with create(tmp_path / "run") as run:
        run_stage(run, "a", {"a": "1"})
        first = run.stage_hash("a")
        run_stage(run, "a", {"a": "2"}, config=1)
        assert run.stage_hash("a") != first
        with pytest.raises(RunFolderError, match="stage b is not complete; complete: a"):
            run.record("b")


def test_an_exception_leaves_the_old_stage_and_no_temporary_file(tmp_path):
    with create(tmp_path / "run") as run:
        run_stage(run, "a", {"a": "old"})
        with pytest.raises(ZeroDivisionError), run.stage("a", config=1, inputs=["x"]) as stage:
            (stage.dir / "a").write_text("half")
            raise ZeroDivisionError
        assert listing(run.path) == {"a"} and (run.path / "a").read_text() == "old"
        assert not run_stage(run, "a", {})


def test_a_new_folder_without_a_stage_is_taken_back(tmp_path):
    with pytest.raises(ZeroDivisionError), create(tmp_path / "x/y/run") as run, run.stage("a", config=0, inputs=0):
        raise ZeroDivisionError
    assert not (tmp_path / "x").exists()
    (tmp_path / "empty").mkdir()
    with create(tmp_path / "empty"):
        pass
    assert os.listdir(tmp_path / "empty") == []


def test_checkpoints_survive_until_the_stage_completes(tmp_path):
    with pytest.raises(KeyboardInterrupt), create(tmp_path / "run") as run, run.stage("a", config=0, inputs=0) as stage:
        assert stage.scratch == run.scratch("a")
        write_atomic(stage.scratch / "step.pt", b"10")
        raise KeyboardInterrupt
    with create(tmp_path / "run") as run:
        with run.stage("a", config=0, inputs=0) as stage:
            assert (stage.scratch / "step.pt").read_bytes() == b"10"
            (stage.dir / "out").write_text("x")
        assert listing(run.path) == {"out"}
        with pytest.raises(ZeroDivisionError), run.stage("b", config=0, inputs=0) as stage:
            (stage.scratch / "step.pt").write_text("1")
            raise ZeroDivisionError
        told: list[tuple[str, str]] = []
        run.on_again = lambda *what: told.append(what)
        with run.stage("b", config=1, inputs=0) as stage:  # of another config: not to be resumed from
            assert not any(stage.scratch.iterdir())
        assert told == [("b", "what a stopped run left of it is of other settings or inputs, and is deleted")]
    assert not (run.path / ".scratch").exists()


def test_one_writer_many_readers(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/tcal", "align", "embedded"])
    with create(tmp_path / "run") as run:
        run_stage(run, "a", {"a": "1"})
        holder = rf"in use by another process \(pid {os.getpid()}\): tcal align embedded\n"
        with pytest.raises(RunFolderError, match=holder):
            create(tmp_path / "run")
        with pytest.raises(RunFolderError, match="in use"):
            RunFolder.open_existing(tmp_path / "run")
    with RunFolder.open_existing(tmp_path / "run") as one, RunFolder.open_existing(tmp_path / "run") as two:
        assert one.verify_files() == two.verify_files() == {}
        with pytest.raises(RunFolderError, match="reading only"):
            run_stage(one, "a", {})
        with pytest.raises(RunFolderError, match=r"in use by another process\n"):  # not the writer, which has gone
            create(tmp_path / "run")
        with pytest.raises(RunFolderError, match="in use"):
            create(tmp_path / "run")
    with RunFolder.open_existing(tmp_path / "run", write=True) as run:
        assert run_stage(run, "b", {"b": "1"})
    with pytest.raises(RunFolderError, match="no such run folder"):
        RunFolder.open_existing(tmp_path / "none")


def test_foreign_folders_are_not_touched(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match=r"not a run folder and not empty; it holds \['thesis.tex'\]"):
        create(tmp_path / "home")
    with pytest.raises(RunFolderError, match="is not a folder"):
        create(tmp_path / "file")
    with pytest.raises(RunFolderError):
        create(tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        RunFolder.open_existing(tmp_path / "home")
    assert os.listdir(tmp_path / "home") == ["thesis.tex"]


def test_another_teachers_folder_is_refused_and_left_alone(tmp_path):
    with create(tmp_path / "run", "a" * 64) as run:
        run_stage(run, "a", {"a": "1"})
    before = (tmp_path / "run/tcal.json").read_bytes()
    with pytest.raises(RunFolderError, match=r"another teacher: tiny .fingerprint aaaaaaaaaaaa.*bbbbbbbbbbbb"):
        create(tmp_path / "run", "b" * 64)
    assert (tmp_path / "run/tcal.json").read_bytes() == before


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda m: m.update(schema_version=99), "99 is newer than 2"),
        (lambda m: m.update(extra=1), "Extra inputs"),
        (lambda m: m.pop("teacher"), "at teacher: Field required"),
        (lambda m: m["stages"]["a"].update(files={"../x": "0" * 64}), "not a plain relative file name"),
        (lambda m: m["stages"]["a"].update(files={"/etc/x": "0" * 64}), "not a plain relative file name"),
        (lambda m: m["stages"]["a"].update(files={"tcal.json": "0" * 64}), "the manifest itself"),
        (lambda m: m["stages"]["a"].update(files={"a": "0"}), "pattern"),
        (lambda m: m["stages"]["a"].update(seconds="1"), "valid number"),
        (lambda m: m.update(pending={"stage": "a", "folder": "../up", "remove": []}), "pattern"),
    ],
)
def test_damaged_manifests(tmp_path, edit, message):
    with create(tmp_path / "run") as run:
        run_stage(run, "a", {"a": "1"})
    file = tmp_path / "run/tcal.json"
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))
    for open_it in (create, RunFolder.open_existing):
        with pytest.raises(RunFolderError, match=message):
            open_it(tmp_path / "run")


def test_truncated_manifests(tmp_path):
    with create(tmp_path / "run") as run:
        run_stage(run, "a", {"a": "1"})
    file = tmp_path / "run/tcal.json"
    whole = file.read_bytes().rstrip()
    for cut in range(0, len(whole), 7):
        file.write_bytes(whole[:cut])
        with pytest.raises(RunFolderError, match="cannot be read as JSON"):
            create(tmp_path / "run")
    file.write_bytes(b"[]")
    with pytest.raises(RunFolderError, match="damaged"):
        create(tmp_path / "run")


def test_links_and_names_of_others_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with create(tmp_path / "run") as run:
        run_stage(run, "a", {"a": "1"})
        with pytest.raises(RunFolderError, match="link"), run.stage("b", config=0, inputs=0) as stage:
            (stage.dir / "b").symlink_to("/etc/hostname")
        with pytest.raises(RunFolderError, match="overwrite a file of stage a"):
            run_stage(run, "b", {"a": "2"})
        with pytest.raises(RunFolderError, match="not a plain relative"):
            run_stage(run, "b", {".lock": "2"})
        (run.path / "onnx").symlink_to(tmp_path / "out")
        with pytest.raises(RunFolderError, match="link"):
            run_stage(run, "b", {"onnx/m": "2"})
        (run.path / "b").mkdir()
        with pytest.raises(RunFolderError, match="folder where a file has to be"):
            run_stage(run, "b", {"b": "2"})
        (run.path / "a").unlink()
        (run.path / "a").symlink_to(tmp_path / "a2")
        (tmp_path / "a2").write_text("1")
        assert run.verify_files() == {"a": "is a symbolic link"}
    assert os.listdir(tmp_path / "out") == []


def test_evidence_that_is_not_json_is_our_bug_and_commits_nothing(tmp_path):
    with create(tmp_path / "run") as run:
        with pytest.raises(TypeError):
            run_stage(run, "a", {"a": "1"}, where=Path("x"))
        assert not run.manifest.stages and listing(run.path) == set()


def test_config_hash_ignores_the_order_of_keys_only():
    assert hash_json({"a": 1, "b": (2,)}) == hash_json({"b": [2], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 1.5}) != hash_json({"a": "1.5"})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("where", ["body", "replace", "fsync"])
def test_a_full_disk_is_a_stage_error_and_leaves_nothing_half_written(tmp_path, monkeypatch, code, where):
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    def attempt(run: RunFolder) -> None:
        with run.stage("a", config=1, inputs=0) as stage:
            (stage.dir / "a").write_text("new")
            if where == "body":
                raise RuntimeError("saving failed") from OSError(code, "full")
            monkeypatch.setattr(durable.os, where, fail)

    with pytest.raises(StageError, match=r"stage a: no space left .* bytes free"), create(tmp_path / "new") as run:
        attempt(run)
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    with create(tmp_path / "run") as run:
        run_stage(run, "a", {"a": "old"})
        before = (run.path / "tcal.json").read_bytes()
        with pytest.raises(StageError):
            attempt(run)
        monkeypatch.undo()
        assert (run.path / "tcal.json").read_bytes() == before and listing(run.path) == {"a"}
        assert not run_stage(run, "a", {})


def test_a_full_disk_at_the_first_write(tmp_path, monkeypatch):
    monkeypatch.setattr(durable.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StageError, match="bytes free"):
        create(tmp_path / "up/run")
    assert not (tmp_path / "up").exists()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB, where mounting is permitted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(tiny_disk):
    import torch
    from safetensors.torch import save_file

    big = {"w": torch.zeros(1 << 19)}  # 2 MiB
    writers = {
        "torch": lambda d: torch.save(big, d / "w.pt"),
        "safetensors": lambda d: save_file(big, d / "w.safetensors"),
        "python": lambda d: (d / "w").write_bytes(bytes(1 << 21)),
    }
    for name, write in writers.items():
        with (
            pytest.raises(StageError, match="no space left"),
            create(tiny_disk / name) as run,
            run.stage("a", config=0, inputs=0) as stage,
        ):
            write(stage.dir)
        assert os.listdir(tiny_disk) == [], name
    gc.collect()  # torch's writer, alive in a traceback, keeps its deleted file open
    with create(tiny_disk / "run") as run:
        run_stage(run, "a", {"a": "small"})
        for write in writers.values():
            with pytest.raises(StageError), run.stage("b", config=0, inputs=0) as stage:
                write(stage.dir)
            gc.collect()
        assert listing(run.path) == {"a"} and not run_stage(run, "a", {})
