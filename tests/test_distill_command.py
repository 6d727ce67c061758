"""Distillation through the command line: a stage of the run folder like the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import BYTES, SMALL, TINY, call, contents, done, refused
from safetensors.torch import load_file

from tcal_compiler.runtime import distill as distill_module
from tcal_compiler.runtime.config import AlignConfig
from tcal_compiler.runtime.data import encode_documents, encode_rows, pack
from tcal_compiler.runtime.tokenizer import ByteTokenizer

COMMON = ("--policy", "keep=0", "--align-steps", "2", *SMALL)
TOML = "[distill]\nbatch = 2\nscore_every = 2\ncheckpoint_every = 1\n"


def words(out: Path, *more: object) -> tuple[object, ...]:
    config = out.parent / "tcal.toml"
    config.write_text(TOML)
    return ("tcal", "calibrate", TINY, "-o", out, *BYTES, *COMMON, "--config", config, *more)


def stages(out: Path) -> dict:
    return json.loads((out / "tcal.json").read_text())["stages"]


@pytest.fixture
def aligned(tmp_path) -> Path:
    first, _, *rest = words(tmp_path / "run")
    done(first, "align", *rest)
    return tmp_path / "run"


def test_no_steps_is_no_distillation(finished):
    record = stages(finished)["distill"]
    assert record["files"] == {} and record["evidence"]["curve"] == []


def test_distil_a_run_folder(aligned):
    refused(call("tcal", "distill", aligned), "ConfigError", "no steps and no tokens")
    before = {n: r["finished_at"] for n, r in stages(aligned).items()}
    done("tcal", "distill", aligned, "--steps", "4", "--no-export", "--quiet")
    record = stages(aligned)["distill"]
    assert set(record["files"]) == {"distilled.safetensors", "distillation.json"} and "export" not in stages(aligned)
    assert all(stages(aligned)[n]["finished_at"] == t for n, t in before.items() if n != "report")
    curve = json.loads((aligned / "distillation.json").read_text())
    assert [p["step"] for p in curve] == [0, 2, 4] == [p["step"] for p in record["evidence"]["curve"]]
    assert 4 * 2 * 40 < curve[-1]["predictions"] <= 4 * 2 * 47
    assert "## Distillation" in (aligned / "report.md").read_text()
    old, new = (load_file(aligned / f"{n}.safetensors") for n in ("weights", "distilled"))
    assert old.keys() == new.keys() and any(not torch.equal(old[n], new[n]) for n in old)
    speed = record["evidence"]["speed"]
    assert speed["tokens"] == 4 * 2 * 48 and 0 < speed["seconds"] < stages(aligned)["distill"]["seconds"]
    assert speed["tokens_per_second"] == pytest.approx(speed["tokens"] / speed["seconds"], rel=0.01)
    assert 0 < speed["step_seconds"] < speed["seconds"] and speed["mfu"] is speed["card"] is None  # no card, no peak
    assert record["evidence"]["stopped_at"] is None
    done("tcal", "distill", aligned, "--tokens", str(2 * 48 * 4), "--no-export", "--quiet")  # the same length
    assert stages(aligned)["distill"] == record


@pytest.mark.slow
def test_a_stopped_distillation_goes_on_with_the_same_bits(aligned, tmp_path, monkeypatch):
    step, calls = distill_module.Distiller.step, []

    def stops(self, number, index):
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, number, index)

    monkeypatch.setattr(distill_module.Distiller, "step", stops)
    command = ("tcal", "distill", aligned, "--steps", "6", "--no-export")
    assert call(*command).code == 130 and "distill" not in stages(aligned)
    again = call(*command)
    assert again.code == 0 and "stage distill goes on from step 3" in again.err and calls[3:] == [3, 3, 4, 5]
    assert stages(aligned)["distill"]["evidence"]["speed"]["tokens"] == 3 * 2 * 48  # of the steps after the stop
    first, _, *rest = words(tmp_path / "other")
    done(first, "align", *rest)
    done("tcal", "distill", tmp_path / "other", "--steps", "6", "--no-export", "--quiet")
    for name in ("distilled.safetensors", "distillation.json"):
        assert (aligned / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_loss_that_is_not_finite_keeps_the_aligned_student(aligned):
    (aligned.parent / "high.toml").write_text("[distill]\nlr_gdn = 1e30\nlr_other = 1e30\nclip = 1e30\n")
    before = contents(aligned)
    command = ("tcal", "distill", aligned, "--steps", "9", "--config", aligned.parent / "high.toml", "--quiet")
    refused(call(*command), "StageError", "not finite", "distill.lr_gdn")
    assert (
        "distill" not in stages(aligned) and contents(aligned)["weights.safetensors"] == before["weights.safetensors"]
    )


@pytest.mark.slow
def test_an_alignment_that_levels_off_is_recorded_and_shown(tmp_path):
    (tmp_path / "low.toml").write_text("[align]\nlr_new = 1e-9\nlr_teacher = 1e-9\nscore_every = 1\npatience = 2\n")
    first, _, *rest = words(tmp_path / "run")
    shown = [w for w in rest if w != "--quiet"]
    result = call(first, "align", *shown, "--align-steps", "9", "--config", tmp_path / "low.toml")
    assert result.code == 0 and "alignment levelled off: stopped at step 2" in result.err
    evidence = stages(tmp_path / "run")["align"]["evidence"]
    assert (evidence["stopped_at"], evidence["steps"], evidence["curve"][-1]["step"]) == (2, 9, 2)
    assert "Stopped early at step 2 of 9" in (tmp_path / "run/report.md").read_text()


@pytest.mark.slow
def test_an_early_stop_is_recorded_and_shown(aligned):
    (aligned.parent / "high.toml").write_text(
        "[distill]\nlr_gdn = 1.0\nlr_other = 1.0\nclip = 1e6\nbatch = 2\nscore_every = 1\npatience = 2\n"
    )
    command = ("tcal", "distill", aligned, "--steps", "20", "--config", aligned.parent / "high.toml", "--no-export")
    result = call(*command)
    assert result.code == 0 and "stopped at step 2: 2 scores without a better one" in result.err
    evidence = stages(aligned)["distill"]["evidence"]
    assert evidence["stopped_at"] == 2 == evidence["curve"][-1]["step"] and evidence["steps"] == 20
    assert "Stopped early at step 2 of 20" in (aligned / "report.md").read_text()


@pytest.mark.slow
def test_the_distilled_student_is_what_is_deployed(finished):
    before = (finished / "student.pt2").read_bytes()
    done("tcal", "distill", finished, "--steps", "3", "--quiet")
    assert (finished / "student.pt2").read_bytes() != before
    printed = done("tcal", "verify", finished, "--quiet")
    assert "student.pt2 equals the graph with distilled.safetensors" in printed and "FAIL" not in printed
    assert "held-out score of distillation" in printed


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--distill-steps", "-1"), "distill.steps = -1"),
        (("--distill-tokens", "0"), "distill.tokens = 0"),
        (("--distill-steps", "3", "--distill-tokens", "9"), "both steps and tokens"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_bad_options_are_refused_before_the_folder(tmp_path, options, expected):
    refused(call("tcal-compile", TINY, "-o", tmp_path / "run", *options, "--quiet"), "ConfigError", expected)
    assert not (tmp_path / "run").exists()


def test_training_softmax_sites_where_none_is_kept_is_refused(tmp_path):
    (tmp_path / "tcal.toml").write_text('policy = "none"\n[distill]\nsteps = 2\ntrain = "attention"\n')
    words = ("tcal", "align", TINY, "-o", tmp_path / "run", *BYTES, *SMALL, "--config", tmp_path / "tcal.toml")
    refused(call(*words, "--quiet"), "ConfigError", "distill.train", "no softmax site")
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_not_aligned_is_refused(tmp_path):
    first, _, *rest = words(tmp_path / "run")
    done(first, "plan", *rest)
    refused(call("tcal", "distill", tmp_path / "run", "--steps", "2"), "RunFolderError", "align is not complete")


class Eos(ByteTokenizer):
    eos_token_id = 0


def test_rows_know_documents_and_padding():
    docs, tokenizer = ["abcde", "fg", "hijk"], Eos()
    ids, counts = encode_rows(docs, tokenizer, 0, length=4)
    tokens = encode_documents(docs, tokenizer, 0)
    assert ids.flatten()[: len(tokens)].tolist() == tokens.tolist()
    assert torch.equal(ids[:3], pack(tokens, sequences=3, length=4, what="test"))
    #  a b c d | e 0 f g | 0 h i j | k pad pad pad; an eos is predicted, the token behind it is not
    assert counts.tolist() == [[True] * 3, [True, False, True], [False, True, True], [False] * 3]
    whole, all_count = encode_rows(docs[:1], tokenizer, None, length=5)
    assert whole.shape == (1, 5) and bool(all_count.all())
    _, joined = encode_rows(["ab", "cd"], ByteTokenizer(), None, length=4)  # without eos documents are still known
    assert joined.tolist() == [[True, False, True]]


def test_alignment_and_distillation_share_their_schedule():
    from tcal_compiler.runtime.config import DistillConfig
    from tcal_compiler.runtime.training import learning_rate

    for step in (0, 5, 19, 40, 99):
        same = {"steps": 100, "warmup": 20}
        assert learning_rate(step, DistillConfig(**same)) == learning_rate(step, AlignConfig(**same))
