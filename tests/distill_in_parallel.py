"""What every process of test_parallel runs under torchrun, and what that test runs alone: one small distillation."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_models import VOCAB, student_of

from tcal_compiler.passes.capture import example_ids
from tcal_compiler.runtime.config import DistillConfig
from tcal_compiler.runtime.distill import distill
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.parallel import SOLO, Group, joined
from tcal_compiler.runtime.student import Student

TRAIN = 6
IDS = example_ids(TRAIN + 4, 20, VOCAB, seed=1)
COUNTS = torch.ones(TRAIN + 4, 19, dtype=torch.bool)
COUNTS[2, 11:] = False
CONFIG = DistillConfig(
    steps=4, batch=3, warmup=2, lr_gdn=3e-3, lr_other=1e-3, score_every=2, chunk=16, cross_entropy=0.2, divergence="js"
)


def start() -> Student:
    student = student_of("is_causal", "keep=1", sharp=3.0, tied=True, bias=True)
    for s in student.converted:
        naive_(student.gm.get_submodule(f"tcal_mixers.{s.index}"), torch.Generator().manual_seed(0))
    return student


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in student.gm.named_parameters()}


def trained(student: Student, group: Group = SOLO) -> dict[str, object]:
    curve = distill(student, IDS, COUNTS, train=TRAIN, config=CONFIG, seed=3, group=group)[1]
    return {"curve": curve, "weights": weights(student)}


def main() -> None:
    with joined(torch.device("cpu")) as group:
        student = start()
        if group.rank:  # it has to take the weights of process 0
            with torch.no_grad():
                for p in student.gm.parameters():
                    p.add_(0.1)
        torch.save(trained(student, group), Path(sys.argv[1]) / f"{group.rank}.pt")


if __name__ == "__main__":
    main()
