"""Converts a tiny untrained model of every family and writes what held to docs/families.md.

python examples/families.py                            # everything, about half an hour
python examples/families.py Llama "GPT-2"              # these only; other rows stay as they were

Several may run at once: each row is put into docs/families.json as it is done, and the table is made of that.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import tiny_torch_teacher
import torch
import transformers
from family_models import FAMILIES, IMPLEMENTATIONS, PLAIN, TABLE, VOCAB, plain_model, transformers_model
from torch import Tensor, nn

import tcal_compiler
from tcal_compiler.errors import TcalError
from tcal_compiler.passes.capture import capture_program, example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import from_program
from tcal_compiler.passes.make_stateful import make_stateful
from tcal_compiler.passes.rewrite_gdn import mixer_path
from tcal_compiler.passes.stateful_graph import StatefulGraph
from tcal_compiler.passes.types import Capture, SiteScan
from tcal_compiler.runtime.capture_teacher import capture_teacher
from tcal_compiler.runtime.config import ExportConfig
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.onnx_export import export_onnx
from tcal_compiler.runtime.onnx_parity import check_parity
from tcal_compiler.runtime.student import Student, make_student
from tcal_compiler.runtime.teacher import Teacher, load_teacher

HEAD = """# Families

Made by `python examples/families.py` with tiny untrained models (`examples/family_models.py`): two layers, width 64.
torch {torch}, transformers {transformers}, CPU, float32.

- *cores*: attention modules of the model; every one is found as a site or refused, with how many for which reason.
- `-`: there is nothing to tell, for the reason in *refused, and why*.
- *windows*: visible tokens of the sites that do not see everything.
- *scores*: what the sites do to their scores beside scale and mask.
- *nothing converted*: logits and gradients equal the teacher's, bit for bit.
- *half converted*: every second site is Gated DeltaNet; gradients are finite and not all zero for every parameter of
  the mixers, one step of AdamW on all weights lowers the loss, and the saved student, loaded again, has its logits bit
  for bit and its ties.
- *stateful*: the loaded student as a graph with state; prefill and decode, and chunks of 1, 3, 17 and 100 tokens, equal
  one pass (in float64, within 1e-7 of the largest logit).
- *ONNX*: logits in ONNX Runtime, in chunks and token by token, within 1e-4 of torch's in float64, or no more than
  four times as far from them as torch's own in float32; 24 greedy tokens after each of two prompts are the same.

"""
COLUMNS = ("family", "implementation", "cores", "sites", "windows", "scores", "refused, and why")
COLUMNS += ("nothing converted", "half converted", "stateful", "ONNX")
SHIPPED = Path(tcal_compiler.__file__).parent / "assets" / "tiny" / "teacher.pt2"
IDS = example_ids(2, 21, VOCAB, seed=3)


@dataclass
class Row:
    """One line of the table; what was not reached is empty text with the reason in `refused`."""

    family: str
    implementation: str
    cores: str = "-"
    sites: str = "-"
    windows: str = "-"
    scores: str = "-"
    refused: str = "none"
    same: str = "-"
    half: str = "-"
    stateful: str = "-"
    onnx: str = "-"
    seconds: float = 0.0

    def markdown(self) -> str:
        cells = (self.family, self.implementation, self.cores, self.sites, self.windows, self.scores)
        cells += (self.refused, self.same, self.half, self.stateful, self.onnx)
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def attention_modules(model: nn.Module) -> int:
    """Attention modules that hold no other one, counted by class: another way than the graph's."""
    found = [m for m in model.modules() if re.search(r"Attention$", type(m).__name__)]
    return sum(not any(inner is not m and inner in found for inner in m.modules()) for m in found)


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
        why = ", ".join(own_backwards(AsTeacher(model)(*args))) or f"{len(grads)} and {len(their_grads)} of them"
        return f"logits equal; gradients differ by {wrong:.2g} ({why})"
    return "equal"


def own_backwards(logits: Tensor) -> list[str]:
    """torch.autograd.Functions behind the logits: their hand-written derivatives are not in an exported graph."""
    found, seen, stack = set(), set(), [logits.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [n for n, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found.add(f"the model's own {type(node).__name__} is not its function's derivative to the last bit")
    return sorted(found)


def check_half(student: Student) -> str:
    """Gradients of a half-converted student, and one step of training."""
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
    params = [p.requires_grad_(True) for p in student.gm.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        logits = student.logits(IDS)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        losses.append(loss.item())
        if len(losses) == 1:
            loss.backward()
            optimizer.step()
    if not losses[1] < losses[0]:
        return f"one step takes the loss from {losses[0]:.4g} to {losses[1]:.4g}"
    return f"{len(student.converted)} of {len(student.sites)}"


def saved_and_loaded(student: Student) -> tuple[Capture, str]:
    """The student as it comes back from its .pt2 file, and what is wrong with that, if anything."""
    file = io.BytesIO()
    torch.export.save(student.export(), file)
    file.seek(0)
    program = torch.export.load(file)
    gm = from_program(program)
    flat = capture_program(program, teacher=student.gm, implementation="student", shapes=((2, 24),))
    counts = [sum(p.numel() for p in g.parameters()) for g in (gm, student.gm)]
    return flat, "" if counts[0] <= counts[1] else f"loaded, it has {counts[0]} weights, not {counts[1]}"


def half_converted(capture: Capture, scan: SiteScan) -> Student:
    student = make_student(capture, scan, choose(scan, f"uniform:{len(scan.sites) // 2}"))
    generator = torch.Generator().manual_seed(0)
    for site in student.converted:
        mixer = student.gm.get_submodule(mixer_path(site.index))
        assert isinstance(mixer, GdnMixer)
        naive_(mixer, generator)
    return student


def check_onnx(flat: Capture, stateful: StatefulGraph) -> str:
    """Logits and greedy tokens in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        info = {"context_length": TABLE}
        artifact = export_onnx(stateful, Path(folder), config=ExportConfig(), info=info)
        checks = check_parity(
            artifact,
            stateful,
            whole=lambda ids: flat.gm(*flat.inputs(ids)),
            prompts=[[3, 141, 59], [26]],
            new_tokens=24,
            threads=1,
        )
    if bad := [c for c in checks if not c.passed]:
        return f"{bad[0].name}: {bad[0].measured:.2g} (allowed {bad[0].allowed:.2g}, {bad[0].detail})"
    return f"equal ({max(c.measured for c in checks):.0e})"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split("\n  Try:")[0].split())[:260]


def _refusals(scan: SiteScan) -> str:
    by_reason: dict[str, list[str]] = {}
    for r in scan.rejected:
        by_reason.setdefault(r.reason, []).append(r.layer or r.node)
    return "; ".join(f"{len(where)}: {reason}" for reason, where in by_reason.items()) or "none"


def model_and_teacher(family: str, implementation: str) -> tuple[nn.Module, Teacher]:
    """The model, and the teacher that is captured: the model itself, or a program that another process exported of it.

    Raises ValueError where transformers does not have the implementation for this family.
    """
    if implementation == "file":
        return tiny_torch_teacher.factory(), load_teacher(str(SHIPPED))
    model = plain_model(family) if family in PLAIN else transformers_model(family, implementation)
    return model, Teacher(family, "factory", model, None, None, {"vocab_size": VOCAB, "context_length": TABLE})


def examine(row: Row) -> None:
    """Fills the row with everything that is asked of one model; a typed refusal ends it early and is its reason."""
    try:
        model, teacher = model_and_teacher(row.family, row.implementation)
    except ValueError as e:
        row.refused = f"transformers: {_short(e).split(' yet.')[0]}"
        return
    row.cores = str(attention_modules(model))
    try:
        capture = capture_teacher(teacher)
    except TcalError as e:
        row.sites, row.refused = "0", f"{row.cores}: {_short(e)}"
        return
    scan = find_attention(capture)
    row.sites, row.refused = str(len(scan.sites)), _refusals(scan)
    row.windows = ", ".join(sorted({str(s.window) for s in scan.sites if s.window})) or "none"
    row.scores = ", ".join(sorted({s.scores for s in scan.sites})) or "-"
    if len(scan.sites) + len(scan.rejected) != int(row.cores):
        row.cores += f" (but {len(scan.sites)} + {len(scan.rejected)} were seen)"
    if scan.sites:
        row.same = check_same(model, capture, scan)
        student = half_converted(capture, scan)
        row.half = check_half(student)
        flat, wrong = saved_and_loaded(student)
        row.half = wrong or row.half
        try:
            stateful = make_stateful(flat, max_length=TABLE, check_length=121)
            row.stateful = f"equal ({max(c.measured for c in stateful.checks):.0e})"
            row.onnx = check_onnx(flat, stateful)
        except TcalError as e:
            row.stateful = row.stateful if row.stateful != "-" else _short(e)
            row.onnx = _short(e) if row.stateful.startswith("equal") else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="names of rows; none: all")
    parser.add_argument("--out", type=Path, default=Path("docs/families.md"))
    args = parser.parse_args()
    every = [(f, i) for f in FAMILIES for i in IMPLEMENTATIONS] + [(f, "torch") for f in PLAIN]
    every += [("exported program (.pt2)", "file")]
    if unknown := set(args.families) - {f for f, _ in every}:
        parser.error(f"unknown {sorted(unknown)}; known: {list(dict.fromkeys(f for f, _ in every))}")
    for family, implementation in every:
        if args.families and family not in args.families:
            continue
        start = perf_counter()
        row = Row(family, implementation)
        try:
            examine(row)
        except Exception as e:  # a fault of ours: the table shows it, and the other rows are made all the same
            row.refused = f"FAULT: {type(e).__name__}: {_short(e)}"
        row.seconds = round(perf_counter() - start, 1)
        print(row.markdown(), f"{row.seconds} s", flush=True)
        keep(args.out, row, every)


def keep(out: Path, row: Row, every: list[tuple[str, str]]) -> None:
    """Puts the row into the store and makes the table anew, one process at a time."""
    store = out.with_suffix(".json")
    with store.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = {(r["family"], r["implementation"]): Row(**r) for r in json.loads(file.read() or "[]")}
        rows[row.family, row.implementation] = row
        file.truncate(0)
        file.write(json.dumps([vars(rows[key]) for key in every if key in rows], indent=1) + "\n")
        file.flush()
        write(out, rows, every)


def write(out: Path, rows: dict[tuple[str, str], Row], every: list[tuple[str, str]]) -> None:
    """The table, and what is not in it."""
    text = HEAD.format(torch=torch.__version__, transformers=transformers.__version__)
    text += f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    text += "".join(rows[key].markdown() + "\n" for key in every if key in rows)
    missing = [f"{family} ({how})" for family, how in every if (family, how) not in rows]
    if missing:
        text += f"\nNot run yet: {', '.join(missing)}.\n"
    out.write_text(text)


if __name__ == "__main__":
    main()
