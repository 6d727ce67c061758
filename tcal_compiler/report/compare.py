"""Two run folders side by side: what differs at a glance, then every section of both reports."""

from __future__ import annotations

import json
from typing import Any

from ..config import Config
from . import markdown, page
from .blocks import Block, Table
from .conclusion import quality
from .facts import Facts
from .numbers import fixed, number, size, with_error
from .plots import Scales, shared_scales
from .sections import SECTIONS, layers

TITLE = "Comparison"
AT_A_GLANCE = "At a glance"
Part = tuple[str, list[tuple[str, list[Block]]]]  # a title, and blocks by the name of their run


def _settings(run: Facts) -> dict[str, str]:
    """By dotted name; a key that came after the run was made has its default."""
    flat: dict[str, Any] = {}
    for name, value in [*Config().model_dump(mode="json").items(), *run.manifest.config.items()]:
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    flat["policy"] = run.manifest.plan["policy"]  # also of a plan that was made before and followed
    return {k: "default" if v is None else str(v) for k, v in flat.items()}


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
    if said := quality(run):
        found["held-out slice"] = said
    if run.scores:
        e = run.evidence("eval")
        found["scored on"] = f"{e['text']}, {e['sequences']} x {e['length']} tokens"
    for name, s in run.scores.items():
        found[f"perplexity, {name}"] = fixed(s["perplexity"], 2)
        if name != "teacher":
            found[f"KL, {name}"] = with_error(s["kl"], s["kl_stderr"], 4)
    last = run.contexts[-1]
    found["state and caches"] = f"{size(run.memory(last)[1])} at {last} tokens"
    for name, stage in run.manifest.stages.items():
        if name != "report":
            found[f"seconds, {name}"] = f"{stage.seconds:.1f}"
    return found


def _rows(a: Facts, b: Facts) -> list[list[str]]:
    """Settings that differ, then all figures: what, of the first run, of the second."""
    settings, figures = ([make(r) for r in (a, b)] for make in (_settings, _figures))
    rows = [[k, *(s.get(k, "") for s in settings)] for k in settings[0] | settings[1]]
    rows = [r for r in rows if r[1] != r[2]]
    rows += [[k, *(f.get(k, "") for f in figures)] for k in figures[0] | figures[1]]
    return rows


def _glance(a: Facts, b: Facts) -> list[Block]:
    return [Table(["what", a.name, b.name], _rows(a, b))]


def _layers(a: Facts, b: Facts, scales: Scales) -> list[Block]:
    """One table, in which a layer's rows of both runs follow each other."""
    text, left, *_ = layers(a, scales)
    right = layers(b, scales)[1]
    assert isinstance(left, Table) and isinstance(right, Table)
    head = left.head if len(left.head) > len(right.head) else right.head  # one may have scores of its policy
    rows = []
    for run, table in ((a, left), (b, right)):
        for cells in (dict(zip(table.head, r, strict=True)) for r in table.rows):
            rows.append([cells["layer"], run.name, *(cells.get(name, "") for name in head[1:])])
    return [text, Table(["layer", "run", *head[1:]], sorted(rows, key=lambda r: int(r[0])))]


def _parts(a: Facts, b: Facts) -> list[Part]:
    scales = shared_scales([a, b])
    parts: list[Part] = [(AT_A_GLANCE, [("", _glance(a, b))])]
    for title, make in SECTIONS.items():
        if make is layers:
            parts.append((title, [("", _layers(a, b, scales))]))
        elif any(both := [make(r, scales) for r in (a, b)]):
            parts.append((title, list(zip((a.name, b.name), both, strict=True))))
    return parts


def compare_html(a: Facts, b: Facts) -> str:
    """Needs matplotlib."""
    return page.page(TITLE, [page.section(*part) for part in _parts(a, b)])


def compare_json(a: Facts, b: Facts) -> str:
    """At a glance, as JSON."""
    rows = [{"what": what, "first": one, "second": two} for what, one, two in _rows(a, b)]
    return json.dumps({"first": a.name, "second": b.name, "rows": rows}, indent=1)


def compare_markdown(a: Facts, b: Facts) -> str:
    return markdown.write_parts(TITLE, _parts(a, b))
