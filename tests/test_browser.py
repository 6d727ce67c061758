"""The report in a browser: the Chromium of QtWebEngine (pip install -e ".[browser]"), or an installed one."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest
from command_line import done

PLOTS = 6
FRAME = """<!doctype html><iframe id=f srcdoc="{}" style="width:{}px;height:900px;border:0"></iframe><script>
f.onload = () => {{
  const d = f.contentDocument, r = [...d.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
  document.title = JSON.stringify({{overflow: d.documentElement.scrollWidth - d.documentElement.clientWidth,
    width: {}, pictures: r.map(b => [b.left, b.right, b.height])}});
}}</script>"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QT = importlib.util.find_spec("PySide6") is not None and importlib.util.find_spec("PySide6.QtWebEngineWidgets")
pytestmark = pytest.mark.skipif(not QT and CHROMIUM is None, reason="needs QtWebEngine or Chromium")


def seen(page: Path, width: int, *, dark: bool) -> dict:
    """What tests/browser.py says of a page; from Chromium alone without colours and messages."""
    if QT:
        command = [sys.executable, str(Path(__file__).with_name("browser.py")), str(page), "--width", str(width)]
        shown = subprocess.run([*command, *["--dark"] * dark], capture_output=True, text=True, timeout=120)
        assert shown.returncode == 0, shown.stderr[-2000:]
        return json.loads(shown.stdout)
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(escape(page.read_text()), width, width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    command = [str(CHROMIUM), *options, "--dump-dom", frame.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>([^<]*)</title>", shown.stdout)
    assert title, shown.stderr[-2000:]
    return json.loads(title[1])


def brightness(colour: str) -> int:
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


@pytest.fixture(scope="module")
def pages(shared_run, tmp_path_factory) -> list[tuple[Path, int]]:
    """A report and a comparison, with their numbers of plots."""
    folder = tmp_path_factory.mktemp("pages")
    done("tcal", "compare", shared_run, shared_run, "--html", folder / "both.html")
    shutil.copy(shared_run / "report.html", folder)
    return [(folder / "report.html", PLOTS), (folder / "both.html", 2 * PLOTS)]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_fit_show_their_plots_and_log_nothing(pages, width, dark):
    for page, count in pages:
        found = seen(page, width, dark=dark)
        assert found["width"] == width and found["overflow"] <= 0
        assert len(found["pictures"]) == count
        for left, right, height in found["pictures"]:
            assert left >= 0 and right <= width and right - left > 250 and height > 150
        if QT:
            assert found["loaded"] and found["messages"] == []
            dark_paper = brightness(found["paper"]) < 150 and brightness(found["ink"]) > 600
            assert dark_paper is dark and (dark or brightness(found["paper"]) > 700)


@pytest.mark.skipif(not QT, reason="needs QtWebEngine")
def test_the_look_at_a_page_finds_what_is_wrong(tmp_path):
    page = tmp_path / "bad.html"
    body = '<div style="width:900px;height:9px"></div><svg width=0 height=0></svg><script>missing()</script>'
    page.write_text(f"<!doctype html><body>{body}")
    found = seen(page, 390, dark=False)
    assert found["overflow"] > 400 and found["pictures"][0][2] == 0 and "missing" in found["messages"][0]
