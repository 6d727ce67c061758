"""A chart as SVG that can stand inside a page: no size of its own, no colour of text, no names that clash."""

from __future__ import annotations

import io
import re
from typing import Any

from .blocks import Plot

INK = "#010203"  # stands for the page's text colour until the SVG is written
SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor"), INK
    ),
}


def draw(plot: Plot) -> str:
    """Needs matplotlib. The same plot gives the same text."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = SETTINGS | {"svg.hashsalt": plot.title}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6, 3.1), layout="constrained")
        plot.draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format")))
    return _inline(buffer.getvalue())


def _inline(text: str) -> str:
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', body)
    assert box is not None
    body = re.sub(r"<svg[^>]*>", f'<svg {box[0]} role="img">', body, count=1)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font: *([\d.]+px)[^;\"]*", r"font-size: \1", body)  # older matplotlib names the family there
    body = re.sub(r"font-family:[^;\"]*;? *", "", body)
    return body.replace(INK, "currentColor").strip()
