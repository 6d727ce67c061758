"""Converts a tiny untrained model of every family and writes what held to docs/families.md.

python examples/families.py                            # everything, several minutes
python examples/families.py Llama "GPT-2"              # these only; other rows stay as they were
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from family_models import FAMILIES, IMPLEMENTATIONS, PLAIN, TABLE, VOCAB, plain_model, transformers_model
from torch import Tensor, nn

from tcal_compiler.errors import TcalError
from tcal_compiler.passes.capture import capture_program, example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.make_stateful import make_stateful
from tcal_compiler.passes.rewrite_gdn import mixer_path
from tcal_compiler.passes.types import Capture, SiteScan
from tcal_compiler.runtime.capture_teacher import capture_teacher
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.student import Student, make_student
from tcal_compiler.runtime.teacher import Teacher

HEAD = """# Families

Made by `python examples/families.py` with tiny untrained models (`examples/family_models.py`): two layers, width 64.
torch {torch}, transformers {transformers}, CPU, float32.

- *cores*: attention modules of the model; every one is found as a site or refused.
- *windows*: visible tokens of the sites that do not see everything.
- *nothing converted*: logits and gradients equal the teacher's, bit for bit.
- *half converted*: every second site is Gated DeltaNet; one forward and backward gives finite logits, and finite
  gradients that are not all zero for every parameter of the mixers.
- *stateful*: the half-converted student as a graph with state; prefill and decode, and chunks of 1, 3, 17 and the rest,
  equal one pass (in float64, within 1e-7 of the largest logit).

| family | implementation | cores | sites | windows | refused, and why | nothing converted | half converted | stateful |
|---|---|---|---|---|---|---|---|---|
"""
IDS = example_ids(2, 21, VOCAB, seed=3)


@dataclass
class Row:
    """One line of the table; what was not reached is empty text with the reason in `refused`."""

    family: str
    implementation: str
    cores: str = "-"
    sites: str = "-"
    windows: str = "-"
    refused: str = "none"
    same: str = "-"
    half: str = "-"
    stateful: str = "-"
    seconds: float = 0.0

    def markdown(self) -> str:
        cells = (self.family, self.implementation, self.cores, self.sites, self.windows)
        cells += (self.refused, self.same, self.half, self.stateful)
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def attention_modules(model: nn.Module) -> int:
    """Attention modules, counted by class: another way than the graph's."""
    return sum(bool(re.search(r"Attention$", type(m).__name__)) for m in model.modules())


def logits_and_gradients(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the gradients of all parameters, of the next-token loss."""
    params = [p.requires_grad_(True) for p in model.parameters()]
    out = model(*args)
    logits = out if isinstance(out, Tensor) else out.logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), args[0][:, 1:].flatten())
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return logits.detach(), [g for g in grads if g is not None]


class AsTeacher(nn.Module):
    """A model called as its capture is: transformers models without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *positions: Tensor) -> Tensor:
        if not isinstance(self.model, transformers.PreTrainedModel):
            return self.model(ids)
        return self.model(input_ids=ids, position_ids=positions[0], use_cache=False).logits


def check_same(model: nn.Module, capture: Capture, scan: SiteScan) -> str:
    """Nothing converted: logits, and gradients in whatever order the parameters come."""
    student = make_student(capture, scan, choose(scan, "all"))
    args = capture.inputs(IDS)
    theirs, their_grads = logits_and_gradients(AsTeacher(model), args)
    mine, grads = logits_and_gradients(student.gm, args)

    def key(g: Tensor) -> tuple[Any, ...]:
        return tuple(g.shape), g.double().abs().sum().item(), g.flatten()[:8].tolist()

    if not torch.equal(mine, theirs):
        return f"logits differ by {(mine - theirs).abs().max().item():.2g}"
    pairs = list(zip(sorted(grads, key=key), sorted(their_grads, key=key), strict=False))
    wrong = max(((a - b).abs().max().item() if a.shape == b.shape else float("inf") for a, b in pairs), default=0.0)
    if len(grads) != len(their_grads) or wrong:
        return f"logits equal; gradients differ by {wrong:.2g} ({len(grads)} and {len(their_grads)} of them)"
    return "equal"


def check_half(student: Student) -> str:
    """One forward and backward of a half-converted student."""
    logits, _ = logits_and_gradients(student.gm, student.capture.inputs(IDS))
    if not logits.isfinite().all():
        return "logits are not finite"
    loss = student.gm(*student.capture.inputs(IDS)).square().mean()
    for site in student.converted:
        mixer = student.gm.get_submodule(mixer_path(site.index))
        for name, g in zip(
            dict(mixer.named_parameters()),
            torch.autograd.grad(loss, list(mixer.parameters()), retain_graph=True),
            strict=True,
        ):
            if not g.isfinite().all() or not g.abs().max() > 0:
                return f"gradient of {name} is zero or not finite"
    return f"{len(student.converted)} of {len(student.sites)}"


def half_converted(capture: Capture, scan: SiteScan) -> Student:
    student = make_student(capture, scan, choose(scan, f"uniform:{len(scan.sites) // 2}"))
    generator = torch.Generator().manual_seed(0)
    for site in student.converted:
        mixer = student.gm.get_submodule(mixer_path(site.index))
        assert isinstance(mixer, GdnMixer)
        naive_(mixer, generator)
    return student


def check_stateful(student: Student) -> str:
    """The student with state equals one pass, or the reason why it has no such form."""
    try:
        flat = capture_program(student.export(), teacher=student.gm, implementation="student", shapes=((2, 24),))
        checks = make_stateful(flat).checks
    except TcalError as e:
        return _short(e)
    return f"equal ({max(c.measured for c in checks):.0e})"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split("\n  Try:")[0].split())[:260]


def _refusals(scan: SiteScan) -> str:
    by_reason: dict[str, list[str]] = {}
    for r in scan.rejected:
        by_reason.setdefault(r.reason, []).append(r.layer or r.node)
    return "; ".join(f"{len(where)}: {reason}" for reason, where in by_reason.items()) or "none"


def examine(row: Row) -> None:
    """Fills the row with everything that is asked of one model; a typed refusal ends it early and is its reason."""
    family, implementation = row.family, row.implementation
    try:
        model = plain_model(family) if family in PLAIN else transformers_model(family, implementation)
    except ValueError as e:
        row.refused = f"transformers: {_short(e).split(' yet.')[0]}"
        return
    row.cores = str(attention_modules(model))
    teacher = Teacher(family, "factory", model, None, None, {"vocab_size": VOCAB, "context_length": TABLE})
    try:
        capture = capture_teacher(teacher)
    except TcalError as e:
        row.refused = _short(e)
        return
    scan = find_attention(capture)
    row.sites, row.refused = str(len(scan.sites)), _refusals(scan)
    row.windows = ", ".join(sorted({str(s.window) for s in scan.sites if s.window})) or "none"
    if len(scan.sites) + len(scan.rejected) != int(row.cores):
        row.cores += f" (but {len(scan.sites)} + {len(scan.rejected)} were seen)"
    if scan.sites:
        row.same = check_same(model, capture, scan)
        student = half_converted(capture, scan)
        row.half = check_half(student)
        row.stateful = check_stateful(student)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="names of rows; none: all")
    parser.add_argument("--out", type=Path, default=Path("docs/families.md"))
    args = parser.parse_args()
    every = [(f, i) for f in FAMILIES for i in IMPLEMENTATIONS] + [(f, "torch") for f in PLAIN]
    if unknown := set(args.families) - {f for f, _ in every}:
        parser.error(f"unknown {sorted(unknown)}; known: {list(FAMILIES) + list(PLAIN)}")
    store = args.out.with_suffix(".json")
    rows = {(r["family"], r["implementation"]): Row(**r) for r in _read(store)}
    for family, implementation in every:
        if args.families and family not in args.families:
            continue
        start = perf_counter()
        row = rows[family, implementation] = Row(family, implementation)
        try:
            examine(row)
        except Exception as e:  # a fault of ours: the table shows it, and the other rows are made all the same
            row.refused = f"FAULT: {type(e).__name__}: {_short(e)}"
        row.seconds = round(perf_counter() - start, 1)
        print(row.markdown(), f"{row.seconds} s", flush=True)
        body = [vars(rows[key]) for key in every if key in rows]
        store.write_text(json.dumps(body, indent=1) + "\n")
    write(args.out, rows, every)


def write(out: Path, rows: dict[tuple[str, str], Row], every: list[tuple[str, str]]) -> None:
    """The table, and what is not in it."""
    text = HEAD.format(torch=torch.__version__, transformers=transformers.__version__)
    text += "".join(rows[key].markdown() + "\n" for key in every if key in rows)
    missing = [f"{family} ({how})" for family, how in every if (family, how) not in rows]
    if missing:
        text += f"\nNot run yet: {', '.join(missing)}.\n"
    out.write_text(text)


def _read(store: Path) -> list[dict[str, Any]]:
    return json.loads(store.read_text()) if store.is_file() else []


if __name__ == "__main__":
    main()
