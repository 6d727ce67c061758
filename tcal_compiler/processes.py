"""`tcal distill` under torchrun: its processes share the steps, and the first of them owns the run folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .progress import Progress
from .runs import distill_run
from .runtime.parallel import Group, barrier, joined, launched
from .runtime.run_files import LOCK_NAME
from .source import check_device


def distill_in_processes(
    path: str | Path, *, device: str, until: str, progress: Progress, **options: Any
) -> Path | None:
    """runs.distill_run, alone or as one of the processes that torchrun started; None in all of those but the first.

    Each of the others works on a copy of the run folder, which it throws away, and does not export. cuda is the card
    whose number torchrun gives the process.
    """
    if not launched():
        return distill_run(path, device=device, until=until, progress=progress, **options)
    place = check_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device)
    with joined(place) as group, _own_folder(Path(path), group) as own:
        if group.rank:
            distill_run(own, device=str(place), until="distill", progress=Progress(quiet=True), **options)
            return None
        return distill_run(own, device=str(place), until=until, progress=progress, **options)


@contextlib.contextmanager
def _own_folder(path: Path, group: Group) -> Iterator[Path]:
    """The run folder itself in process 0; in the others a copy of it as it was before any of them went on."""
    if group.rank == 0:
        barrier(group)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="tcal-process-") as parent:
        if path.is_dir():
            ignore = shutil.ignore_patterns(LOCK_NAME, "onnx*", "student.pt2", "report.*")
            shutil.copytree(path, Path(parent) / "run", symlinks=True, ignore=ignore, copy_function=_link)
        barrier(group)
        yield Path(parent) / "run"


def _link(source: str, target: str) -> None:
    """A second name for a file, as those of a run folder are replaced and never written into; else a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
