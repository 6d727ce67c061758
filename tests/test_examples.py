"""Every example is run; those that convert a model from end to end are slow."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import ASSETS

from tcal_compiler.runtime.session import OnnxSession

ROOT = Path(__file__).parents[1]
TINY = str(ASSETS / "tiny/teacher.pt2")
ELSEWHERE = {  # run by other tests, or by the makers of the files that they write
    "bench_onnx": "test_bench_variants",
    "bench_serving": "test_runtimes",
    "bench_variants": "test_bench_variants",
    "families": "its page, docs/families.md",
    "family_models": "families",
    "generate_genai": "test_genai",
    "serve": "test_serve",
    "tiny_torch_teacher": "test_teacher_assets",
    "train_teacher": "test_teacher_assets",
    "verify_runtimes": "test_runtimes",
    "write_reference": "test_docs",
    "write_results": "its page, docs/results.md",
    "export_tables": "write_results",
    "compare_lm_eval": "test_lm_eval",
    "check_cuda": "test_runtimes",
    "check_step_seconds": "a quiet machine",
    "device_session": "test_runtimes",
    "profile_step": "test_bench_variants",
    "compare_policies": "its numbers in docs/method.md",
    "conversion_bench": "measure_conversion",
    "conversion_schedule": "measure_conversion",
    "measure_conversion": "test_measure_conversion",
    "measure_dry_run": "docs/results.md",
    "measure_shards": "its numbers in docs/method.md",
    "estimate_conversion": "test_estimate",
    "fused_step": "docs/results.md",
    "rank_sets": "docs/results.md",
    "time_alignment": "docs/kernels.md",
    "time_planning": "docs/results.md",
    "published_recipe": "test_measure_conversion",
    "site_variants": "test_site_variants",
    "training_rates": "test_training_rates",
    "variant_mixer": "test_site_variants",
}
HERE = {
    "convert_and_generate",
    "compile_in_place",
    "copying_layers",
    "onnx_by_hand",
    "own_model",
    "stop_and_share",
    "walk_the_passes",
}


def test_no_example_is_forgotten():
    assert {p.stem for p in (ROOT / "examples").glob("*.py")} == HERE | set(ELSEWHERE)
    assert not HERE & set(ELSEWHERE)


def run(name: str, *words: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """An example's main in this process; what it printed."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    importlib.import_module(f"examples.{name}").main()
    return capsys.readouterr().out


def test_onnx_by_hand_is_our_session(shared_run, monkeypatch, capsys):
    prompt = list(b"The old man")
    words = (shared_run / "onnx", "--ids", *prompt, "--new-tokens", 12)
    shown = run("onnx_by_hand", *words, monkeypatch=monkeypatch, capsys=capsys)
    expected = list(OnnxSession(shared_run / "onnx").generate(prompt, 12))
    assert list(map(int, shown.split())) == expected and len(set(expected)) > 2


def test_walk_the_passes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    sys.modules.pop("examples.walk_the_passes", None)
    walk = importlib.import_module("examples.walk_the_passes")
    shown = capsys.readouterr().out
    assert "keep (0,) convert (1,)" in shown and "past_key_values.1.recurrent_state" in shown
    assert len(walk.curve) == 3 and walk.curve[-1]["held_out"]["1"] < walk.curve[0]["held_out"]["1"]
    assert (walk.whole - walk.chunks).abs().max() < 1e-3 * walk.whole.abs().max()


def test_own_model(tmp_path, monkeypatch, capsys):
    shown = run("own_model", "--out", tmp_path / "own", "--until", "plan", monkeypatch=monkeypatch, capsys=capsys)
    assert "1 stay softmax, 2 become Gated DeltaNet" in shown and (tmp_path / "own/run/plan.toml").is_file()


def test_copying_layers(tmp_path, monkeypatch, capsys):
    out = tmp_path / "copying.json"
    words = (TINY, "--tokenizer", "bytes", "--sequences", 2, "--length", 96, "--json", out)
    shown = run("copying_layers", *words, monkeypatch=monkeypatch, capsys=capsys).strip().splitlines()
    body = json.loads(out.read_text())
    assert [row["site"] for row in body["copying"]] == list(range(len(shown) - 1))
    for row, line in zip(body["copying"], shown[1:], strict=True):
        assert f"{row['repeated_kl']:.4f}" == line.split()[2] and row["fresh_kl"] > 1e-5
    assert 10 < body["predictions"]["repeated"] < body["predictions"]["fresh"] < 2 * 95


def test_what_counts_as_repeated(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    plain, copied = torch.arange(12)[None], torch.arange(12)[None].clone()
    copied[0, 4:10] = 50
    counts = importlib.import_module("examples.copying_layers").counted(plain, copied)
    assert (counts["repeated"][0].nonzero()[:, 0] + 1).tolist() == [7, 8, 9]
    assert (counts["fresh"][0].nonzero()[:, 0] + 1).tolist() == [1, 2, 3, 11]


@pytest.mark.slow
def test_compile_in_place(shared_run, monkeypatch, capsys):
    words = (shared_run, "--compiler", "eager")
    shown = run("compile_in_place", *words, monkeypatch=monkeypatch, capsys=capsys)
    lines = shown.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["9", "50", "200"]
    assert all(float(line.split()[-3]) > 1e-3 for line in lines)  # it is the student that answers


@pytest.mark.slow
def test_convert_and_generate(tmp_path, monkeypatch, capsys):
    words = (TINY, tmp_path / "run", "The old", "--tokenizer", "bytes", "--sequences", 6, "--length", 48, "--steps", 4)
    shown = run("convert_and_generate", *words, monkeypatch=monkeypatch, capsys=capsys)
    assert shown.startswith("The old") and len(shown) > 20


@pytest.mark.slow
def test_stop_and_share(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples/stop_and_share.py"), str(tmp_path / "out")]
    shown = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert "stopped with exit status 130" in shown.stdout and "stage align goes on from step" in shown.stderr
    assert "distillation is complete" in shown.stdout
    assert (tmp_path / "out/run/distilled.safetensors").is_file()
