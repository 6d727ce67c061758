"""Progress on a terminal and elsewhere: what is shown of work that has no end in sight."""

from __future__ import annotations

import io
import sys
import time

import pytest

from tcal_compiler import progress
from tcal_compiler.progress import Progress


class Screen(io.StringIO):
    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    for name, seconds in (("TICK", 0.01), ("FIRST", 0.02), ("PLAIN", 0.03)):
        monkeypatch.setattr(progress, name, seconds)


def made(tty: bool, monkeypatch: pytest.MonkeyPatch) -> Screen:
    screen = Screen(tty)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def wait_for(screen: Screen, text: str) -> None:
    end = time.monotonic() + 20
    while text not in screen.getvalue():
        assert time.monotonic() < end, screen.getvalue()
        time.sleep(0.005)


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "plain"])
def test_work_shows_how_long_it_has_taken(tty, monkeypatch):
    screen = made(tty, monkeypatch)
    with Progress() as shown:
        shown.begin("export: ONNX")
        wait_for(screen, "export: ONNX: 0 s so far")
        shown.say("it is written")
        ended = screen.getvalue()
        time.sleep(0.1)
        assert screen.getvalue() == ended  # a line of information has no clock
    assert ended.startswith("export: ONNX\n") and ended.endswith("so far\nit is written\n")
    assert ("\r\x1b[K" in ended) is screen.tty


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "plain"])
def test_the_clock_ends_with_a_bar_and_with_the_block(tty, monkeypatch):
    screen = made(tty, monkeypatch)
    with pytest.raises(ValueError), Progress() as shown:
        shown.begin("loading")
        wait_for(screen, "so far")
        shown.bar("alignment")
        before = screen.getvalue()
        time.sleep(0.1)
        assert screen.getvalue() == before
        shown.begin("export")
        wait_for(screen, "export: 0 s so far")
        raise ValueError
    after = screen.getvalue()
    time.sleep(0.1)
    assert screen.getvalue() == after and after.endswith("\n")


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "plain"])
def test_quiet_shows_nothing(tty, monkeypatch):
    screen = made(tty, monkeypatch)
    with Progress(quiet=True) as shown:
        shown.begin("loading")
        time.sleep(0.1)
    assert screen.getvalue() == ""


def test_verbose_has_a_line_with_the_time_for_every_step(monkeypatch):
    screen = made(True, monkeypatch)
    with Progress(verbose=True) as shown:
        shown.begin("loading")
        step = shown.bar("alignment")
        for done in (1, 2, 3):
            step(done, 3, 0.5)
    lines = [line for line in screen.getvalue().splitlines() if "so far" not in line]
    assert [line.split(" s  ")[1].split(",")[0] for line in lines] == [
        "loading",
        *(f"alignment: {n}/3" for n in (1, 2, 3)),
    ]
    assert all(float(line.split(" s ")[0]) < 60 for line in lines) and "\r" not in screen.getvalue()


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "plain"])
def test_names_do_not_steer_the_terminal(tty, monkeypatch):
    screen = made(tty, monkeypatch)
    with Progress() as shown:
        shown.begin("loading \x1b[2J")
        wait_for(screen, "so far")
        shown.bar("tasks \x1b[2J")(1, 1)
    assert "\x1b[2J" not in screen.getvalue() and "loading \\x1b[2J: 0 s so far" in screen.getvalue()
