"""Two run folders side by side: what differs at a glance, then every section of both reports."""

from __future__ import annotations

from typing import Any

from . import markdown, page
from .blocks import Block, Table
from .facts import Facts
from .plots import Scales, shared_scales
from .sections import SECTIONS, fixed, number, size

TITLE = "Comparison"
AT_A_GLANCE = "At a glance"


def _flat(body: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for k, v in body.items():
        flat |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": str(v)}
    return flat


def _figures(run: Facts) -> dict[str, str]:
    """The numbers that two runs are compared by; those that were not measured are left out."""
    found = {
        "teacher": f"{run.manifest.teacher.source.rsplit('/', 1)[-1]} {run.manifest.teacher.fingerprint[:12]}",
        "layers that stay softmax": str([s.index for s in run.layers if s.kept]),
    }
    if run.held_out:
        for part, label in ((0, "before"), (1, "after")):
            mean = sum(e[part] for e in run.held_out.values()) / len(run.held_out)
            found[f"mean held-out error {label} alignment"] = number(mean)
    if run.scores:
        e = run.evidence("eval")
        found["scored on"] = f"{e['text']}, {e['sequences']} x {e['length']} tokens"
    for name, s in run.scores.items():
        found[f"perplexity, {name}"] = fixed(s["perplexity"], 2)
        if name != "teacher":
            found[f"KL, {name}"] = f"{fixed(s['kl'], 4)} ± {fixed(s['kl_stderr'], 4)}"
    last = run.contexts[-1]
    found["state and caches"] = f"{size(run.memory(last)[1])} at {last} tokens"
    for name, stage in run.manifest.stages.items():
        if name != "report":
            found[f"seconds, {name}"] = f"{stage.seconds:.1f}"
    return found


def _glance(a: Facts, b: Facts) -> list[Block]:
    left, right = ({**_flat(dict(r.manifest.config)), **_figures(r)} for r in (a, b))
    settings = set(_flat(dict(a.manifest.config))) | set(_flat(dict(b.manifest.config)))
    rows = [
        [key, left.get(key, ""), right.get(key, "")]
        for key in {**left, **right}
        if key not in settings or left.get(key) != right.get(key)
    ]
    return [Table(["what", a.name, b.name], rows)]


def _parts(a: Facts, b: Facts) -> list[tuple[str, list[tuple[str, list[Block]]]]]:
    scales: Scales = shared_scales([a, b])
    made = [(title, [(r.name, make(r, scales)) for r in (a, b)]) for title, make in SECTIONS.items()]
    return [(title, parts) for title, parts in made if any(blocks for _, blocks in parts)]


def compare_html(a: Facts, b: Facts) -> str:
    """Needs matplotlib."""
    glance = page.section(AT_A_GLANCE, [("", _glance(a, b))])
    return page.page(TITLE, [glance, *(page.section(*part) for part in _parts(a, b))])


def compare_markdown(a: Facts, b: Facts) -> str:
    return markdown.write_parts(TITLE, [(AT_A_GLANCE, [("", _glance(a, b))]), *_parts(a, b)])
