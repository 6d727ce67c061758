"""Tables of docs/results.md about exported models: their speed, variants, runtimes and tokens."""

from __future__ import annotations

from typing import Any


def machine(env: dict[str, Any]) -> str:
    return "Machine: " + ", ".join(f"{k} {v}" for k, v in env.items() if v is not None) + "."


def decode(name: str, body: dict[str, Any]) -> str:
    lines = [f"## {name}\n", machine(body["environment"]), f"Medians of {body['steps']} single-token steps.", ""]
    lines += [
        "| model | context | median ms | 10% to 90% | against the first | against the first context (quartiles) "
        "| state, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, rows in body["decode"].items():
        for context, r in rows.items():
            cells = [model, context, f"{r['median_ms']:.2f}", f"{r['p10_ms']:.2f} to {r['p90_ms']:.2f}"]
            turns = [r[k] for k in (f"over_first_context{q}" for q in ("", "_p25", "_p75")) if k in r]
            flat = "{:.3f} ({:.3f} to {:.3f})".format(*turns) if turns else ""
            cells += [f"{r['speedup_over_first']:.2f}x", flat, f"{r['state_mb']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    for model, kinds in body.get("operators", {}).items():
        spent = ", ".join(f"{k} {r['ms']:.2f} ({r['nodes']})" for k, r in kinds.items() if r["ms"] >= 0.05)
        lines.append(f"\nA step of {model} under the profiler, ms of each operator and its nodes: {spent}.")
    return "\n".join([*lines, *([f"\n{body['note']}"] if "note" in body else []), ""])


def variants(name: str, body: dict[str, Any]) -> str:
    before, after = body["bandwidth_gb_s"]
    lines = [f"## {name}\n", machine(body["environment"])]
    lines[-1] += f" One thread reads {before:.1f} GB/s (measured before) and {after:.1f} GB/s (after)."
    lines += [f"Divergence and perplexity on {body['text']}, against the float32 student of the same run.", ""]
    lines += ["| student | size, MB | KL, nats per token | perplexity | tokens |", "|---|---|---|---|---|"]
    for student, r in body["variants"].items():
        cells = [student, f"{r['size_mb']:.1f}", f"{r['kl']:.3g}", f"{r['perplexity']:.2f}", str(r["tokens"])]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Medians of {body['steps']} single-token steps; the bound is the time to read what a step moves.",
        "",
    ]
    lines += [
        "| student | context | median ms | tokens/s | against the first | moved, MB | bound, ms | share of the bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for student, rows in body["variant_decode"].items():
        for context, r in rows.items():
            cells = [student, context, f"{r['median_ms']:.2f}", f"{r['tokens_per_s']:.1f}"]
            cells += [f"{r['speedup_over_first']:.2f}x", f"{r['moved_mb']:.1f}", f"{r['bound_ms']:.2f}"]
            lines.append("| " + " | ".join([*cells, f"{r['share_of_bound']:.2f}"]) + " |")
    return "\n".join([*lines, *([f"\n{body['note']}"] if "note" in body else []), ""])


def runtimes(name: str, body: dict[str, Any]) -> str:
    lines = [f"## {name}\n", machine(body["environment"]), ""]
    lines += [
        "| student | kept, converted | profile | ONNX Runtime | largest logit error | allowed | tokens that differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for student, r in body["runtime_parity"].items():
        for row in r["runtimes"]:
            cells = [student, f"{r['layers_kept']}, {r['layers_converted']}", r["profile"], row["onnxruntime"]]
            seen = [row.get("error", ""), "", ""]
            if "logit_error" in row:
                seen[:2] = f"{row['logit_error']:.2g}", f"{r['allowed']:.2g}"
            if "tokens_that_differ" in row:
                margin = f", least margin {r['smallest_margin']:.2g}" if "smallest_margin" in r else ""
                seen[2] = f"{row['tokens_that_differ']} of {r['tokens']} ({r['distinct_tokens']} distinct{margin})"
            lines.append("| " + " | ".join([*cells, *seen]) + " |")
    return "\n".join([*lines, *([f"\n{body['note']}"] if "note" in body else []), ""])


def serving(name: str, body: dict[str, Any]) -> str:
    speeds = [r["read_gb_s"] for r in body["serving"] if "read_gb_s" in r]
    lines = [f"## {name}\n", machine(body["environment"])]
    if "provider" in body["environment"]:
        lines[-1] += f" The card copies {speeds[0]:.0f} GB/s, read and written; peak memory is what all of it holds."
    else:
        lines[-1] += f" One thread reads {min(speeds):.1f} to {max(speeds):.1f} GB/s, measured behind each row."
    lines[-1] += " The bound of a row is the time for the bytes that a step reads."
    lines += [
        f"Medians of {body['steps']} single-token steps; prefill of {body['chunk']} tokens up to the context.",
        "",
    ]
    lines += [
        "| model | batch | context | prefill, tokens/s | decode, tokens/s | ms a step | bound, ms | share of it "
        "| peak, MB | state, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    shapes = {"prefill_tokens_per_s": ".1f", "decode_tokens_per_s": ".1f", "decode_ms": ".2f", "bound_ms": ".2f"}
    shapes |= {"share_of_bound": ".0%", "peak_mb": ".0f", "state_mb": ".2f"}
    for r in body["serving"]:
        seen = [format(r[k], f) if k in r else "" for k, f in shapes.items()]
        cells = [r["name"], str(r["batch"]), str(r["context"]), *([r["error"]] if "error" in r else seen)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *([f"\n{body['note']}"] if "note" in body else []), ""])


def step_parts(name: str, body: dict[str, Any]) -> str:
    """examples/profile_step.py."""
    before, after = body["read_gb_s"]
    lines = [f"## {name}\n", machine(body["environment"])]
    lines[-1] += f" One thread reads {before:.1f} GB/s (measured before) and {after:.1f} GB/s (after)."
    lines += [
        "A step without the profiler; with it, milliseconds of its parts (nodes; GB/s of what they read).",
        "",
    ]
    names = list(body["step_parts"][0]["parts"])
    lines += [f"| student | context | ms | moved, MB | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for r in body["step_parts"]:
        cells = [r["name"], str(r["context"]), f"{r['step_ms']:.2f}", f"{r['moved_mb']:.1f}"]
        for p in r["parts"].values():
            speed = f"; {p['mb'] / p['ms']:.1f}" if p["mb"] else ""
            cells.append(f"{p['ms']:.2f} ({p['nodes']}{speed})" if p["nodes"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    if body["alone"]:
        lines += ["", "Single operators, each in a model of its own:", "", "| operator | us | GB/s |", "|---|---|---|"]
    lines += [f"| {r['name']} | {r['us']:.1f} | {r['gb_s']:.1f} |" for r in body["alone"]]
    return "\n".join([*lines, *([f"\n{body['note']}"] if "note" in body else []), ""])


def _greedy(body: dict[str, Any]) -> str:
    if "greedy" not in body:
        return ""
    g = body["greedy"]
    text = f" Of {g['tokens']} greedy tokens behind {g['prompts']} prompts {g['same']} were that student's, "
    return text + f"counted up to the first other one; there its logits were {g['margin']:.2g} apart at most."


def fused(name: str, body: dict[str, Any]) -> str:
    """examples/fused_step.py."""
    lines = [f"## {name}\n", machine(body["environment"])]
    lines += [f"A step behind {body['context']} tokens; each row has the rewrites above it too.", ""]
    lines += ["| student | rewrite | nodes | ms |", "|---|---|---|---|"]
    for student, rows in body["fused"].items():
        lines += [f"| {student} | {r['name']} | {r['nodes']} | {r['ms']:.2f} |" for r in rows]
    return "\n".join([*lines, *([f"\n{body['note']}"] if "note" in body else []), ""])


def on_device(name: str, body: dict[str, Any]) -> str:
    """examples/check_cuda.py."""
    nodes = {p.removesuffix("ExecutionProvider"): sum(ops.values()) for p, ops in body["nodes"].items()}
    lines = [
        f"## {name}\n",
        machine(body["environment"]),
        f"Profile cuda in ONNX Runtime {body['onnxruntime']} by `examples/check_cuda.py`, one sequence; "
        "nodes of a step: "
        + ", ".join(f"{n} on {p}" for p, n in nodes.items())
        + f". KL to the float32 student on the CPU {body['kl']:.1e} nats per token.{_greedy(body)}\n",
        "| tokens before | prefill, tokens per second | one more token, ms |",
        "|---|---|---|",
    ]
    for context, row in body["contexts"].items():
        lines.append(f"| {context} | {row['prefill_tokens_per_s']:.0f} | {row['decode_ms']:.2f} |")
    return "\n".join([*lines, ""])


def training_rates(name: str, body: dict[str, Any]) -> str:
    a = body["arguments"]
    (policy, kept), texts = next(iter(body["kept"].items())), list(next(iter(body["scores"].values())))
    lines = [f"## {name}\n", f"Teacher {a['teacher']}, {policy}, which keeps {', '.join(map(str, kept)) or 'none'};"]
    lines[-1] += f" local_window {a['local_window']}; {a['sequences']} x {a['length']} tokens of {a['calib']}, of which"
    lines[-1] += f" {a['init_sequences'] or a['sequences']} sequences initialise, and {a['holdout']} more held out;"
    lines[-1] += (
        f" {a['steps']} steps of alignment with {a['batch']} sequences, {a['distill_steps']} of distillation with"
    )
    lines[-1] += (
        f" {a['distill_batch'] or a['batch']}, from the aligned student of the least held-out KL; seed {a['seed']}."
    )
    lines += [machine(body["environment"]), ""]
    heads = ["student", "mean held-out error of sites", "held-out KL", "s", *(f"{t}: perplexity, KL" for t in texts)]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for stage, prefix in (("alignment", "near_error "), ("distillation", "rates ")):
        for key, row in body[stage].items():
            label = key if key == "start" else prefix + key
            student = {"start": "start"}.get(key, f"{'aligned' if stage == 'alignment' else 'distilled'}, {label}")
            cells = [f"{row['error']:.4f}" if "error" in row else "", f"{row['kl']:.4f}"]
            cells += [f"{row['seconds']:.1f}" if "seconds" in row else ""]
            cells += ["{ratio:.4f}, {kl:.4f} ± {kl_stderr:.4f}".format(**body["scores"][student][t]) for t in texts]
            lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join([*lines, "", *([body["note"], ""] if "note" in body else [])])
