"""A run folder that somebody else made: nothing outside it is written, moved or deleted, and damage is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tcal_compiler.errors import RunFolderError
from tcal_compiler.runtime.durable import write_atomic
from tcal_compiler.runtime.hashed_tensors import save_hashed
from tcal_compiler.runtime.meter import Meter
from tcal_compiler.runtime.run_folder import RunFolder
from tcal_compiler.runtime.training import Checkpoint, TrainState


def work(path: Path, config: int = 0) -> None:
    """Two stages with files and a checkpoint each."""
    with RunFolder.create_or_open(path, teacher_fingerprint="f", teacher_source="t", config_json={"n": config}) as run:
        for name in ("one", "two"):
            with run.stage(name, config=config, inputs=0) as stage:
                if not stage.done:
                    write_atomic(stage.scratch / "step", b"7")
                    (stage.dir / f"{name}.txt").write_text("new")
                    (stage.dir / "sub").mkdir()
                    (stage.dir / "sub" / name).write_text("new")


def link(place: Path, target: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    place.symlink_to(target)


def pending(run: Path, folder: str, remove: tuple[str, ...] = ()) -> None:
    manifest = json.loads((run / "tcal.json").read_text())
    manifest["pending"] = {"stage": "one", "folder": folder, "remove": list(remove)}
    (run / "tcal.json").write_text(json.dumps(manifest))


def published_from(run: Path, home: Path) -> None:
    (run / ".tmp-one-1").mkdir()
    (home / "one").write_text("mine")
    link(run / ".tmp-one-1/sub", home)
    pending(run, ".tmp-one-1")


def removed_through(run: Path, home: Path) -> None:
    link(run / "more", home)
    pending(run, ".tmp-one-1", ("more/letter",))


def scratch_removed_through(run: Path, home: Path) -> None:
    (home / "one").mkdir()
    (home / "one/deep").write_text("deep")
    link(run / ".scratch", home)
    pending(run, ".tmp-one-1")


TRICKS: dict[str, Callable[[Path, Path], None]] = {
    "new manifest is a link": lambda run, home: link(run / ".tcal.json.new", home / "letter"),
    "manifest is a link": lambda run, home: ((run / "tcal.json").unlink(), link(run / "tcal.json", home / "letter"))[0],
    "lock is a link": lambda run, home: ((run / ".lock").unlink(), link(run / ".lock", home / "letter"))[0],
    "lock is a hard link": lambda run, home: ((run / ".lock").unlink(), os.link(home / "letter", run / ".lock"))[0],
    "scratch is a link": lambda run, home: link(run / ".scratch", home),
    "scratch of a stage is a link": lambda run, home: link(run / ".scratch/one", home),
    "temporary folder is a link": lambda run, home: link(run / f".tmp-one-{os.getpid()}", home),
    "another's temporary folder is a link": lambda run, home: link(run / ".tmp-taps-x", home),
    "a pending file lies outside": published_from,
    "a file to remove lies outside": removed_through,
    "scratch of a pending stage lies outside": scratch_removed_through,
    "a stage's folder is a link": lambda run, home: link(run / "sub2", home),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_nothing_outside_the_run_folder_is_touched(tmp_path, trick):
    run, home = tmp_path / "run", tmp_path / "home"
    (home / "one").parent.mkdir()
    (home / "letter").write_text("dear")
    (home / "folder").mkdir()
    (home / "folder" / "deep").write_text("deep")
    work(run)
    TRICKS[trick](run, home)
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    try:
        work(run, config=1)
    except RunFolderError as e:
        assert str(run) in str(e)
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before


def test_files_are_required_to_be_what_their_stage_made(tmp_path):
    work(tmp_path / "run")
    with RunFolder.open_existing(tmp_path / "run") as run:
        run.require("one")
        (run.path / "one.txt").write_text("other")
        with pytest.raises(RunFolderError, match=r"one\.txt: has another sha256"):
            run.require("one")
        run.require("two")
        with pytest.raises(RunFolderError, match="stage three is not complete"):
            run.require("three")


@pytest.mark.parametrize("what", ["scratch", "scratch/one"])
def test_a_file_where_a_checkpoint_folder_has_to_be(tmp_path, what):
    work(tmp_path / "run")
    place = tmp_path / "run" / f".{what}"
    place.parent.mkdir(exist_ok=True)
    if place.is_dir():
        place.rmdir()
    place.write_text("x")
    with pytest.raises(RunFolderError, match="cannot be written"):
        work(tmp_path / "run", config=1)


NOTES = [
    "[]",
    "[" * 20_000,
    '{"step": 1}',
    '{"step": 1, "curve": []}',
    '{"step": 1, "curve": [0]}',
    '{"step": 1, "curve": [{}]}',
    '{"step": -1, "curve": [{"step": 0}]}',
    '{"step": Infinity, "curve": [{"step": 0}]}',
]


@pytest.mark.parametrize("note", NOTES, ids=lambda n: n[:40])
def test_a_checkpoint_that_says_no_state_of_a_training(tmp_path, note):
    """With the right sha256: whoever can write a folder can write that too."""
    save_hashed(tmp_path / "align.safetensors", {"a": torch.ones(2)}, note)
    with pytest.raises(RunFolderError, match="cannot be read"):
        Checkpoint(tmp_path / "align.safetensors").load()


def test_a_checkpoint_is_loaded_only_as_it_was_written(tmp_path):
    file = tmp_path / "align.safetensors"
    assert Checkpoint(file).load() is None
    Checkpoint(file).save(TrainState(3, {"a": torch.arange(6.0), "b": torch.ones(2, 2)}, [{"step": 0}]))
    whole = file.read_bytes()
    state = Checkpoint(file).load()
    assert state is not None and state.step == 3 and state.curve == [{"step": 0}] and state.tensors["a"][5] == 5
    for at in range(0, len(whole), 5):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            again = Checkpoint(file).load()
        except RunFolderError as e:
            assert "the stage then starts over" in str(e)
        else:  # padding of the header is no content
            assert again is not None and whole[at : at + 1] == b" ", at


def test_a_checkpoint_takes_no_memory_beside_what_it_holds(tmp_path):
    state = TrainState(1, {n: torch.ones(8 << 20) for n in "ab"}, [{"step": 0}])
    tmp_path.chmod(0o755)
    before = psutil.Process().memory_info().rss
    with Meter() as m:
        Checkpoint(tmp_path / "align.safetensors").save(state)
    assert m.peak - before < 16 << 20  # of 64 MiB
    assert (tmp_path / "align.safetensors").stat().st_mode & 0o777 == 0o644
