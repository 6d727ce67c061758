"""The sections of a report, each from what the stages recorded; a section whose stage has not run is left out."""

from __future__ import annotations

import math
import shlex
from typing import Any

import tomli_w

from . import plots
from .blocks import Block, Code, Paragraph, Plot, Section, Table
from .conclusion import quality, verdict
from .facts import Facts
from .numbers import fixed, number, size, spread, with_error
from .plots import Scales

REASONS = {
    "uniform": "Layers at even distances, the first one included, stay softmax.",
    "keep=": "The layers that the policy names stay softmax.",
    "kl": "Of several sets of layers the one that leaves the least KL after a short alignment stays softmax; a "
    "layer's score is the KL of the teacher with this layer alone converted.",
    "ar": "The layers without whose attention the teacher's predictions change most stay softmax; a layer's score is "
    "the KL of that change.",
    "greedy": "The layers that help most when they alone stay softmax do so; a layer's score is the mean log "
    "likelihood of a token then.",
    "forward": "Layers stay softmax one by one, each the one that leaves the least KL; its score is the KL left then.",
    "none": "No layer stays softmax.",
    "all": "Every layer stays softmax: the student is the teacher.",
}

MODELS = {  # that are scored beside the teacher
    "naive": "converted layers with fresh values",
    "initialised": "after calibration, before any step of training",
    "aligned": "after alignment, before distillation",
    "student": "the result",
    "no linear": "the student with its converted layers giving 0",
}


def summary(run: Facts, _: Scales) -> list[Block]:
    t, plan = run.manifest.teacher, run.manifest.plan
    kept = sum(s.kept for s in run.layers)
    windows = sorted({s.local for s in run.layers if not s.kept and s.local})
    beside = f", with softmax attention over the last {' or '.join(map(str, windows))} tokens" if windows else ""
    why = next((text for start, text in REASONS.items() if str(plan["policy"]).startswith(start)), "")
    name = t.source.rsplit("/", 1)[-1]
    rows = [
        ["teacher", f"{name} ({t.kind}), vocabulary {t.vocab_size}"],
        ["policy", f"{plan['policy']}. {why}".strip()],
        ["attention layers", f"{kept} stay softmax, {len(run.layers) - kept} become Gated DeltaNet{beside}"],
    ]
    if run.mean_errors:
        before, after = run.mean_errors[:2]
        rows.append(["mean held-out error of a layer", f"{number(before)} before alignment, {number(after)} after"])
    if held := quality(run):
        rows.append(["held-out slice of the calibration text", held])
    if "student" in run.scores:
        base, mine = run.scores["teacher"]["perplexity"], run.scores["student"]
        text = f"{fixed(mine['perplexity'], 2)}, the teacher's is {fixed(base, 2)}; "
        text += f"KL {fixed(mine['kl'], 4)} nats per token"
        rows.append(["perplexity of the student", text])
    last = run.contexts[-1]
    teacher, student = run.memory(last)
    text = f"{size(student)} behind {last} tokens, the teacher's {size(teacher)}"
    rows.append(["state and caches of the student", text])
    held = sum(c["measured"] <= c["allowed"] for _, c in run.checks)
    rows.append(["checks that hold", f"{held} of {len(run.checks)} that the stages made; `tcal verify` makes more"])
    said = verdict(run)
    return [*[Paragraph(said)] * bool(said), Table(["what", "value"], rows)]


def layers(run: Facts, _: Scales) -> list[Block]:
    head = ["layer", "module", "becomes", *(["policy's score"] if run.policy_scores else [])]
    head += ["look-back, tokens", "entropy, nats", "half-life as set, tokens"]
    head += ["half-life after alignment", "error after init", "held-out error before", "held-out error after"]
    rows = []
    for s in run.layers:
        m, e = run.measured.get(s.index, {}), run.held_out.get(s.index, ("", ""))
        row = [str(s.index), s.module, "softmax" if s.kept else "Gated DeltaNet"]
        row += [number(run.policy_scores.get(s.index))] if run.policy_scores else []
        row += [spread(m.get("distance"), 1), spread(m.get("entropy"), 2), spread(m.get("half_life"), 1)]
        row += [spread(run.aligned_half_life.get(s.index), 1), number(m["error"]) if m else ""]
        rows.append([*row, *(number(v) if v != "" else "" for v in e)])
    text = (
        "A to B: smallest and largest over the heads of a layer. Look-back is how many tokens back a head's attention "
        "lies on average, entropy how widely it is spread. Half-life: the tokens after which half of what the state "
        "held is forgotten, at the mean decay over some sequences; closed-form and taylor set it to the look-back. "
        "Errors are mean squared errors of the attention output over its mean square, so that 0 is the teacher's "
        "and 1 that of zeros: after init on the calibration text, held-out on text that was "
        "not trained on."
    )
    blocks: list[Block] = [Paragraph(text), Table(head, rows)]
    if run.policy_scores:
        blocks.append(Plot("Scores of the policy", lambda axes: plots.policy_scores(axes, run)))
    if refused := run.evidence("plan").get("refused"):
        rows = [[r["layer"] or r["node"], r["reason"]] for r in refused]
        blocks += [Paragraph("These cores stay as they are:"), Table(["core", "reason"], rows)]
    return blocks


def attention(run: Facts, scales: Scales) -> list[Block]:
    if not run.measured:
        return []

    def heat(title: str, key: str, limits: tuple[float, float], label: str, log: bool) -> Plot:
        return Plot(title, lambda axes: plots.heat_map(axes, run, key, limits, log=log, label=label))

    dots = " In the plot of half-lives (report.html) each dot is a head; those on the line are as they were set."
    blocks: list[Block] = [
        Paragraph(
            "How far back each head of a converted layer looks and how widely it spreads: the decay and the write "
            "gate are set from these. Layers that stay softmax are not measured."
            + (dots if run.aligned_half_life else "")
        ),
        heat("Mean look-back distance", "distance", scales.distance, "tokens", True),
        heat("Mean entropy of the attention rows", "entropy", scales.entropy, "nats", False),
    ]
    if run.aligned_half_life:
        title = "Half-lives of the heads, as set and after alignment"
        blocks.append(Plot(title, lambda axes: plots.half_lives(axes, run, scales.half_life)))
    return blocks


def alignment(run: Facts, scales: Scales) -> list[Block]:
    if not run.held_out:
        return []
    config: Any = run.manifest.config
    text = (
        f"{run.curve[-1]['step']} steps of {config['align']['batch']} sequences; each layer keeps the weights that "
        "scored best on the held-out text. The whole curve is in alignment.json."
    )
    if (stopped := run.evidence("align").get("stopped_at")) is not None:
        planned = number(run.evidence("align")["steps"])
        text += f" Stopped early at step {number(stopped)} of {planned}: the held-out errors had levelled off."
    return [
        Paragraph(text),
        Plot("Alignment loss of each layer", lambda axes: plots.alignment_loss(axes, run, scales.loss)),
        Plot("Error of each layer before and after alignment", lambda axes: plots.errors(axes, run, scales.loss)),
    ]


def distillation(run: Facts, _: Scales) -> list[Block]:
    if not (curve := run.distillation):
        return []
    best = min(curve, key=lambda p: p["held_out"])
    rows = [
        [name, str(p["step"]), str(p["predictions"]), fixed(p["kl"], 4), fixed(math.exp(p["nll"]), 2)]
        for name, p in (("start", curve[0]), ("kept", best), ("last", curve[-1]))
    ]
    head = ["weights", "step", "predictions trained on", "held-out KL, nats per token", "held-out perplexity"]
    evidence, text = run.evidence("distill"), ""
    if (stopped := evidence.get("stopped_at")) is not None:
        text = (
            f"Stopped early at step {number(stopped)} of {number(evidence['steps'])}: no better held-out score came. "
        )
    if speed := evidence.get("speed"):
        rate, seconds = number(speed["tokens_per_second"]), number(speed["seconds"])
        text += f"{rate} tokens per second over the last {seconds} s of work, scores and checkpoints included. "
        if mfu := speed.get("mfu"):
            text += f"A step took {number(speed['step_seconds'])} s: MFU {mfu:.1%} of {speed['card']}'s bfloat16 peak."
    plot = Plot("Distillation", lambda axes: plots.distillation(axes, run))
    return [Table(head, rows), *[Paragraph(text)] * bool(text), plot]


def scores(run: Facts, scales: Scales) -> list[Block]:
    return _text_scores(run, scales) + _task_scores(run)


def _text_scores(run: Facts, scales: Scales) -> list[Block]:
    if not run.scores:
        return []
    evidence, base = run.evidence("eval"), run.scores["teacher"]["perplexity"]
    rows = [
        [
            name,
            fixed(r["perplexity"], 2),
            fixed(r["perplexity"] / base, 3),
            with_error(r["kl"], r["kl_stderr"], 4),
        ]
        for name, r in run.scores.items()
    ]
    text = f"On {evidence['text']}: {evidence['sequences']} sequences of {evidence['length']} tokens. "
    text += " ".join(f"{name}: {what}." for name, what in MODELS.items() if name in run.scores)
    text += " The KL is 0 where a model predicts as the teacher does; behind ±: its standard error."
    return [
        Paragraph(text),
        Table(["model", "perplexity", "ratio to teacher", "KL(teacher, model), nats per token"], rows),
        Plot("Divergence from the teacher", lambda axes: plots.divergence(axes, run, scales.kl)),
    ]


def _task_scores(run: Facts) -> list[Block]:
    if not run.task_scores:
        return []
    rows = [
        [
            s["task"],
            s["metric"],
            name,
            str(s["examples"]),
            with_error(s["value"], s["stderr"], 4),
            with_error(s["change"], s["change_stderr"], 4),
            "" if s["chance"] is None else number(s["chance"], 3),
        ]
        for name, scores in run.task_scores.items()
        for s in scores
    ]
    files = ", ".join(run.evidence("eval-tasks")["files"])
    text = f"Tasks made from {files}; behind ±: standard errors, of the difference example by example."
    head = ["task", "metric", "model", "examples", "value", "value minus the teacher's", "chance"]
    return [Paragraph(text), Table(head, sorted(rows, key=lambda r: (r[0] == "average", r[:2])))]


def memory(run: Facts, scales: Scales) -> list[Block]:
    rows = []
    for n in run.contexts:
        teacher, student = run.memory(n)
        rows.append([str(n), size(teacher), size(student), f"{student / teacher:.3f}" if teacher else "-"])
    text = (
        "Bytes kept between two tokens of one sequence, float32 as exported: keys and values of every earlier token "
        "in a softmax layer, one matrix per head in a Gated DeltaNet layer. Computed from shapes, not measured."
    )
    if any(s.local for s in run.layers if not s.kept):
        text += " Where a Gated DeltaNet layer attends to its last tokens, their keys and values count with it."
    return [
        Paragraph(text),
        Table(["tokens", "teacher", "student", "student over teacher"], rows),
        Plot("State and cache memory", lambda axes: plots.memory(axes, run, scales.bytes)),
    ]


def speed(run: Facts, _: Scales) -> list[Block]:
    if not (found := run.evidence("export").get("speed")) or not found["rows"]:
        return []
    head = ["tokens before", "prefill, tokens per second", "one more token, ms", "tokens per second"]
    rows = [
        [
            str(r["context"]),
            fixed(r["prefill_tokens_per_second"], 0),
            fixed(1e3 * r["decode_seconds"], 2),
            fixed(1 / r["decode_seconds"], 1),
        ]
        for r in found["rows"]
    ]
    text = (
        f"The ONNX student in ONNX Runtime, one sequence, when it was exported, on a machine of {found['cpus']} CPUs: "
        "few runs each, so that other work on the machine shows in them."
    )
    return [Paragraph(text), Table(head, rows)]


def checks(run: Facts, _: Scales) -> list[Block]:
    rows = []
    for stage, c in run.checks:
        holds = "yes" if c["measured"] <= c["allowed"] else "NO"
        rows.append([stage, c["name"], number(c["measured"], 3), number(c["allowed"], 3), holds, c["detail"]])
    told = (
        "allowed is the largest value that passes. Capture: logits of the graph that was taken from the model, against "
        "the model's own, for B sequences of T tokens. Chunks: a text read in pieces of these lengths, with the state "
        "between them, against one pass. ONNX: logits in ONNX Runtime against PyTorch's; greedy tokens: how many of "
        "the likeliest next tokens differ. `tcal verify` repeats these and more."
    )
    return [Paragraph(told), Table(["stage", "check", "measured", "allowed", "holds", "detail"], rows)]


def stages(run: Facts, _: Scales) -> list[Block]:
    complete = [(n, s) for n, s in run.manifest.stages.items() if n != "report"]
    rows = [[n, f"{s.seconds:.1f}", str(run.evidence(n).get("device", "")), s.finished_at] for n, s in complete]
    for row in rows:
        if earlier := run.manifest.made_before(row[0]):
            row[3] += f", before {earlier} was made anew: not shown"
    return [Table(["stage", "seconds", "device", "finished"], rows)]


def configuration(run: Facts) -> str:
    """The run's configuration as a file for --config: every key, so that later defaults do not matter."""

    def known(body: dict[str, Any]) -> dict[str, Any]:
        found = {k: known(v) if isinstance(v, dict) else v for k, v in body.items() if v is not None}
        return {k: v for k, v in found.items() if v != {}}

    return tomli_w.dumps(known(dict(run.manifest.config)))


def commands(run: Facts) -> str:
    """The commands that make this run again, with the configuration as tcal.toml beside its plan.toml."""
    t, evidence = run.manifest.teacher, run.evidence("plan")
    words = ["tcal-compile", t.source, "--config tcal.toml --plan plan.toml"]
    if evidence["info"].get("tokenizer") == "bytes":
        words.append("--tokenizer bytes")
    elif t.kind in ("program", "factory", "pickle") and evidence.get("tokenizer_dir"):
        words.append(f"--tokenizer {evidence['tokenizer_dir']}")
    if t.kind == "pickle":
        words.append("--allow-pickle")
    if (device := run.evidence("calibrate").get("device", "cpu")) != "cpu":
        words.append(f"--device {device}")
    lines = [" ".join([*words, "-o again"])]
    if score := run.evidence("eval"):
        text = shlex.quote(score.get("path", score["text"]))
        lines.append(f"tcal eval again --text {text} --length {score['length']} --sequences {score['sequences']}")
    return "\n".join([*lines, "tcal verify again"])


def reproduction(run: Facts, _: Scales) -> list[Block]:
    return [
        Paragraph("With plan.toml of this run folder and the lines below as tcal.toml:"),
        Code(commands(run)),
        Code(configuration(run)),
    ]


def versions(run: Facts, _: Scales) -> list[Block]:
    m = run.manifest
    rows = [["tcal-compile", m.tcal_version], *([k, v] for k, v in m.versions.items())]
    texts: Any = run.evidence("calibrate").get("text", {})
    hashes = [["teacher's weights and code", m.teacher.fingerprint]]
    hashes += [[f"calibration text {name}", value] for name, value in texts.items()]
    hashes += [[f, sha] for n, s in m.stages.items() if n != "report" for f, sha in s.files.items()]
    return [Table(["program", "version"], rows), Table(["what", "sha256"], hashes)]


SECTIONS = {
    "Summary": summary,
    "Layers": layers,
    "Attention of the teacher": attention,
    "Alignment": alignment,
    "Distillation": distillation,
    "Perplexity": scores,
    "Memory": memory,
    "Speed": speed,
    "Checks": checks,
    "Stages": stages,
    "To do it again": reproduction,
    "Versions and hashes": versions,
}


def sections(run: Facts, scales: Scales) -> list[Section]:
    made = [Section(title, make(run, scales)) for title, make in SECTIONS.items()]
    return [s for s in made if s.blocks]
