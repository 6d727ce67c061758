"""Two processes under torchrun, with gloo on the CPU: the curve and the weights of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import BYTES, SMALL, TINY, done
from distill_in_parallel import CONFIG, COUNTS, IDS, TRAIN, start, trained, weights

from tcal_compiler.errors import ConfigError
from tcal_compiler.runtime.distill import Distiller
from tcal_compiler.runtime.parallel import Group

TESTS = Path(__file__).parent.parent


def launch(*words: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = [str(TESTS.parent), str(TESTS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    result = launch(TESTS / "distill_in_parallel.py", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    student = start()
    before = weights(student)
    curve = trained(student)["curve"]
    assert first["curve"] == second["curve"] and [p["step"] for p in curve] == [p["step"] for p in first["curve"]]
    for found, expected in zip(first["curve"], curve, strict=True):
        assert found["predictions"] == expected["predictions"]
        for name in ("train", "held_out", "kl", "nll", "divergence"):
            assert found[name] == (expected[name] and pytest.approx(expected[name], rel=1e-4)), name
    for name, tensor in weights(student).items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        moved, apart = tensor - before[name], first["weights"][name] - tensor
        assert apart.norm() <= 0.005 * moved.norm(), name
        assert apart.abs().max() <= 0.05 * moved.abs().max(), name  # of one number; Adam divides by small gradients


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    words = ("tcal", "align", TINY, "-o", tmp_path / "one", *BYTES, "--policy", "keep=0", "--align-steps", "2", *SMALL)
    done(*words)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "c.toml").write_text("[distill]\nbatch = 4\nscore_every = 2\ncheckpoint_every = 2\n")
    options = ("--steps", "4", "--config", tmp_path / "c.toml", "--no-export", "--quiet")
    done("tcal", "distill", tmp_path / "one", *options)
    (tmp_path / "tcal.py").write_text("from tcal_compiler.cli import main\nmain()\n")
    result = launch(tmp_path / "tcal.py", "distill", tmp_path / "two", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("distillation is complete") == 1
    one, two = (json.loads((tmp_path / n / "tcal.json").read_text())["stages"]["distill"] for n in ("one", "two"))
    assert one["evidence"]["processes"] == 1 and two["evidence"]["processes"] == 2
    assert one["config_hash"] == two["config_hash"]
    for a, b in zip(one["evidence"]["curve"], two["evidence"]["curve"], strict=True):
        assert a["predictions"] == b["predictions"] and a["held_out"] == pytest.approx(b["held_out"], rel=1e-4)
    files = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("one", "two")]
    assert files[0] == files[1]


def test_what_processes_cannot_share_is_refused():
    for changes, key in (({"batch": 2}, "distill.batch"), ({"batch": 4, "hidden": 0.1}, "distill.hidden")):
        with pytest.raises(ConfigError, match="3 processes") as e:
            Distiller(start(), IDS, COUNTS, train=TRAIN, config=CONFIG.model_copy(update=changes), group=Group(0, 3))
        assert e.value.where == key


def test_shares_are_disjoint_and_whole():
    index = torch.randperm(7)
    parts = [Group(rank, 3).part(index) for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == list(range(7)) and {len(p) for p in parts} == {2, 3}
