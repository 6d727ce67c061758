"""examples/measure_conversion.py from policy to page, on the tiny teacher."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command_line import HELD_OUT, TINY
from tiny_models import VOCAB, TinyModel

from tcal_compiler.api import CALIBRATION_TEXT
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.rewrite_gdn import mixer_path
from tcal_compiler.runtime.calibrate import initialise
from tcal_compiler.runtime.live import capture_live
from tcal_compiler.runtime.student import make_student
from tcal_compiler.runtime.taps import collect_taps

ROOT = Path(__file__).parents[1]
RECIPES = ("published-aligned-3-distilled-2", "mended-aligned-3")


def script(name: str, *words: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, words)]
    shown = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=400, env={"PYTHONPATH": str(ROOT)}
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    return shown.stdout


@pytest.fixture
def recipe(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("published_recipe")


@pytest.mark.slow
def test_the_published_recipe_has_its_faults_and_trains(recipe):
    model = TinyModel(layers=2)
    capture = capture_live(model)
    plain = make_student(capture, scan := find_attention(capture), choose(scan, "keep=0"))
    groups = collect_taps(plain, capture.gm, example_ids(4, 24, VOCAB), batch=2)
    plain, _ = initialise(plain, groups, init="taylor", seed=0, batch=2)
    student = recipe.published_student(plain, groups, seed=0, batch=2)
    mixer, attention = student.gm.get_submodule(mixer_path(1)), model.blocks[1].attn
    torch.testing.assert_close(mixer.q_proj.weight, attention.proj[0].weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(mixer.k_proj.weight, attention.proj[1].weight.repeat_interleave(2, 0), atol=1e-5, rtol=0)
    ratio = mixer.v_proj.weight / attention.proj[2].weight.repeat_interleave(2, 0)
    assert all(head.std() < 1e-3 and 0.1 <= head.mean() <= 10.001 for head in ratio.view(4, -1))
    gate = mixer.g_proj.weight / mixer.v_proj.weight
    assert gate.std() < 1e-4 and not mixer.g_proj.bias.any() and (mixer.norm == 1).all()
    ids = example_ids(2, 9, VOCAB)
    with torch.no_grad():
        found, whole = student.logits(ids), model(ids)
        attention.out.weight.zero_()
        without = model(ids)
    assert (found - without).abs().max() < 0.05 * (whole - without).abs().max()  # the gate lets next to nothing through
    before = {n: p.clone() for n, p in student.gm.named_parameters()}
    ((first, last),) = recipe.train_layers(student, groups, steps=60).values()
    assert last < first
    changed = {n for n, p in student.gm.named_parameters() if not torch.equal(before[n], p)}
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "a_proj.weight", "A_log", "dt_bias")
    names += ("b_proj.weight", "g_proj.weight")
    assert changed == {f"{mixer_path(1)}.{n}" for n in names}


@pytest.mark.slow
def test_one_command_gives_the_table(tmp_path):
    (tmp_path / "piqa.jsonl").write_text(json.dumps({"goal": "Eat", "sol1": "soup", "sol2": "sand", "label": 0}) + "\n")
    out = tmp_path / "results" / "tiny.json"
    out.parent.mkdir()
    given = ["--tokenizer", "bytes", "--calib", CALIBRATION_TEXT, "--sequences", 6, "--holdout", 8, "--length", 48]
    given += ["--batch", 2, "--policy", "kl:1", "--policy", "none", "--seeds", "0,1", "--init", "naive"]
    given += ["--without", "ridge", "--steps", "4+2", "--steps", "published:3+2", "--steps", "mended:3"]
    given += ["--score-align-steps", 3]
    given += ["--eval", f"books={HELD_OUT}", "--eval-length", 64, "--eval-sequences", 2, "--needle", 300]
    given += ["--tasks", "piqa", "--task-files", tmp_path, "--limit", 2, "--without-linear", "--device", "cpu"]
    script("measure_conversion.py", TINY, *given, "--json", out)
    found = json.loads(out.read_text())
    ablated = "closed-form without ridge-aligned-4-distilled-2"
    names = [f"{a}{b}" for a in ("naive", "aligned-4-distilled-2", ablated, *RECIPES) for b in ("", ", no linear")]
    expected = {f"{p}, {n}, seed {s}" for p in ("kl:1", "none") for n in names for s in (0, 1)}
    assert found["scores"].keys() == expected and found["tasks"].keys() == expected | {"teacher"}
    assert len(found["kept"]["kl:1"]) == 1 and found["kept"]["none"] == []
    sets = {tuple(c["keep"]): c["kl"]["3"] for c in found["candidates"]["kl:1"]}
    assert len(sets) > 1 and tuple(found["kept"]["kl:1"]) == min(sets, key=sets.__getitem__)
    assert found["candidates"]["kl:1"][0]["rule"] == "uniform"
    assert all(c["kl"].keys() == {"0", "3", "12"} for c in found["candidates"]["kl:1"])
    ours = ("aligned-4-distilled-2", ablated)
    took = {f"{p}, {n}, seed {s}" for p in ("kl:1", "none") for n in ours for s in (0, 1)}
    assert found["seconds_to_aligned"].keys() == took
    assert all(0 < s < sum(found["seconds"].values()) for s in found["seconds_to_aligned"].values())
    kl = {n: r["books (64)"]["kl"] for n, r in found["scores"].items()}
    assert kl["none, aligned-4-distilled-2, seed 0"] != kl["none, aligned-4-distilled-2, seed 1"]
    assert kl["none, aligned-4-distilled-2, seed 0"] < kl["none, naive, seed 0"]
    assert kl["none, aligned-4-distilled-2, seed 0"] != kl[f"none, {ablated}, seed 0"]
    none = [kl[n] for n in expected if n.startswith("none") and "no linear" in n]
    assert max(none) - min(none) > 0  # what training changed outside the converted sites
    script("write_results.py", out.parent, "--out", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| policy | rule | kept | KL after 0 steps | after 3 steps | after 12 steps |" in page
    assert "policies kl:1, none" in page and "seeds 0, 1" in page and "| piqa | acc_norm | teacher | 1 |" in page
    assert page.count("| needle 300 | exact |") == len(expected) + 1


@pytest.mark.slow
def test_candidate_sets_after_distillation(tmp_path):
    """The first of --score-distill-steps decides; nothing is converted without --init or --steps."""
    out = tmp_path / "results" / "sets.json"
    out.parent.mkdir()
    given = ["--tokenizer", "bytes", "--calib", CALIBRATION_TEXT, "--sequences", 6, "--length", 48, "--batch", 2]
    given += ["--policy", "kl:1", "--score-align-steps", 2, "--score-distill-steps", "3,2/2", "--device", "cpu"]
    script("measure_conversion.py", TINY, *given, "--json", out)
    found = json.loads(out.read_text())
    rows = found["candidates"]["kl:1"]
    assert all(list(r["kl"]) == ["2", "2+3", "2+2/2"] and len(set(r["kl"].values())) == 3 for r in rows)
    assert found["kept"]["kl:1"] == min(rows, key=lambda r: r["kl"]["2+3"])["keep"] and not found["scores"]
    script("write_results.py", out.parent, "--out", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| KL after 2 steps | after 2+3 steps | after 2+2/2 steps |" in page and "chosen by that after 2+3." in page


@pytest.mark.slow
def test_the_calibration_text_is_not_scored(tmp_path):
    (tmp_path / "text.txt").write_text(CALIBRATION_TEXT.read_text()[:60_000])
    words = [sys.executable, str(ROOT / "examples/measure_conversion.py"), TINY, "--calib", str(CALIBRATION_TEXT)]
    words += ["--tokenizer", "bytes"]
    words += ["--sequences", "2", "--length", "16", "--eval", f"part={tmp_path / 'text.txt'}"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT)})
    assert shown.returncode and "calibrated on" in shown.stderr
