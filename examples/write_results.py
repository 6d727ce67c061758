"""Writes docs/results.md from the JSON files that the measuring scripts left in docs/results/.

python examples/write_results.py docs/results --out docs/results.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

from export_tables import decode, fused, machine, on_device, runtimes, serving, step_parts, training_rates, variants

HEAD = """# Measured results

Made by `examples/write_results.py` from docs/results/*.json, which `examples/measure_conversion.py`,
`examples/bench_onnx.py`, `examples/bench_variants.py`, `examples/bench_serving.py`, `examples/profile_step.py`,
`examples/fused_step.py`, `examples/verify_runtimes.py`, `examples/measure_dry_run.py`, `examples/time_planning.py`,
`examples/estimate_conversion.py`, `examples/rank_sets.py`, `examples/copying_layers.py`, `examples/site_variants.py`,
`examples/training_rates.py` and, from run folders, this script itself wrote. Each section names its command's
arguments, machine, versions and commit. Students have attention over the last tokens beside their states
(`local_window`) only where a section says so. Ratios are to the teacher in the same run. Calibration texts and scored
texts are different files, and a scored text that was calibrated on is refused.
"""


def conversion(name: str, body: dict[str, Any]) -> str:
    a, env = body["arguments"], body["environment"]
    lines = [
        f"## {name}\n",
        f"Teacher {a['teacher']}, {_policies(a)}; calibrated on {a['sequences']} x {a['length']}",
    ]
    lines[-1] += f" tokens of {a['calib']}, {a['holdout']} more sequences choose the weights;"
    lines[-1] += f" batch {a['batch']}, {_seeds(a)}."
    if a.get("init_sequences"):
        lines[-1] += f" The initialisation used {a['init_sequences']} of them."
    if a["steps"]:
        rates = f"{a['lr_new'] or 'default'} for gates, {a['lr_teacher_used'] or 'default'} for the projections"
        if len(a["lr_teacher"]) > 1:
            rates += f", which had the least error on them of {a['lr_teacher']}"
        lines[-1] += f" Alignment: rates {rates}; weight decay {a.get('weight_decay') or 'default'}."
    if a.get("distill_batch"):
        rates = f"{a['distill_lr_gdn'] or 'default'} at converted sites, {a['distill_lr_other'] or 'default'} elsewhere"
        lines[-1] += f" Distillation: {a['distill_batch']} sequences a step, rates {rates}."
    lines += ["Behind each text: the length of its sequences.", machine(env), ""]
    if "kept" in body and len(body["kept"]) > 1:
        lines += [f"Kept by {policy}: {', '.join(map(str, keep))}.  " for policy, keep in body["kept"].items()] + [""]
    lines += _site_variants(body.get("site_variants", {})) + _texts(body["scores"]) + _tasks(body.get("tasks", {}))
    lines += _candidates(body.get("candidates", {}), a)
    seconds = ", ".join(f"{k} {v}" for k, v in body["seconds"].items())
    if aligned := body.get("seconds_to_aligned"):
        seconds += ". From loaded teacher to aligned student: " + ", ".join(f"{n} {s}" for n, s in aligned.items())
    return "\n".join([*lines, "", " ".join([f"Seconds: {seconds}.", body.get("note", "")]).rstrip(), ""])


def _site_variants(rows: dict[str, Any]) -> list[str]:
    """Errors of sites on held-out calibration sequences, and what a site has beyond the product's."""
    if not rows:
        return []
    lines = ["| variant | mean error of sites, start | aligned | bytes of state more | parameters more | seconds |"]
    lines.append("|---" * 6 + "|")
    for name, r in rows.items():
        cells = [f"{r['mean_start']:.4f}", f"{r['mean_aligned']:.4f}"]
        cells += [f"{r['extra_state_bytes']:+d}", f"{r['extra_parameters']:+d}", f"{r['align_seconds']:.1f}"]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return [*lines, ""]


def _candidates(candidates: dict[str, Any], a: dict[str, Any]) -> list[str]:
    """The sets that kl chose among."""
    if not candidates:
        return []
    steps = list(next(iter(candidates.values()))[0]["kl"])
    lines = ["\nCandidate sets of kl on held-out sequences, after so many steps of alignment of every site; chosen by "]
    asked = a.get("score_distill_steps")
    lines[0] += f"that after {a['score_align_steps']}{f'+{asked[0]}' if asked else ''}."
    if asked:
        lines[0] += " Behind +: steps of distillation of each set, and behind / those of warm-up, else a third at most."
    lines[0] += "\n"
    head = ["policy", "rule", "kept", f"KL after {steps[0]} steps", *(f"after {n} steps" for n in steps[1:])]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for policy, rows in candidates.items():
        for r in rows:
            kls = [f"{r['kl'][n]:.4f}" if n in r["kl"] else "" for n in steps]
            lines.append("| " + " | ".join([policy, r["rule"], ", ".join(map(str, r["keep"])), *kls]) + " |")
    return lines


def _policies(a: dict[str, Any]) -> str:
    given = [a["policy"]] if isinstance(a["policy"], str) else a["policy"]
    return f"polic{'y' if len(given) == 1 else 'ies'} {', '.join(given)}"


def _seeds(a: dict[str, Any]) -> str:
    seeds = a.get("seeds", [a.get("seed")])
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _texts(scores: dict[str, Any]) -> list[str]:
    lines = [
        "| student | text | tokens | perplexity | teacher | ratio | KL, nats per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for student, texts in scores.items():
        for text, r in texts.items():
            cells = [
                student,
                text,
                str(r["tokens"]),
                f"{r['perplexity']:.2f}",
                f"{r['teacher']:.2f}",
                f"{r['ratio']:.3f}",
            ]
            lines.append("| " + " | ".join([*cells, f"{r['kl']:.4f} ± {r['kl_stderr']:.4f}"]) + " |")
    return lines


def _tasks(tasks: dict[str, Any]) -> list[str]:
    """One row for each task, metric and model: shares in per cent, nll in nats."""
    if not tasks:
        return []
    lines = ["", "Tasks (docs/method.md); behind ±: standard errors, of the difference example by example.", ""]
    lines += [
        "| task | metric | model | examples | value | against the teacher | chance |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [(s["task"], s["metric"], model, s) for model, scores in tasks.items() for s in scores]
    order = list(dict.fromkeys((task, metric) for task, metric, *_ in rows))
    for task, metric, model, s in sorted(rows, key=lambda r: order.index(r[:2])):
        unit, digits = (1, 3) if metric == "nll" else (100, 1)
        pairs = (s["value"], s["stderr"]), (s["change"], s["change_stderr"])
        shown = [f"{unit * float(x):.{digits}f} ± {unit * float(error):.{digits}f}" for x, error in pairs]
        chance = "" if s["chance"] is None else f"{unit * s['chance']:.3g}"
        cells = [task, metric, model, str(s["examples"]), shown[0], "" if model == "teacher" else shown[1], chance]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def run_folder(name: str, body: dict[str, Any]) -> str:
    calib, align, e = body["config"]["calib"], body["config"]["align"], body.get("eval")
    lines = [f"## {name}\n", f"Teacher {body['teacher']}, policy {body['policy']}, by tcal-compile and tcal eval;"]
    lines[-1] += f" calibrated on {calib['sequences']} x {calib['length']} tokens of {body['calibrated_on']},"
    lines[-1] += f" with a share of {calib['repeats']:g} repeated," if calib.get("repeats") else ""
    if window := body["config"].get("local_window", 0):
        lines[-1] += f" with attention over the last {window} tokens beside the states,"
    lines[-1] += f" {body['config']['init']},"
    lines[-1] += f" aligned for {align['steps']} steps of {align['batch']} sequences, seed {body['config']['seed']}."
    if d := body.get("distill"):
        lines.append(_distilled(d, body["config"]["distill"]))
    if e:
        lines.append(f"Scored on {e['text']}: {e['sequences']} sequences of {e['length']} tokens.")
    lines += [machine(body["environment"]), ""]
    times = ", ".join(f"{k} {v}" for k, v in body["seconds"].items())
    seconds = " ".join([*([f"Seconds of each stage: {times}."] if times else []), body.get("note", "")]).rstrip()
    if e:
        lines += ["| model | perplexity | ratio | KL, nats per token |", "|---|---|---|---|"]
        base = e["results"]["teacher"]["perplexity"]
        for model, r in e["results"].items():
            cells = [model, f"{r['perplexity']:.2f}", f"{r['perplexity'] / base:.3f}"]
            lines.append("| " + " | ".join([*cells, f"{r['kl']:.4f} ± {r['kl_stderr']:.4f}"]) + " |")
    lines += _tasks(body.get("eval-tasks", {}).get("results", {}))
    return "\n".join([*lines, *[""] * lines[-1].startswith("|"), seconds, ""])


def _distilled(d: dict[str, Any], config: dict[str, Any]) -> str:
    first, last, speed = d["curve"][0], d["curve"][-1], d["speed"]
    return (
        f"Distilled for {d['steps']} steps of {config['batch']} sequences, rates {config['lr_gdn']:g} at converted "
        f"sites and {config['lr_other']:g} elsewhere{_short(config)}, by {d['processes']} process(es): "
        f"{speed['tokens']} tokens in {speed['seconds']:.0f} s, {speed['tokens_per_second']:.0f} a second"
        f"{_mfu(speed)}; KL on the held-out calibration sequences {first['kl']:.4f} before, {last['kl']:.4f} after."
    )


def _short(config: dict[str, Any]) -> str:
    length = config.get("short_length")
    return f", a share of {config['short_share']:g} of the steps in pieces of {length} tokens" if length else ""


def _mfu(speed: dict[str, Any]) -> str:
    return f", {speed['step_seconds']} s a step (MFU {speed['mfu']:.1%})" if speed.get("mfu") else ""


def gpus(name: str, body: dict[str, Any]) -> str:
    """Distillation records of run folders that differ in their processes alone."""
    c, first = body["config"], next(iter(body["gpus"].values()))
    tokens = c["batch"] * c["length"]
    lines = [
        f"## {name}\n",
        f"Teacher {body['teacher']}; {first['steps']} steps of distillation with {c['batch']} x {c['length']} tokens "
        f"of {body['calibrated_on']}, rates {c['lr_gdn']:g} at converted sites and {c['lr_other']:g} elsewhere.",
        machine(body["environment"]),
        "",
        "| run | KL on held-out sequences before | after | median step, s | tokens a second of it | over the first "
        "| tokens a second of all steps | peak memory of a process, GB |",
        "|---" * 8 + "|",
    ]
    for run, e in body["gpus"].items():
        speed = e["speed"]
        cells = [run, *(f"{e['curve'][i]['kl']:.5f}" for i in (0, -1)), f"{speed['step_seconds']:.4f}"]
        cells += [
            f"{tokens / speed['step_seconds']:.0f}",
            f"{first['speed']['step_seconds'] / speed['step_seconds']:.2f}",
        ]
        cells += [f"{speed['tokens_per_second']:.0f}", f"{max(e['peak_memory']) / 1e9:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", body["note"], ""])


def copying(name: str, body: dict[str, Any]) -> str:
    """examples/copying_layers.py."""
    a, seen, base = body["arguments"], body["predictions"], body["teacher_nll"]
    lines = [
        f"## {name}\n",
        f"Teacher {a['teacher']}, {a['sequences']} x {a['length']} tokens of {a['calib']}, a share of {a['share']:g} "
        f"repeated, by `examples/copying_layers.py`: KL when one layer's attention is bypassed, nats per token, on "
        f"{seen['fresh']} fresh and {seen['repeated']} repeated tokens, and what their negative log likelihood rises "
        f"by (teacher: {base['fresh']:.3f} on fresh, {base['repeated']:.3f} on repeated ones).",
        machine(body["environment"]),
        "",
        "| site | KL, fresh | KL, repeated | NLL, repeated |",
        "|---|---|---|---|",
    ]
    for row in body["copying"]:
        cells = [f"{row['fresh_kl']:.3f}", f"{row['repeated_kl']:.3f}", f"{row['repeated_nll']:+.3f}"]
        lines.append("| " + " | ".join([str(row["site"]), *cells]) + " |")
    return "\n".join([*lines, ""])


def dry_runs(name: str, body: dict[str, Any]) -> str:
    lines = [f"## {name}\n", machine(body["environment"])]
    for model, run in body["dry_runs"].items():
        lines += [f"\n{model}: `{run['command']}`; the dry run took {run['dry_run_seconds']:.0f} s. Said / measured:\n"]
        lines += ["| stage | time, s | CPU time, s | peak memory, MB |", "|---|---|---|---|"]
        for stage, row in run["stages"].items():
            cells = [_said_seen(row[c], 1) for c in ("seconds", "cpu_seconds")]
            lines.append("| " + " | ".join([stage, *cells, _said_seen(row["peak_bytes"], 1e6)]) + " |")
    note = body.get("note")
    return "\n".join([*lines, *([f"\n{note}"] if note else []), ""])


def _said_seen(pair: list[float], unit: float) -> str:
    """With the error in per cent, where what was measured is not next to nothing."""
    said, seen = (v / unit for v in pair)
    return f"{said:.1f} / {seen:.1f}" + (f" ({100 * (said / seen - 1):+.0f}%)" if seen >= 1 else "")


def memory(name: str, body: dict[str, Any]) -> str:
    lines = [f"## {name}\n", machine(body["environment"])]
    lines += ["Peak memory of each stage in MB: what `tcal inspect --memory` says of the configuration / measured."]
    for model, run in body["memory"].items():
        lines += [f"\n{model}, {run['parameters'] / 1e6:.0f} million weights: `{run['command']}`\n"]
        lines += ["| " + " | ".join(run["stages"]) + " |", "|---" * len(run["stages"]) + "|"]
        cells = [_said_seen(row["peak_bytes"], 1e6) for row in run["stages"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    if note := body.get("note"):
        lines.append(f"\n{note}")
    return "\n".join([*lines, ""])


def planning(name: str, body: dict[str, Any]) -> str:
    """examples/time_planning.py."""
    lines = [f"## {name}\n", machine(body["environment"]), "Seconds from a teacher's file to its plan:\n"]
    lines += ["| teacher | load | capture | match | plan | in all |", "|---|---|---|---|---|---|"]
    for teacher, row in body["planning"].items():
        cells = [f"{row[part]:.2f}" for part in ("load", "capture", "match", "plan")]
        lines.append("| " + " | ".join([teacher, *cells, f"{sum(row.values()):.1f}"]) + " |")
    seen = (f"{row['billions']} billion weights in {row['seconds']:.0f} s" for row in body["inspect_memory"].values())
    return "\n".join([*lines, f"\n`tcal inspect --memory` of a configuration alone: {', '.join(seen)}.", ""])


def step_times(name: str, body: dict[str, Any]) -> str:
    """examples/check_step_seconds.py."""
    lines = [f"## {name}\n", machine(body["environment"])]
    lines += [
        "Milliseconds of a decode step: of the cores as a budget of time counts them, and of the whole step, the "
    ]
    lines[-1] += (
        "least and the largest of what was measured again; and what each is beyond the first run's, of medians.\n"
    )
    lines += ["| tokens before | run | kept | cores | whole step | cores beyond | step beyond |", "|---" * 7 + "|"]
    for tokens, runs in body["step_seconds"].items():
        first = next(iter(runs.values()))
        for run, row in runs.items():
            ranges = [f"{min(row[k]):.2f} to {max(row[k]):.2f}" for k in ("cores_ms", "step_ms")]
            beyond = [f"{median(row[k]) - median(first[k]):.2f}" for k in ("cores_ms", "step_ms")]
            lines.append("| " + " | ".join([tokens, run, str(row["kept"]), *ranges, *beyond]) + " |")
    return "\n".join([*lines, ""])


def estimate(name: str, body: dict[str, Any]) -> str:
    """examples/estimate_conversion.py: what was not measured, from what was."""
    calib, align, distill = body["calib"], body["align"], body["distill"]
    kept = calib["init_sequences"] or calib["sequences"]
    lines = [
        f"## {name}\n",
        f"Not measured: {body['estimate']}, {body['parameters'] / 1e9:.2f} billion weights, {body['converted']} layers "
        f"converted and {body['kept']} kept, by `examples/estimate_conversion.py`. Start from {kept} x "
        f"{calib['length']} tokens; {align['steps']} steps of alignment with {align['batch']} sequences; "
        f"{distill['steps']} steps of distillation with {distill['batch']}, that is "
        f"{distill['steps'] * distill['batch'] * calib['length'] / 1e6:.0f} million tokens"
        f"{', with checkpointed activations' if distill['checkpoint_activations'] else ''}. A stage's time is that of "
        "SmolLM2-135M on an H100 (export: on two CPU cores), times the operations of this teacher over its.",
        "",
        "| stage | time, s | from, s | in | peak memory, GB |",
        "|---|---|---|---|---|",
    ]
    held = {"initialisation": "calibrate", "alignment": "align", "distillation": "distill", "export": "export"}
    for stage, row in body["stages"].items():
        peak = f"{body['memory'][held[stage]] / 1e9:.0f}" if stage in held else ""
        seen = [f"{row['seconds']:.0f}", f"{row['measured_seconds']:.1f}", row["from"].replace("-", " "), peak]
        lines.append("| " + " | ".join([stage, *seen]) + " |")
    note = (
        f"Memory is what `tcal inspect --memory` counts for a process on a CPU; {body['value_bytes'] / 1e9:.0f} GB of "
        "calibrate and align are the teacher's values, which take half as much on a GPU, in bfloat16."
    )
    return "\n".join([*lines, "", note, ""])


def set_ranks(name: str, body: dict[str, Any]) -> str:
    a, many = body["arguments"], body["arguments"]["steps"][-1]
    lines = [
        f"## {name}\n",
        f"Teacher {a['teacher']}, all sites aligned on {a['sequences']} x {a['length']} tokens of {a['calib']}, sets "
        f"of kept sites measured on {a['holdout']} more sequences, seed {a['seed']}, by `examples/rank_sets.py`.",
        machine(body["environment"]),
        "",
        f"| kept | sets | steps | rank correlation with {many} steps | chosen, its KL after {many} | best, its KL |",
        "|---|---|---|---|---|---|",
    ]
    for r in body["set_ranks"]:
        sets = [f"{', '.join(map(str, r[k]))}: {r[f'{k}_kl']:.4f}" for k in ("chosen", "best")]
        cells = [str(r["kept"]), str(r["sets"]), str(r["steps"]), f"{r['rank_correlation']:.2f}", *sets]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def copy_run(item: str, folder: Path, machine: str) -> None:
    """Writes folder/NAME.json from the manifest of a run folder."""
    name, path = item.split("=", 1)
    m = json.loads((Path(path) / "tcal.json").read_text(encoding="utf-8"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    stages = m["stages"]
    found = {n: e for n in ("eval", "eval-tasks", "distill") if (e := stages.get(n, {}).get("evidence"))}
    found.get("eval", {}).pop("path", None)
    if not found.get("distill", {}).get("curve"):  # the stage had no steps
        found.pop("distill", None)
    body = found | {
        "teacher": Path(m["teacher"]["source"]).name,
        "policy": m["plan"]["policy"],
        "config": m["config"] | {"calib": m["config"]["calib"] | {"text": None}},
        "calibrated_on": ", ".join(m["stages"]["calibrate"]["evidence"]["text"]),
        "seconds": {n: s["seconds"] for n, s in stages.items()},
        "environment": m["versions"] | {"machine": machine, "commit when copied": commit},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--run", action="append", default=[], metavar="NAME=RUN")
    here = f"{platform.machine()}, {os.cpu_count()} CPUs"
    p.add_argument("--machine", default=here, help="where the runs were made; default: this one")
    args = p.parse_args()
    for item in args.run:
        copy_run(item, args.folder, args.machine)
    parts = [HEAD]
    for path in sorted(args.folder.glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"gpus": gpus, "copying": copying, "decode": decode, "variant_decode": variants}
        kinds |= {"calibrated_on": run_folder, "dry_runs": dry_runs}
        kinds |= {
            "estimate": estimate,
            "set_ranks": set_ranks,
            "runtime_parity": runtimes,
            "serving": serving,
            "step_parts": step_parts,
            "fused": fused,
            "alignment": training_rates,
            "memory": memory,
            "planning": planning,
            "step_seconds": step_times,
            "provider": on_device,
        }
        kind = next((kinds[k] for k in kinds if k in body), conversion)
        parts.append(kind(path.stem.replace("-", " "), body))
    args.out.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
