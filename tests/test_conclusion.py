"""What a report and the end of a command say of a student in a line."""

from __future__ import annotations

import os
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest
from test_report import edited, facts

from tcal_compiler.report import conclusion_of, render_report
from tcal_compiler.report.conclusion import quality, verdict


def test_the_perplexity_on_held_out_text_is_said(shared_run):
    run = facts(shared_run)
    held = run.evidence("export")["held_out"]
    assert held["sequences"] == 8 and held["length"] == 48 and held["student"] > held["teacher"] > 1 and held["kl"] > 0
    text = quality(run)
    assert text.startswith(f"Perplexity {held['student'] / held['teacher']:.3f} times the teacher's (")
    assert text.endswith("on 8 held-out sequences of 48 tokens of calibration.txt")
    assert conclusion_of(run.manifest)[0] == text and text in render_report(run.manifest)
    older = edited(run, lambda body: body["stages"]["export"]["evidence"].pop("held_out"))
    assert quality(older) == "" and "Perplexity" not in render_report(older.manifest)


@pytest.mark.parametrize(("naive", "told"), [(0.49, True), (0.505, True), (0.6, False)])
def test_a_student_that_is_no_better_than_a_naive_one_is_told_of(naive, told, shared_run):
    def edit(body: dict[str, Any]) -> None:
        def scored(kl: float) -> dict[str, Any]:
            return {"perplexity": 20.0, "kl": kl, "kl_stderr": 0.01}

        results = {"teacher": scored(0.0), "naive": scored(naive), "student": scored(0.5)}
        evidence = {"text": "other.txt", "length": 48, "sequences": 2, "results": results}
        body["stages"]["eval"] = body["stages"]["align"] | {"evidence": evidence, "files": {}}

    run = edited(facts(shared_run), edit)
    said = f"(KL 0.5000 ± 0.0100 and {naive:.4f} nats per token on other.txt)"
    assert (said in verdict(run)) == told == (said in render_report(run.manifest))


@pytest.mark.parametrize(
    ("held_out", "trained", "said"),
    [
        (0.49, 0.4, None),
        (1.05, 0.051, "know little of the teacher's on unseen text (mean held-out error 1.05, 0.051 on the text"),
        (0.2, 0.066, "better than other text (mean held-out error 0.2, 0.066 on the text trained on): more"),
        (0.09, 0.01, None),
    ],
    ids=["well", "little", "overfit", "small"],
)
def test_a_student_that_knows_little_beyond_its_text_is_told_of(held_out, trained, said, shared_run):
    def edit(body: dict[str, Any]) -> None:
        for point in body["stages"]["align"]["evidence"]["curve"]:
            point["held_out"] = dict.fromkeys(point["held_out"], held_out + (point["step"] == 0))
            point["train"] = dict.fromkeys(point["train"], trained)

    run = edited(facts(shared_run), edit)
    text = verdict(run)
    assert bool(text) is bool(said) and (said or "") in text and "\n" not in text
    for html in (False, True):
        assert (escape(text) if html else text) in render_report(run.manifest, html=html)


@pytest.mark.parametrize(("lowest", "told"), [(0.021, True), (0.02, True), (0.019, False)])
def test_alignment_that_bettered_no_layer_is_told_of(lowest, told, shared_run):
    def edit(body: dict[str, Any]) -> None:
        points = body["stages"]["align"]["evidence"]["curve"]
        for point in points:
            point["held_out"] = dict.fromkeys(point["held_out"], 0.02)
        points[-1]["held_out"] |= {min(points[-1]["held_out"]): lowest}

    run = edited(facts(shared_run), edit)
    said = "Alignment left every converted layer as it was initialised"
    assert (said in verdict(run)) == told == (said in render_report(run.manifest))


@pytest.mark.parametrize(("window", "own", "told"), [(46, None, False), (47, None, True), (48, 48, False)])
def test_text_no_longer_than_the_windows_is_told_of(window, own, told, shared_run):
    """Beside a window also the first token is seen; what a teacher's own window of that size sees is all there is."""

    def edit(body: dict[str, Any]) -> None:
        for site in body["stages"]["plan"]["evidence"]["sites"]:
            site |= {"local_window": window, "window": own, "local_first": own is None}

    run = edited(facts(shared_run), edit)
    said = "Calibration sequences of 48 tokens are no longer than what converted layers attend to beside their states, "
    said += f"the last {window} tokens and the first: the states learn nothing"
    assert (said in verdict(run)) == told == (said in render_report(run.manifest))


TCAL = [sys.executable, "-c", "import sys; sys.argv[0] = 'tcal'; from tcal_compiler.cli import main; main()"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_no_success(shared_run):
    with open("/dev/full", "w") as full:
        words = [*TCAL, "compare", shared_run, shared_run, "--json"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("StageError: the output: cannot be written: No space left on device\n  Try: ")


def test_a_terminal_without_a_character_shows_an_escape(shared_run):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = [*TCAL, "generate", shared_run, "caf\u00e9", "--max-new-tokens", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("caf\\xe9"), done.stderr
