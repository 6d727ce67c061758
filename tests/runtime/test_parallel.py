"""Processes with gloo on the CPU, as torchrun starts them: the curve and the weights of one process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import BYTES, SMALL, TINY, done
from distill_in_parallel import CONFIG, COUNTS, IDS, TRAIN, VARIANTS, alone, start, trained, weights, work
from torch import nn

from tcal_compiler.api import convert
from tcal_compiler.config import build_config
from tcal_compiler.errors import ConfigError, TeacherError
from tcal_compiler.runtime.allocations import empty_like_, without_values
from tcal_compiler.runtime.distill import Distiller
from tcal_compiler.runtime.parallel import SOLO, Group, _Bucket, as_first_of
from tcal_compiler.runtime.sharded import check_weights

TESTS = Path(__file__).parent.parent


def launch(*words: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = [str(TESTS.parent), str(TESTS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def launch_alone(folder: Path, processes: int = 2) -> list[dict[str, Any]]:
    """What every process of distill_in_parallel found. They are told what torchrun would tell them, which is slower."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    known = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    known["WORLD_SIZE"] = str(processes)
    command = [sys.executable, str(TESTS / "distill_in_parallel.py"), str(folder)]
    running = [
        subprocess.Popen(command, env=os.environ | known | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(processes)
    ]
    try:
        errors = [p.communicate(timeout=240)[1] for p in running]
    finally:
        for p in running:
            p.kill()
    assert not any(p.returncode for p in running), "\n".join(e[-3000:] for e in errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def same(found: dict[str, Any], expected: dict[str, Any], before: dict[str, torch.Tensor]) -> None:
    """Curves within rounding, weights but for what Adam makes of rounding."""
    assert [p["step"] for p in found["curve"]] == [p["step"] for p in expected["curve"]] == [0, 2, 4]
    for mine, known in zip(found["curve"], expected["curve"], strict=True):
        assert mine["predictions"] == known["predictions"]
        for name in ("train", "held_out", "kl", "nll", "divergence"):
            assert mine[name] == (known[name] and pytest.approx(known[name], rel=1e-4)), name
    for name, tensor in expected["weights"].items():
        moved, apart = tensor - before[name], found["weights"][name] - tensor
        assert apart.norm() <= 0.005 * moved.norm(), name
        assert apart.abs().max() <= 0.05 * moved.abs().max(), name  # of one number; Adam divides by small gradients


def compared(found: list[dict[str, Any]]) -> None:
    before = weights(start())
    for name, changes in VARIANTS.items():
        first, *others = (f[name] for f in found)
        for other in others:
            assert other["curve"] == first["curve"]
            assert all(torch.equal(t, first["weights"][n]) for n, t in other["weights"].items())
        alone = trained(SOLO, **{k: v for k, v in changes.items() if k != "shard"})
        loose = "student_dtype" in changes  # another order of sums is rounded to another bfloat16
        same(first, alone, before) if not loose else close(first, alone)
        kept, known = first["saved"].tensors, alone["saved"].tensors
        assert {n: (t.shape, t.dtype) for n, t in kept.items()} == {n: (t.shape, t.dtype) for n, t in known.items()}
        assert all(o["saved"] is None for o in others)  # the first writes
        resumed = trained(SOLO, first["saved"], **{k: v for k, v in changes.items() if k != "shard"})
        same(resumed, alone, before) if not loose else close(resumed, alone)
    same(found[0]["sharded, resumed"], trained(SOLO), before)


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for mine, known in zip(found["curve"], expected["curve"], strict=True):
        assert mine["held_out"] == pytest.approx(known["held_out"], rel=1e-3)


def counted(shard: bool) -> int:
    """What the first of two processes allocates at most for distill_in_parallel.work, without running it."""
    student = alone()
    with as_first_of(2, sharded=shard) as group, without_values() as memory:
        for gm in (student.gm, student.capture.gm):
            empty_like_(gm)
        work(student, group, shard)
        return memory.all.peak


def test_two_processes_train_like_one(tmp_path):
    """With all weights in each, and with a part of them in each; stopped with two and gone on with one, and back."""
    found = launch_alone(tmp_path)
    compared(found)
    for shard in (False, True):
        assert counted(shard) == pytest.approx(found[0][f"allocated, {shard}"], rel=0.15)


@pytest.mark.slow
def test_three_processes_under_torchrun_train_like_one(tmp_path):
    """Parts of unequal size, some of them empty."""
    result = launch(TESTS / "distill_in_parallel.py", tmp_path, processes=3)
    assert result.returncode == 0, result.stderr[-3000:]
    compared([torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)])


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["false", "true"])
def test_the_command_under_torchrun(tmp_path, shard):
    words = ("tcal", "align", TINY, "-o", tmp_path / "one", *BYTES, "--policy", "keep=0", "--align-steps", "2", *SMALL)
    done(*words)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "c.toml").write_text("[distill]\nbatch = 4\nscore_every = 2\ncheckpoint_every = 2\n")
    options = ("--steps", "4", "--config", tmp_path / "c.toml", "--no-export", "--quiet")
    done("tcal", "distill", tmp_path / "one", *options)
    with (tmp_path / "c.toml").open("a") as file:
        file.write(f"shard = {shard}\n")
    (tmp_path / "tcal.py").write_text("from tcal_compiler.cli import main\nmain()\n")
    result = launch(tmp_path / "tcal.py", "distill", tmp_path / "two", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("distillation is complete") == 1
    one, two = (json.loads((tmp_path / n / "tcal.json").read_text())["stages"]["distill"] for n in ("one", "two"))
    assert one["evidence"]["processes"] == 1 and two["evidence"]["processes"] == 2
    assert str(two["evidence"]["shard"]).lower() == shard
    assert [len(e["evidence"]["peak_memory"]) for e in (one, two)] == [1, 2]
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


def test_shards_that_cannot_be_are_refused_before_a_model_is_read(tmp_path):
    for other in ({"compile": True}, {"hidden": 0.1}):
        with pytest.raises(ConfigError, match=f"both shard and {next(iter(other))}"):
            build_config({"distill": {"steps": 1, "shard": True, **other}}, "test")
    config = build_config({"distill": {"steps": 1, "shard": True}}, "test")
    with pytest.raises(ConfigError, match="torchrun") as e:
        convert("no such teacher", out=tmp_path / "run", config=config)
    assert e.value.where == "distill.shard"
    with pytest.raises(TeacherError):  # nothing is distilled
        convert("no such teacher", out=tmp_path / "run", config=config, until="align")


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        (nn.Parameter(torch.ones(())), "single number"),
        (nn.Parameter(torch.ones(3, 2).t()), "contiguous"),
        (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), "bfloat16"),
    ],
)
def test_weights_that_cannot_be_cut_are_refused(weight, what):
    check_weights({"fine": nn.Parameter(torch.ones(1, dtype=torch.bfloat16), requires_grad=False)})
    with pytest.raises(ConfigError, match=f"gain .*{what}"):
        check_weights({"gain": weight})


def test_a_run_may_go_on_with_other_processes():
    assert CONFIG.settings() == CONFIG.model_copy(update={"shard": True}).settings()


def test_sums_have_the_strides_of_their_parameters():
    parameters = [
        nn.Parameter(t) for t in (torch.ones(2), torch.ones(3, 2).t(), torch.ones(4, 4)[:, :2], torch.ones(()))
    ]
    sums = _Bucket(parameters).sums
    for number, (v, p) in enumerate(zip(sums, parameters, strict=True)):
        assert v.shape == p.shape and v.stride() == torch.zeros_like(p).stride()
        v.fill_(number)
    assert all(bool((v == number).all()) for number, v in enumerate(sums))


def test_shares_are_disjoint_and_whole():
    index = torch.randperm(7)
    parts = [Group(rank, 3).part(index) for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == list(range(7)) and {len(p) for p in parts} == {2, 3}
