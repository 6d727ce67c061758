"""report.md: what was converted, what was measured, from the manifest alone."""

from __future__ import annotations

import math
from typing import Any

from .runtime.manifest import Manifest


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows]) + "\n"


def _number(x: Any, digits: int = 4) -> str:
    return f"{x:.{digits}g}" if isinstance(x, int | float) and math.isfinite(x) else str(x)


def _fixed(x: Any, digits: int) -> str:
    """Numbers that are not finite lie in the manifest as text: the error of a single sequence is one."""
    return f"{x:.{digits}f}" if isinstance(x, int | float) and math.isfinite(x) else "-"


def _evidence(manifest: Manifest, stage: str) -> dict[str, Any]:
    return manifest.stages[stage].evidence if stage in manifest.stages else {}


def _sites(manifest: Manifest) -> str:
    plan: dict[str, Any] = manifest.plan
    evidence = _evidence(manifest, "plan")
    measured = {s["index"]: s for s in _evidence(manifest, "calibrate").get("sites", [])}
    curve = _evidence(manifest, "align").get("curve", [])
    rows = []
    for s in evidence["sites"]:
        i = s["layer"]
        kept = i in plan["keep"]
        row = [str(i), s["module"] or "-", "softmax" if kept else "Gated DeltaNet"]
        if kept or i not in measured:
            rows.append([*row, "", "", "", ""])
            continue
        m = measured[i]
        near, far = min(m["distance"]), max(m["distance"])
        best = min((p["held_out"][str(i)] for p in curve), default=None)
        rows.append(
            [
                *row,
                f"{near:.1f} to {far:.1f}",
                f"{min(m['entropy']):.2f} to {max(m['entropy']):.2f}",
                _number(m["error"]),
                _number(best) if best is not None else "",
            ]
        )
    head = [
        "layer",
        "module",
        "becomes",
        "look-back, tokens",
        "entropy, nats",
        "error after init",
        "held-out error after alignment",
    ]
    return _table(head, rows)


def _scores(evidence: dict[str, Any]) -> str:
    rows = []
    teacher = evidence["results"]["teacher"]["perplexity"]
    for name, r in evidence["results"].items():
        rows.append(
            [
                name,
                _fixed(r["perplexity"], 2),
                _fixed(r["perplexity"] / teacher, 3),
                f"{_fixed(r['kl'], 4)} ± {_fixed(r['kl_stderr'], 4)}",
            ]
        )
    text = f"On {evidence['text']}: {evidence['sequences']} sequences of {evidence['length']} tokens.\n\n"
    return text + _table(["model", "perplexity", "ratio to teacher", "KL(teacher, model), nats per token"], rows)


def _checks(manifest: Manifest) -> str:
    rows = []
    for name in manifest.stages:
        for c in _evidence(manifest, name).get("checks", []):
            ok = "yes" if c["measured"] <= c["allowed"] else "NO"
            rows.append([name, c["name"], _number(c["measured"], 3), _number(c["allowed"], 3), ok, c["detail"]])
    return _table(["stage", "check", "measured", "allowed", "holds", "detail"], rows)


def render_report(manifest: Manifest) -> str:
    """The report of a run folder with at least the stage plan complete."""
    t = manifest.teacher
    plan: dict[str, Any] = manifest.plan
    name, keep, convert = t.source.rsplit("/", 1)[-1], len(plan["keep"]), len(plan["convert"])
    parts = [
        "# Conversion report\n",
        f"Teacher: {name} ({t.kind}), vocabulary {t.vocab_size}, weights sha256 {t.fingerprint[:16]}.\n",
        f"Policy {plan['policy']}: {keep} sites stay softmax, {convert} become Gated DeltaNet.\n",
        "## Sites\n",
        "Errors are mean squared errors of the attention output over its mean square.\n",
        _sites(manifest),
    ]
    if "eval" in manifest.stages:
        parts += ["## Perplexity\n", _scores(manifest.stages["eval"].evidence)]
    rows = [[n, f"{s.seconds:.1f}", s.finished_at] for n, s in manifest.stages.items() if n != "report"]
    parts += ["## Checks\n", _checks(manifest), "## Stages\n", _table(["stage", "seconds", "finished"], rows)]
    versions = ", ".join(f"{k} {v}" for k, v in manifest.versions.items())
    parts += ["## Versions\n", f"tcal-compile {manifest.tcal_version}, {versions}.\n"]
    return "\n".join(parts)
