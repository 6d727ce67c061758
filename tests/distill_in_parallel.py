"""What each of several processes of test_parallel runs, and what that test runs alone: small distillations."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from support import allocated
from tiny_models import VOCAB, scanned

from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.graph import copy_module
from tcal_compiler.passes.local_windows import with_local_windows
from tcal_compiler.runtime.config import DistillConfig
from tcal_compiler.runtime.distill import Distiller, distill
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.parallel import SOLO, Group, joined
from tcal_compiler.runtime.student import Student, make_student
from tcal_compiler.runtime.training import TrainState

TRAIN = 6
IDS = example_ids(TRAIN + 4, 20, VOCAB, seed=1)
COUNTS = torch.ones(TRAIN + 4, 19, dtype=torch.bool)
COUNTS[2, 11:] = False
CONFIG = DistillConfig(
    steps=4,
    batch=3,
    warmup=2,
    lr_gdn=3e-3,
    lr_other=1e-3,
    score_every=2,
    checkpoint_every=2,
    chunk=16,
    cross_entropy=0.2,
    divergence="js",
)
VARIANTS: dict[str, dict[str, object]] = {
    "replicated": {},
    "sharded": {"shard": True},
    "sharded, recomputed": {"shard": True, "checkpoint_activations": True, "short_length": 10},
    "sharded, gdn": {"shard": True, "train": "gdn", "student_dtype": "bfloat16", "teacher_dtype": "bfloat16"},
}


def start() -> Student:
    capture, scan = scanned("is_causal", sharp=3.0, tied=True, bias=True)
    student = make_student(capture, with_local_windows(scan, 4), choose(scan, "keep=1"))
    for s in student.converted:
        mixer = student.gm.get_submodule(f"tcal_mixers.{s.index}")
        naive_(mixer, torch.Generator().manual_seed(0))
        mixer.local_scale.data.fill_(0.5)
    return student


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in student.gm.named_parameters()}


def trained(group: Group, resume: TrainState | None = None, apart: float = 0.0, **changes: object) -> dict[str, object]:
    """Curve, weights and the last checkpoint. apart: is added to the weights first."""
    student, saved = start(), list[TrainState]()
    teacher = {n: p.clone() for n, p in student.capture.gm.named_parameters()}
    with torch.no_grad():
        for p in student.gm.parameters():
            p.add_(apart)
    config = CONFIG.model_copy(update=changes)
    options = {"resume": copy.deepcopy(resume), "save": lambda s: saved.append(copy.deepcopy(s)), "group": group}
    curve = distill(student, IDS, COUNTS, train=TRAIN, config=config, seed=3, **options)[1]
    assert all(torch.equal(p, teacher[n]) for n, p in student.capture.gm.named_parameters())
    return {"curve": curve, "weights": weights(student), "saved": saved[-1] if saved else None}


def alone() -> Student:
    """As start, with a teacher that no other test has."""
    student = start()
    return replace(student, capture=replace(student.capture, gm=copy_module(student.capture.gm)))


def work(student: Student, group: Group, shard: bool) -> None:
    """A piece of a distillation, for what it holds at most."""
    config = CONFIG.model_copy(update={"shard": shard})
    trainer = Distiller(student, IDS, COUNTS, train=TRAIN, config=config, group=group)
    for step in range(2):
        trainer.step(step, torch.arange(CONFIG.batch))
    trainer.score()
    trainer.state()
    trainer.restore()


def main() -> None:
    with joined(torch.device("cpu")) as group:
        apart = 0.1 * group.rank  # the second process has to take the weights of the first
        found = {name: trained(group, apart=apart, **changes) for name, changes in VARIANTS.items()}
        found["sharded, resumed"] = trained(group, trained(SOLO)["saved"], shard=True)
        for shard in (False, True):
            found[f"allocated, {shard}"] = allocated(lambda shard=shard: work(alone(), group, shard))
        torch.save(found, Path(sys.argv[1]) / f"{group.rank}.pt")


if __name__ == "__main__":
    main()
