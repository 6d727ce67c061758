"""A walk through the passes on a model of two layers, cell by cell: what goes in, what comes out.

python examples/walk_the_passes.py      # or open it as a notebook: cells begin with # %%
"""

# %% A causal model in plain PyTorch, with random weights
from pathlib import Path

import torch

import tcal_compiler
from examples.tiny_torch_teacher import TinyTeacher
from tcal_compiler.passes.capture import capture_program
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.make_stateful import make_stateful, run_chunks
from tcal_compiler.runtime.align import align
from tcal_compiler.runtime.calibrate import initialise
from tcal_compiler.runtime.config import AlignConfig
from tcal_compiler.runtime.live import capture_live
from tcal_compiler.runtime.student import make_student
from tcal_compiler.runtime.taps import collect_taps

torch.manual_seed(0)
teacher = TinyTeacher(layers=2).eval()
text = (Path(tcal_compiler.__file__).parent / "assets/text/calibration.txt").read_bytes()
ids = torch.tensor(list(text[: 36 * 64])).view(36, 64)  # tokens are bytes

# %% Capture: one graph of aten operators, equal to the model bit for bit at several shapes
capture = capture_live(teacher)
print(len(capture.gm.graph.nodes), "nodes;", "; ".join(c.name for c in capture.checks))

# %% Match: every attention core, with what was proved about it
scan = find_attention(capture)
for site in scan.sites:
    print(site.index, site.layer, f"q = {site.q}, k = {site.k}, v = {site.v}, x = {site.x}, y = {site.y}")

# %% Choose: layer 0 stays softmax
plan = choose(scan, "keep=0")
print("keep", plan.keep, "convert", plan.convert)

# %% Rewrite: the core becomes a mixer, everything around it stays
student = make_student(capture, scan, plan)
print([str(n.target) for n in student.gm.graph.nodes if n.op == "call_module"])

# %% Statistics and initial values, without a gradient step; the last four sequences are held out
groups = collect_taps(student, capture.gm, ids, batch=4)
student, reports = initialise(student, groups, init="closed-form", seed=0, batch=4)
for r in reports:
    print(f"layer {r.index}: look-back {[round(d, 1) for d in r.distance]} tokens, error {r.error:.3f}")

# %% Alignment: the converted layer learns the teacher's output from the teacher's input
student, curve = align(student, groups, train=32, config=AlignConfig(steps=20, score_every=10), seed=0)
for point in curve:
    print(f"step {point['step']}: held-out error {point['held_out']}")

# %% State: the same student as one graph for prefill and decode
program = student.export()
flat = capture_program(program, teacher=program.module(), implementation="student", shapes=((1, 8),))
stateful = make_stateful(flat)
print(", ".join(stateful.input_names))

# %% Any cut of a text gives the logits of one pass
whole = student.logits(ids[:1])
chunks, state = run_chunks(stateful, ids[:1], (40, 1, 1, 22), dtype=torch.float32)
print(f"largest difference {(whole - chunks).abs().max().item():.1e} of logits up to {whole.abs().max().item():.1f}")
