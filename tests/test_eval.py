"""tcal eval: which models it scores, on text, retrieval and tasks, and what it refuses."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from command_line import HELD_OUT, call, done, refused
from tiny_models import VOCAB, TinyModel

from tcal_compiler import evaluation
from tcal_compiler.cli_runs import _print_scores
from tcal_compiler.evaluation import Evaluation
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.runtime.evaluate import EvalResult
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.live import capture_live
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.student import make_student, without_linear
from tcal_compiler.runtime.tasks import TaskScore, score_tasks

BOOLQ = [{"passage": f"The {i} o'clock bell rang.", "question": "did it ring", "answer": i % 3 > 0} for i in range(5)]


def test_retrieval_and_tasks_beside_a_text(finished, tmp_path, monkeypatch):
    def late(*args, **kwargs):
        time.sleep(0.2)
        return score_tasks(*args, **kwargs)

    monkeypatch.setattr(evaluation, "score_tasks", late)
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in BOOLQ))
    words = ("--recall", "700", "--tasks", "boolq", "--task-files", tmp_path, "--limit", 3, "--quiet")
    words += ("--student-only", "--without-linear", "--length", 32, "--sequences", 1)
    found = json.loads(done("tcal", "eval", finished, "--text", HELD_OUT, *words, "--json"))
    assert list(found) == ["teacher", "no linear", "student"]
    for row in found.values():
        assert [(s["task"], s["metric"], s["examples"]) for s in row["tasks"]] == [
            ("recall 700", "exact", 3),
            ("recall 700", "nll", 3),
            ("boolq", "acc", 3),
        ]
    assert found["no linear"]["kl"] > found["student"]["kl"] > 0
    nll, before = (found[name]["tasks"][1] for name in ("student", "teacher"))
    assert nll["change"] == pytest.approx(nll["value"] - before["value"]) and nll["change"] != 0
    record = json.loads((finished / "tcal.json").read_text())["stages"]["eval-tasks"]
    kept = record["evidence"]
    assert kept["results"]["student"] == found["student"]["tasks"]
    assert record["seconds"] > 0.2  # of the work, not of writing it down
    assert kept["files"].keys() == {"heldout.txt", "boolq.jsonl"}
    report = (finished / "report.md").read_text()
    assert "| boolq | acc | student | 3 |" in report and "| no linear | " in report
    assert found["student"]["kl_stderr"] is None and "nan" not in report  # of a single sequence
    assert not (finished / ".scratch").exists()


def test_a_single_sequence_has_no_error_bar(capsys):
    found = Evaluation(
        {"teacher": EvalResult(9, 2.0, math.nan, 0.0, 0.0), "student": EvalResult(9, 3.0, math.nan, 0.5, math.nan)},
        {"student": [TaskScore("boolq", "acc", 0.25, math.nan, 1, None, -0.5, math.nan)]},
        sequences=1,
        length=10,
    )
    _print_scores(found, as_json=False)
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == "On 1 x 10 tokens:"
    assert [row.rpartition("KL ")[2] for row in rows[:2]] == ["0.0000 ± 0.0000", "0.5000"]
    assert rows[2].split("acc")[1].split() == ["0.2500", "minus", "the", "teacher's", "-0.5000"]


@pytest.mark.slow
def test_tasks_alone_of_every_model(finished, tmp_path):
    for name in ("boolq", "boolq_more"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in BOOLQ))
    words = ("tcal", "eval", finished, "--tasks", "boolq", "--task-files", tmp_path, "--quiet")
    refused(call(*words), "DataError", "holds 2 files for boolq")
    (tmp_path / "boolq_more.jsonl").unlink()
    models = ("teacher", "naive", "initialised", "student")
    assert [line.split()[:3] for line in done(*words).splitlines()] == [[m, "boolq", "acc"] for m in models]


@pytest.mark.parametrize(
    "words, kind, said",
    [
        ((), "ConfigError", "neither --text nor --tasks"),
        (("--tasks", "boolq"), "ConfigError", "--task-files go together"),
        (("--needle", "300"), "ConfigError", "need a text"),
        (("--needle", "300,x", "--text", HELD_OUT), "ConfigError", "'300,x' is no list of lengths"),
        (("--needle", "1024", "--text", HELD_OUT, "--limit", 10**9), "ConfigError", "1000000000 examples of 1024"),
        (("--recall", "255", "--text", HELD_OUT), "ConfigError", "100 examples of 255"),
        (("--tasks", "glue", "--task-files", "."), "ConfigError", "glue is unknown"),
        (("--tasks", "boolq", "--task-files", "gone"), "DataError", "no such folder"),
        (("--text", HELD_OUT, "--device", "tpu"), "ConfigError", "unknown device 'tpu'"),
    ],
)
def test_what_cannot_be_scored(shared_run, words, kind, said):
    refused(call("tcal", "eval", shared_run, *words, "--quiet"), kind, said)


def test_without_linear_layers_only_the_kept_ones_attend():
    model = TinyModel(layers=3, bias=True)
    capture = capture_live(model)
    student = make_student(capture, scan := find_attention(capture), choose(scan, "keep=1"))
    for mixer in student.gm.modules():
        if isinstance(mixer, GdnMixer):
            naive_(mixer, torch.Generator().manual_seed(0))
    ids = example_ids(2, 19, VOCAB)
    with torch.no_grad():
        before, found = student.logits(ids), without_linear(student).logits(ids)
        for i in (0, 2):
            model.blocks[i].attn.out.weight.zero_()  # its bias stays
        torch.testing.assert_close(found, model(ids))
        assert torch.equal(student.logits(ids), before) and (found - before).abs().max() > 0.01


@pytest.mark.slow
def test_a_distilled_run_is_scored_beside_its_aligned_copy(finished):
    score = ("tcal", "eval", finished, "--text", HELD_OUT, "--length", 48, "--sequences", 4, "--quiet", "--json")
    before = json.loads(done(*score))
    assert "aligned" not in before
    done("tcal", "distill", finished, "--steps", "4", "--quiet")
    after = json.loads(done(*score))
    assert list(after) == ["teacher", "naive", "initialised", "aligned", "student"]
    for name in ("kl", "perplexity"):
        was = before["student"][name]  # by the exported program; the copy runs as a graph
        assert after["aligned"][name] == pytest.approx(was, rel=1e-4)
        assert abs(after["student"][name] - was) > 1e-3 * was
