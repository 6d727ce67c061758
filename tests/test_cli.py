"""The command line from end to end, on the tiny teacher that is not from transformers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from command_line import ASSETS, BYTES, HELD_OUT, SMALL, TINY, call, contents, done

from tcal_compiler import cli, runs
from tcal_compiler.progress import Progress
from tcal_compiler.resume import resuming
from tcal_compiler.runtime.run_folder import Stage
from tcal_compiler.runtime.tokenizer import ByteTokenizer
from tcal_compiler.runtime.training import TrainState

ROOT = Path(__file__).parents[1]


def test_inspect(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = json.loads(done("tcal", "inspect", TINY, "--json"))
    assert set(found) == {"teacher", "sites", "refused"} and found["refused"] == [] and len(found["sites"]) == 4
    keys = {"layer", "module", "heads", "kv_heads", "head_dim", "value_dim", "scale", "window", "rope", "causal"}
    keys |= {"scores"}
    assert all(set(s) == keys and s["heads"] > s["kv_heads"] and s["rope"] for s in found["sites"])
    table = done("tcal", "inspect", TINY)
    assert "4 sites can be converted, 0 are refused." in table and "is_causal" in table
    assert found["teacher"] == {"family": None, "vocab_size": 256, "context_length": None}
    assert "yes" in table and "True" not in table
    assert "Context of the teacher: not known from its file." in table
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_holds_what_the_manifest_says(finished):
    manifest = json.loads((finished / "tcal.json").read_text())
    assert list(manifest["stages"]) == ["plan", "calibrate", "align", "distill", "export", "report"]
    owned = {f for s in manifest["stages"].values() for f in s["files"]}
    assert {"plan.toml", "weights.safetensors", "student.pt2", "onnx/model.onnx", "report.md"} <= owned
    assert {"onnx/genai_config.json", "alignment.json", "initial.safetensors"} <= owned
    assert set(contents(finished)) == owned | {"tcal.json", ".lock"}
    assert manifest["teacher"]["kind"] == "program" and manifest["plan"]["keep"] == [0]
    checks = manifest["stages"]["export"]["evidence"]["checks"]
    assert checks and all(c["measured"] <= c["allowed"] for c in checks)


def test_the_same_command_again_does_nothing(finished):
    record = json.loads((finished / "tcal.json").read_text())
    for point in record["stages"]["align"]["evidence"]["curve"]:
        point["held_out"] = dict.fromkeys(point["held_out"], 0.9)
    (finished / "tcal.json").write_text(json.dumps(record, indent=1))
    before = contents(finished)
    stamps = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    options = (*BYTES, "--policy", "keep=0", "--align-steps", "6", *SMALL)
    result = call("tcal-compile", TINY, "-o", finished, *[w for w in options if w != "--quiet"])
    printed = result.out
    assert "export is complete" in printed and "every stage was complete already, nothing was to do" in result.err
    quality, said = printed.splitlines()[-2:]
    assert quality.startswith("Perplexity ") and quality.endswith(
        "8 held-out sequences of 48 tokens of calibration.txt."
    )
    assert said.startswith("Converted layers know little of the teacher's on unseen text (mean held")
    assert contents(finished) == before
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def test_eval_and_report(finished):
    found = json.loads(
        done("tcal", "eval", finished, "--text", HELD_OUT, "--length", "64", "--sequences", "3", "--json")
    )
    assert set(found) == {"teacher", "naive", "initialised", "student"}
    assert found["teacher"]["kl"] == 0 and found["student"]["tokens"] == 3 * 63
    assert found["student"]["kl"] < found["initialised"]["kl"] < found["naive"]["kl"]
    assert "perplexity" in (text := done("tcal", "report", finished)).lower()
    assert text.strip() == (finished / "report.md").read_text().strip()
    assert "3 sequences of 64 tokens" in text and "| student |" in text
    one = ("--length", "32", "--sequences", "1", "--student-only")
    plain = done("tcal", "eval", finished, "--text", HELD_OUT, *one)  # one sequence has no standard error
    assert plain.startswith("On 1 x 32 tokens:\nteacher")
    assert "teacher" in plain and "student" in plain and "naive" not in plain and done("tcal", "report", finished)


def test_verify_repeats_every_check_and_finds_a_changed_byte(finished):
    printed = done("tcal", "verify", finished, "--quiet")
    *lines, last = printed.splitlines()
    assert last.startswith(f"{len(lines)} of {len(lines)} hold; the report counts only those that the stages made")
    stages = json.loads((finished / "tcal.json").read_text())["stages"]
    made = [c["name"] for s in stages.values() for c in s["evidence"].get("checks", [])]
    told = Counter(line.removeprefix("ok   ").rpartition(": ")[0] for line in lines)
    assert len(made) < len(lines) and not Counter(made) - told
    assert f"| checks that hold | {len(made)} of {len(made)} that the stages made;" in done("tcal", "report", finished)
    assert len(lines) > 15 and all(line.startswith("ok ") for line in lines)
    for what in ("capture equals teacher", "nothing converted", "student.pt2", "ONNX logits", "greedy tokens"):
        assert what in printed
    file = finished / "weights.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    broken = call("tcal", "verify", finished, "--quiet")
    assert broken.code == 1 and "FAIL file weights.safetensors" in broken.out and "ParityError" in broken.err


def test_generate_is_repeatable(finished):
    greedy = [done("tcal", "generate", finished, "The old man", "--max-new-tokens", "12") for _ in range(2)]
    assert greedy[0] == greedy[1] and greedy[0].startswith("The old man") and len(greedy[0]) > len("The old man\n")
    options = ("--max-new-tokens", "12", "--temperature", "0.9", "--top-k", "20", "--top-p", "0.9", "--seed")
    drawn = [done("tcal", "generate", finished, "The", *options, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generation_begins_as_the_rows_of_training_do(shared_run, monkeypatch):
    class Begins(ByteTokenizer):
        bos_token_id = 7

        def encode(self, text: str, *, special: bool = False) -> list[int]:
            return [7] * special + super().encode(text)

    asked: list[list[int]] = []
    monkeypatch.setattr(runs, "run_tokenizer", lambda run: Begins())
    monkeypatch.setattr(runs.OnnxSession, "generate", lambda self, ids, *_, **__: asked.append(ids) or iter(b"e"))
    assert done("tcal", "generate", shared_run, "Th") == "The\n" and asked == [[7, *b"Th"]]


@pytest.mark.slow
def test_an_edited_plan_is_followed_until_another_policy_is_asked_for(tmp_path):
    out, plan = tmp_path / "run", tmp_path / "run" / "plan.toml"

    def kept(*options: str) -> list[int]:
        done("tcal", "plan", TINY, "-o", out, *BYTES, *SMALL, *options)
        return json.loads((out / "tcal.json").read_text())["plan"]["keep"]

    assert kept("--policy", "uniform:25%") == [0]
    plan.write_text(plan.read_text().replace('= "gdn"', '= "softmax"', 1))
    assert kept() == [0, 1] and kept("--policy", "uniform:25%") == [0, 1]
    assert kept("--policy", "keep=3") == [3]
    other = tmp_path / "other.toml"
    other.write_text(plan.read_text().replace('= "gdn"', '= "softmax"'))
    assert kept("--plan", str(other)) == [0, 1, 2, 3]


def test_another_tokenizer_is_another_calibration(tmp_path):
    out = tmp_path / "run"
    common = ("-o", out, "--policy", "all", *SMALL)
    done("tcal", "calibrate", TINY, *BYTES, *common)
    first = json.loads((out / "tcal.json").read_text())["stages"]["calibrate"]
    done("tcal", "calibrate", TINY, *BYTES, *common, "--calib-sequences", "5")
    second = json.loads((out / "tcal.json").read_text())["stages"]["calibrate"]
    assert first["inputs_hash"] != second["inputs_hash"]


KILLED = """
local_window = 8
[calib]
sequences = 6
length = 48
[align]
steps = 60
batch = 2
checkpoint_every = 3
score_every = 7
"""


@pytest.mark.slow
def test_a_kill_during_alignment_costs_nothing(tmp_path):
    config = tmp_path / "tcal.toml"
    config.write_text(KILLED)

    def words(name: str) -> list[str]:
        return ["align", TINY, "-o", str(tmp_path / name), *BYTES, "--config", str(config), "--quiet"]

    code = "import sys, torch; torch.set_num_threads(1); from tcal_compiler.cli import main; main()"
    child = subprocess.Popen([sys.executable, "-c", code, *words("killed")], cwd=ROOT)
    try:
        deadline = time.monotonic() + 200
        while not list((tmp_path / "killed").glob(".scratch/align/*/align.safetensors")):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        assert child.wait() == -signal.SIGKILL
    before = json.loads((tmp_path / "killed/tcal.json").read_text())["stages"]
    assert "calibrate" in before and "align" not in before
    again = [w for w in words("killed") if w != "--quiet"]
    result = call("tcal", *again)
    assert result.code == 0 and "stage align goes on from step" in result.err
    done("tcal", *words("undisturbed"))
    for name in ("weights.safetensors", "initial.safetensors", "alignment.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert not list((tmp_path / "killed").glob(".tmp-*")) and not list((tmp_path / "killed").rglob("align.safetensors"))


def test_restart_runs_every_stage_anew(tmp_path):
    words = ("tcal", "plan", TINY, "-o", tmp_path / "run", *BYTES, *SMALL)
    done(*words)
    (tmp_path / "run/plan.toml").touch()
    done(*words, "--restart")
    assert (tmp_path / "run/plan.toml").is_file()


@pytest.mark.parametrize(
    "words",
    [
        ("tcal", "frobnicate"),
        ("tcal", "eval"),
        ("tcal-compile", TINY, "--batch"),
        ("tcal", "plan", TINY, "--seed", "x"),
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(words):
    assert call(*words).code == 2


@pytest.mark.parametrize("words", [("tcal", "--help"), ("tcal-compile", "--help"), ("tcal", "eval", "--help")])
def test_help(words):
    assert "Usage" in done(*words)


@pytest.mark.slow
def test_embedded_is_the_default_teacher():
    found = json.loads(done("tcal", "inspect", "--json"))
    assert len(found["sites"]) >= 6 and (ASSETS / "teacher").is_dir()


@pytest.mark.parametrize(
    ("words", "goes_on"),
    [
        ("tcal-compile embedded", True),
        ("tcal distill run", True),
        ("tcal generate run Hi", False),
        ("tcal plan --dry-run", False),
        ("tcal export run --dtype int8", False),
    ],
)
def test_what_typer_makes_of_ctrl_c_says_how_to_go_on(words, goes_on, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as stopped:
        cli._run(lambda: sys.exit(130))
    said = capsys.readouterr().err
    assert stopped.value.code == 130 and said.startswith("\nStopped.")
    assert ("The same command goes on." in said) is goes_on
    with pytest.raises(SystemExit) as other:
        cli._run(lambda: sys.exit(2))
    assert other.value.code == 2 and not capsys.readouterr().err


@pytest.mark.parametrize(("longest", "more"), [(8192, False), (9000, True), (None, True)])
def test_a_larger_context_is_suggested_where_the_teacher_has_one(longest, more, finished):
    manifest = json.loads((finished / "tcal.json").read_text())
    manifest["stages"]["plan"]["evidence"]["info"]["context_length"] = longest
    (finished / "tcal.json").write_text(json.dumps(manifest))
    said = call("tcal", "generate", finished, "The old man", "--max-new-tokens", "9000")
    assert "context: 11 tokens of prompt and 9000 new ones do not fit in the context of 8192" in said.err
    assert "Try: at most 8182 new tokens" in said.err and ("export.max_length above 8192" in said.err) is more


def test_a_stop_says_from_which_step_the_next_run_goes_on(tmp_path, capsys):
    stage = Stage("align", False, tmp_path, tmp_path)
    for before, saved, says in (
        (None, None, "stage align has no checkpoint yet: it begins anew"),
        (None, 50, "stage align is kept up to step 50 of 120"),
        (50, None, "stage align goes on from step 50 of 120\nstage align is kept up to step 50 of 120"),
    ):
        with pytest.raises(KeyboardInterrupt), resuming(stage, Progress(), 120) as (state, save):
            assert (state and state.step) == before
            if saved:
                save(TrainState(saved, {"x": torch.zeros(1)}, [{"step": 0}]))
            raise KeyboardInterrupt
        assert capsys.readouterr().err == f"{says}\n"
