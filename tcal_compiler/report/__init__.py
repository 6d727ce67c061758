"""report.md and report.html: what was converted, measured and checked, from the manifest alone.

facts.py reads the manifest, sections.py makes tables and plots of it, markdown.py and page.py write them. Only svg.py
needs matplotlib, and imports it when a plot is drawn.
"""

from __future__ import annotations

import importlib.util

from ..runtime.manifest import Manifest
from . import markdown, page
from .conclusion import quality, verdict
from .facts import Facts
from .plots import shared_scales
from .sections import sections

TITLE = "Conversion report"
PLOTS_HINT = "report.html needs matplotlib: pip install matplotlib, then tcal report"


def can_plot() -> bool:
    """matplotlib is installed here."""
    return importlib.util.find_spec("matplotlib") is not None


def render_report(manifest: Manifest, *, html: bool = False) -> str:
    """The report of a run folder with at least the stage plan complete, as Markdown or as a page (needs matplotlib)."""
    run = Facts("", manifest)
    parts = sections(run, shared_scales([run]))
    return page.write(TITLE, parts) if html else markdown.write(TITLE, parts)


def conclusion_of(manifest: Manifest) -> list[str]:
    """Of such a run folder: what its student is worth as far as it was measured, and what is wrong with it."""
    run = Facts("", manifest)
    return [line for line in (quality(run), verdict(run)) if line]
