"""torch.compile with the backend tcal: the student of a run folder answers where the teacher is called.

python examples/compile_in_place.py run     # a run folder of examples.tiny_torch_teacher:factory or its teacher.pt2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import tcal_compiler
from examples.tiny_torch_teacher import factory


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path)
    p.add_argument("--compiler", default="inductor", help="inductor, or eager, which runs the graph as it is")
    args = p.parse_args()
    tcal_compiler.register_backend()  # needed only where the package is not installed
    teacher = factory().eval()
    options = {"student": str(args.run), "compiler": args.compiler}
    student = torch.compile(teacher, backend="tcal", options=options)
    with torch.no_grad():
        for length in (9, 50, 200):
            ids = torch.randint(0, 256, (2, length))
            error = (student(ids) - teacher(ids)).abs().max().item()
            print(f"{length} tokens: logits differ from the teacher's by {error:.3g} at most")


if __name__ == "__main__":
    main()
