"""Settings for all tests: Triton kernels run in its interpreter where there is no GPU, tests for one are skipped there;
helpers can be imported.
"""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

for folder in ("", "kernels", "fuzz"):  # import-mode=importlib does not do it
    sys.path.insert(0, str(Path(__file__).parent / folder))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
torch.set_num_threads(1)  # tests run on several processes, and their tensors are small
gc.set_threshold(100_000, 50, 100)  # captures and exports make millions of objects that live: 5% of the time


# The files that take longest, first, so that no process is left alone with one of them at the end (make test gives
# whole files to its processes in this order).
LONGEST = ["runtime/test_onnx", "test_backend", "test_bad_folders", "passes/test_to_sdpa", "test_cli"]
LONGEST += ["passes/test_make_stateful", "runtime/test_windowed_cache", "passes/test_find_attention", "test_bad_input"]
LONGEST += ["test_distill_command", "test_variants", "kernels/test_gated_delta_step", "test_report"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(here).with_suffix("").as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory) -> Path:
    """The tiny teacher, converted from end to end once for all test processes: do not edit."""
    from command_line import SMALL, TINY, done

    base = tmp_path_factory.getbasetemp()
    place = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared-run"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "ready").exists():
            options = ("--tokenizer", "bytes", "--policy", "keep=0", "--align-steps", "6", *SMALL)
            done("tcal-compile", TINY, "-o", place / "run", *options)
            (place / "ready").touch()
    return place / "run"


@pytest.fixture
def finished(shared_run, tmp_path) -> Path:
    """A copy of the shared run."""
    return Path(shutil.copytree(shared_run, tmp_path / "run"))
