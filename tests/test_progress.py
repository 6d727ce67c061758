"""Progress on a terminal and elsewhere: what is shown of work that has no end in sight."""

from __future__ import annotations

import io
import math
import sys
import time

import pytest
from tiny_gguf import write_llama

from tcal_compiler import progress
from tcal_compiler.progress import Parts, Progress
from tcal_compiler.runtime.teacher import load_teacher


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
        shown.bar("alignment")(1, 2)
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


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_the_time_left_of_parts_with_and_without_a_length(monkeypatch):
    clock = Clock(monkeypatch)
    parts = Parts(Progress(quiet=True), "loading", {"weights": 4.0, "graph": 2.0, "text": 1.0})
    parts.begin("weights")
    clock.wait(1)
    parts.update(0, 40, "MB")
    assert math.isnan(parts.left()) and parts.so_far() == "1 s so far"
    clock.wait(2)
    parts.update(10, 40, "MB")  # 30 more take 6 s; the weights' 9 s are 4 of 7 shares
    assert parts.left() == pytest.approx(6 + 9 * 3 / 4)
    assert parts.so_far() == "10/40 MB, 5 MB/s, 3 s so far, about 13 s left"
    clock.wait(1)  # a tensor that takes longer
    assert parts.left() == pytest.approx(5 + 9 * 3 / 4)
    clock.wait(4)
    parts.begin("graph")  # after 8 s: a share is 2 s
    assert parts.left() == pytest.approx(6)
    clock.wait(3)
    assert parts.left() == pytest.approx(3)
    clock.wait(30)  # longer than its share: it never is negative
    assert parts.left() == pytest.approx(41 / 6)  # a share is 41 s / 6 at least
    assert parts.so_far() == "41 s so far, longer than expected, at least 7 s left"
    parts.begin("text")
    clock.wait(60)
    assert parts.left() == 0 and parts.so_far() == "1 min 41 s so far, longer than expected"


def test_a_stage_begins_with_the_unit_that_it_is_given(monkeypatch):
    clock = Clock(monkeypatch)
    parts = Parts(Progress(quiet=True), "export", {"program": 1.5, "ONNX": 4.5}, unit=2.0)
    parts.begin("program")
    clock.wait(1)
    assert parts.left() == pytest.approx(11) and parts.so_far() == "1 s so far, about 11 s left"
    clock.wait(1)
    parts.begin("ONNX")
    assert parts.left() == pytest.approx(6)


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "plain"])
def test_parts_show_themselves(tty, monkeypatch):
    screen = made(tty, monkeypatch)
    with Progress() as shown:
        parts = Parts(shown, "export", {"program": 1.0, "ONNX": 2.0}, unit=100.0)
        parts.begin("program")
        wait_for(screen, "export, 1 of 2: program: 0 s so far, about 5 min 0 s left")
        parts.begin("ONNX")
        wait_for(screen, "export, 2 of 2: ONNX: 0 s so far")
    assert ("\r\x1b[K" in screen.getvalue()) is tty


def test_a_bar_shows_its_time_until_its_first_step(monkeypatch):
    screen = made(True, monkeypatch)
    with Progress() as shown:
        step = shown.bar("distillation")
        wait_for(screen, "distillation: 0 s so far")
        step(1, 2)
        ended = screen.getvalue()
        time.sleep(0.1)
        assert screen.getvalue() == ended


def test_loading_says_how_far_it_is(tmp_path):
    """Of a .gguf file in megabytes, of a folder in tensors, from none of them on."""
    for teacher, unit in ((write_llama(tmp_path / "tiny.gguf"), "MB"), ("embedded", "tensors")):
        seen: list[tuple[float, float, str]] = []
        load_teacher(str(teacher), progress=lambda *far, seen=seen: seen.append(far))
        done = [far[0] for far in seen]
        assert done[0] == 0 and done == sorted(set(done)) and len(done) > 3, unit
        assert {far[2] for far in seen} == {unit} and done[-1] < seen[0][1] == seen[-1][1]


def test_the_rate_of_a_bar_that_goes_on_and_of_one_in_batches(monkeypatch):
    """Steps of one, four at a time, and steps of one that go on behind the hundredth: two seconds each."""
    for first, step, said in (
        (1, 1, "2/4, 2 s each, 4 s left"),
        (4, 4, "8/16, 2/s, 4 s left"),
        (101, 1, "102/104, 2 s each"),
    ):
        screen, clock = made(False, monkeypatch), Clock(monkeypatch)
        update = Progress(verbose=True).bar("work")
        for done in (first, first + step):
            clock.wait(2)
            update(done, first - step + 4 * step)
        begun, later = screen.getvalue().splitlines()
        assert said in later and ("left" in begun) is (first == 1)
