"""The report: its numbers against independent ones, the page as a browser and a careful reader would check it."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import BYTES, HELD_OUT, SMALL, TINY, call, done, refused
from safetensors.numpy import load_file

from tcal_compiler.config import load_config
from tcal_compiler.errors import RunFolderError
from tcal_compiler.passes.choose import MEASURED
from tcal_compiler.recorded import reading
from tcal_compiler.report import page, plots, render_report
from tcal_compiler.report.compare import compare_markdown
from tcal_compiler.report.facts import Facts
from tcal_compiler.report.sections import REASONS
from tcal_compiler.runtime.manifest import parse_manifest
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.session import OnnxSession

PLOTS = {
    "Mean look-back distance",
    "Mean entropy of the attention rows",
    "Half-lives of the heads, as set and after alignment",
    "Alignment loss of each layer",
    "Error of each layer before and after alignment",
    "State and cache memory",
}


def facts(folder: Path) -> Facts:
    return Facts("run", parse_manifest((folder / "tcal.json").read_bytes(), "tcal.json"))


class Reader(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.labels: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open += [] if tag in ("meta", "image", "use", "path") else [tag]
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.links.append(value)
            if tag == "svg" and name == "aria-label":
                self.labels.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in ("meta", "image", "use", "path"):
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(shared_run):
    text = (shared_run / "report.html").read_text()
    reader = Reader(text)
    assert reader.open == [] and set(reader.labels) == PLOTS and len(reader.labels) == len(PLOTS)
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "audio", "video", "base"}
    assert reader.links and all(link.startswith(("#", "data:image/png;base64,")) for link in reader.links)
    assert not re.search(r"https?:|@import", text) and not re.findall(r"url\((?!#|&quot;#)", text)
    for target in {link[1:] for link in reader.links if link[0] == "#"} | set(re.findall(r"url\(#([^)]+)\)", text)):
        assert f'id="{target}"' in text


def test_page_and_markdown_say_the_same(shared_run):
    markdown, html = (shared_run / "report.md").read_text(), (shared_run / "report.html").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    cells = [c.strip() for r in rows for c in r.strip("|").split(" | ")]
    assert len(cells) > 100 and all(escape(c) in html for c in cells)
    titles = re.findall(r"^## (.+)$", markdown, re.M)
    assert titles == re.findall(r"<h2>([^<]+)</h2>", html) and "Versions and hashes" in titles


def test_text_in_svg_takes_the_colour_of_the_page_and_plots_can_be_read_on_both_papers(shared_run):
    html = (shared_run / "report.html").read_text()
    assert "#010203" not in html and html.count("currentColor") > 50
    svg = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.search(r"#000000|#ffffff|font-family|font:", svg)

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    def full(colour: str) -> str:
        return colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])

    papers, inks, faint = (
        [full(c) for c in re.findall(rf"--{n}: (#\w+)", page.STYLE)] for n in ("paper", "ink", "faint")
    )
    assert len(papers) == 2
    for paper, ink, pale in zip(papers, inks, faint, strict=True):
        assert contrast(paper, ink) > 7 and contrast(paper, pale) > 4.5
        assert all(contrast(paper, colour) > 3 for colour in (plots.ORANGE, *plots.LAYERS))


def test_memory_is_what_the_onnx_session_holds(shared_run):
    session, run = OnnxSession(shared_run / "onnx"), facts(shared_run)
    assert {s.local for s in run.layers} == {8}
    for tokens in (1, 7, 40):
        session.reset()
        session.prefill(list(range(tokens)))
        assert run.memory(tokens)[1] == session.state_bytes


def test_memory_of_a_teacher_is_its_keys_and_values(shared_run):
    run = facts(shared_run)
    layer = run.layers[0]
    assert run.memory(10)[0] == len(run.layers) * 10 * layer.kv_heads * (layer.head_dim + layer.value_dim) * 4


def test_speed_is_shown_where_the_context_has_room(shared_run):
    rows = [{"context": 128, "prefill_tokens_per_second": 2048.0, "decode_seconds": 0.004}]

    def edit(body: dict[str, Any]) -> None:
        body["stages"]["export"]["evidence"]["speed"] = {"cpus": 2, "rows": rows}

    assert "| 128 | 2048 | 4.00 | 250.0 |" in render_report(edited(facts(shared_run), edit).manifest)
    rows[0]["decode_seconds"] = 0.0  # found by fuzzing
    with pytest.raises(RunFolderError, match="ZeroDivisionError: float division by zero"), reading(shared_run):
        render_report(edited(facts(shared_run), edit).manifest)


def test_memory_of_a_window_is_what_is_kept(shared_run):
    def edit(body: dict[str, Any], bounded: bool) -> None:
        body["stages"]["plan"]["evidence"]["sites"][0]["window"] = 9
        body["config"]["export"]["bounded_windows"] = bounded

    run = facts(shared_run)
    runs = (run, *(edited(run, lambda body, b=b: edit(body, b)) for b in (True, False)))
    whole, windowed, unbounded = (r.memory(100) for r in runs)
    layer = run.layers[0]
    token = layer.kv_heads * (layer.head_dim + layer.value_dim) * 4
    assert layer.kept and unbounded == whole and windowed == (whole[0] - 92 * token, whole[1] - 92 * token)


def test_attention_over_the_last_tokens_is_said_and_counted(shared_run):
    def edit(body: dict[str, Any]) -> None:
        for site in body["stages"]["plan"]["evidence"]["sites"]:
            del site["local_window"], site["local_first"]

    run = facts(shared_run)
    without, layer = edited(run, edit), run.layers[0]
    token = layer.kv_heads * (layer.head_dim + layer.value_dim) * 4
    converted = sum(not s.kept for s in run.layers)  # each holds the first token and 7 before the one that it reads
    assert run.memory(100) == (without.memory(100)[0], without.memory(100)[1] + converted * 8 * token)
    text, plain = (render_report(r.manifest) for r in (run, without))
    assert f"{converted} become Gated DeltaNet, with softmax attention over the last 8 tokens" in text
    assert "last 8 tokens" not in plain and "their keys and values count" in text and "count with it" not in plain


def test_half_lives_as_set_are_those_of_the_initial_weights(shared_run):
    weights, run = load_file(shared_run / "initial.safetensors"), facts(shared_run)
    assert sorted(run.measured) == [1, 2, 3] == sorted(run.aligned_half_life)
    for i, site in run.measured.items():
        found = {k: v for k, v in weights.items() if re.search(rf"\b\w*{i}\.(A_log|dt_bias|a_proj.weight)$", k)}
        a_log, bias, proj = (next(v for k, v in found.items() if n in k) for n in ("A_log", "dt_bias", "a_proj"))
        assert not proj.any()
        np.testing.assert_allclose(site["half_life"], math.log(2) / (np.exp(a_log) * np.logaddexp(0, bias)), rtol=1e-4)
        np.testing.assert_allclose(site["half_life"], np.clip(site["distance"], math.log(2) / 5, 693.2), rtol=1e-3)
        assert len(run.aligned_half_life[i]) == len(site["half_life"]) and min(run.aligned_half_life[i]) > 0


def test_a_state_halves_in_its_half_life():
    """Left alone, a state shrinks to 2^-(T / half-life) over the T tokens that the half-life was measured on."""
    from types import SimpleNamespace

    torch.manual_seed(0)
    mixer = GdnMixer(SimpleNamespace(num_heads=3, value_dim=4, hidden=8, scale=1.0, local=0, local_first=False))
    torch.nn.init.normal_(mixer.dt_bias)
    x = torch.randn(1, 50, 8)
    state = torch.ones(3, dtype=torch.float64)
    for t in range(50):
        z = (mixer.a_proj.weight.double() @ x[0, t].double() + mixer.dt_bias.double()).detach()
        state *= torch.exp(-torch.exp(mixer.A_log.detach().double()) * torch.log1p(torch.exp(z)))
    torch.testing.assert_close(2.0 ** (-50 / mixer.half_life(x).double()), state, rtol=1e-4, atol=0)


def test_heat_maps_show_the_measured_heads_and_leave_kept_layers_empty(shared_run):
    from matplotlib.figure import Figure

    run = facts(shared_run)
    axes = Figure().add_subplot()
    plots.heat_map(axes, run, "distance", (1.0, 9.0), log=True, label="tokens")
    grid = np.ma.filled(axes.collections[0].get_array(), np.nan)
    assert np.isnan(grid[0]).all() and axes.yaxis_inverted()
    assert [(t.get_text(), t.get_position()[1]) for t in axes.texts] == [("stays softmax", 0.5)]
    for i, site in run.measured.items():
        np.testing.assert_array_equal(grid[i], site["distance"])


@pytest.mark.parametrize("limits", [(3e8, 7e8), (2e5, 9e9)])
def test_axes_of_ratios_have_several_numbers(limits):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    axes.set(yscale="log", ylim=limits)
    plots._log_ticks(axes.yaxis)
    low, high = limits
    assert 1 < sum(low <= tick <= high for tick in axes.get_yticks()) < 20


def test_layers_are_whole_numbers_on_their_colour_bar():
    from matplotlib.figure import Figure

    figure = Figure()
    plots._layer_colours(figure.add_subplot(), [1, 3])
    ticks = [t for t in figure.axes[1].get_yticks() if 1 <= t <= 3]
    assert ticks == [1, 2, 3]


def test_points_of_a_distillation_lie_inside_and_its_steps_are_whole(shared_run):
    from matplotlib.figure import Figure

    def edit(body: dict[str, Any]) -> None:
        curve = [{"step": s, "predictions": s, "kl": k, "nll": 1.0, "held_out": k} for s, k in ((0, 1.5), (4, 1.49))]
        body["stages"]["distill"] = body["stages"]["align"] | {"files": {}, "evidence": {"curve": curve, "checks": []}}

    axes = Figure().add_subplot()
    plots.distillation(axes, edited(facts(shared_run), edit))
    assert axes.get_ylim() == (0, pytest.approx(1.65)) and all(t == int(t) for t in axes.get_xticks())


def test_many_layers_have_room_for_their_numbers(shared_run):
    from matplotlib.figure import Figure

    def edit(body: dict[str, Any]) -> None:
        curve = [{"step": s, "train": {}, "held_out": {str(i): 1.0 for i in range(22)}} for s in (0, 1)]
        body["stages"]["align"]["evidence"]["curve"] = curve

    axes, run = Figure().add_subplot(), edited(facts(shared_run), edit)
    plots.errors(axes, run, 1.0)
    assert len(axes.get_xticks()) == 11


@pytest.mark.parametrize(("longest", "told"), [(40.0, {1, 2, 5, 10, 20, 50}), (20_000.0, {1, 10, 100, 1000, 10_000})])
def test_half_lives_have_as_many_numbers_as_fit(longest, told, shared_run):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    plots.half_lives(axes, facts(shared_run), (0.9, longest))
    low, high = axes.get_xlim()
    assert {t for t in axes.get_xticks() if low <= t <= high} == told


def test_what_the_report_says_to_do_makes_the_same_run(shared_run, tmp_path, monkeypatch):
    report = (shared_run / "report.md").read_text()
    commands, config = re.findall(r"^```\n(.*?)\n```", report, re.M | re.DOTALL)
    (tmp_path / "tcal.toml").write_text(config)
    shutil.copy(shared_run / "plan.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    before = json.loads((shared_run / "tcal.json").read_text())
    assert load_config(tmp_path / "tcal.toml", {}).model_dump(mode="json") == before["config"]
    words = shlex.split(commands.splitlines()[0])
    assert words[0] == "tcal-compile" and words[-2:] == ["-o", "again"]
    done("tcal", "align", *words[1:], "--quiet")
    after = json.loads((tmp_path / "again/tcal.json").read_text())
    for stage in ("plan", "calibrate", "align"):
        for key in ("config_hash", "inputs_hash"):
            assert after["stages"][stage][key] == before["stages"][stage][key]
    for name in ("initial.safetensors", "weights.safetensors", "alignment.json"):
        assert (tmp_path / "again" / name).read_bytes() == (shared_run / name).read_bytes()


def test_names_from_outside_cannot_break_the_report(shared_run):
    bad = '<script>alert("1")</script> | b'

    def edit(body: dict[str, Any]) -> None:
        body["stages"]["plan"]["evidence"]["sites"][1]["module"] = bad
        body["teacher"]["source"] = bad.replace("/", "")

    manifest = edited(facts(shared_run), edit).manifest
    assert "script" not in Reader(render_report(manifest, html=True)).tags
    row = next(r for r in render_report(manifest).splitlines() if "alert" in r and r.startswith("| 1 |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 11


def edited(run: Facts, edit: Callable[[dict[str, Any]], None], name: str = "edited") -> Facts:
    body = run.manifest.model_dump(mode="json")
    edit(body)
    return Facts(name, parse_manifest(json.dumps(body).encode(), "tcal.json"))


def test_every_policy_has_its_reason():
    assert set(REASONS) == {"uniform", "keep=", "none", "all", *MEASURED}


def test_scores_of_a_policy_and_a_distillation_are_shown(shared_run):
    def edit(body: dict[str, Any]) -> None:
        body["stages"]["plan"]["evidence"]["scores"] = {"0": 0.91, "1": 0.12, "2": 0.13, "3": 0.14}
        curve = [
            {"step": s, "train": None, "predictions": s * 10, "kl": k, "nll": 1.0, "held_out": k}
            for s, k in ((0, 0.5), (10, 0.2), (20, 0.3))
        ]
        speed = {"tokens": 5000, "seconds": 40.0, "tokens_per_second": 125.0}
        speed |= {"step_seconds": 0.25, "mfu": 0.0512, "card": "NVIDIA H200"}
        evidence = {"curve": curve, "checks": [], "steps": 90, "stopped_at": 20, "speed": speed}
        body["stages"]["align"]["evidence"] |= {"steps": 900, "stopped_at": 450}
        body["stages"]["distill"] = body["stages"]["align"] | {"files": {}, "evidence": evidence}

    run = edited(facts(shared_run), edit)
    text, html = render_report(run.manifest), render_report(run.manifest, html=True)
    assert "| 0 | layers.0" in text and "| softmax | 0.91 |" in text and "| Gated DeltaNet | 0.14 |" in text
    assert "| kept | 10 | 100 | 0.2000 | 2.72 |" in text and "| last | 20 | 200 | 0.3000 |" in text
    assert all(f"Stopped early at step {n}" in text for n in ("450 of 900", "20 of 90"))
    assert "125 tokens per second over the last 40 s" in text
    assert "A step took 0.25 s: MFU 5.1% of NVIDIA H200's bfloat16 peak." in text
    assert set(Reader(html).labels) == PLOTS | {"Scores of the policy", "Distillation"}
    both = compare_markdown(facts(shared_run), run)
    assert "| 0 | edited | layers.0" in both and "| 0 | run | layers.0" in both and "policy's score" in both


def test_without_matplotlib_there_is_markdown_and_a_hint(finished, tmp_path, monkeypatch):
    assert (finished / "report.html").is_file()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = call("tcal", "report", finished)
    assert result.code == 0 and result.out.startswith("# Conversion report")
    assert "pip install matplotlib" in result.err
    assert (finished / "report.md").is_file() and not (finished / "report.html").exists()
    refused(call("tcal", "compare", finished, finished, "--html", tmp_path / "c.html"), "ConfigError", "matplotlib")
    monkeypatch.undo()
    assert call("tcal", "report", finished).err == "" and (finished / "report.html").is_file()


def test_compare(finished, tmp_path):
    other = tmp_path / "other"
    done("tcal", "plan", TINY, "-o", other, *BYTES, "--policy", "keep=3", "--seed", "7", *SMALL)
    done("tcal", "plan", TINY, "-o", other, "--quiet")  # goes on with the plan that is there
    manifest = json.loads((other / "tcal.json").read_text())
    del manifest["config"]["calib"]["repeats"]  # as a version before that key left it
    (other / "tcal.json").write_text(json.dumps(manifest))
    done(
        "tcal", "eval", finished, "--text", HELD_OUT, "--length", "32", "--sequences", "2", "--student-only", "--quiet"
    )
    text, page = done("tcal", "compare", finished, other), tmp_path / "both.html"
    assert done("tcal", "compare", finished, other, "--html", page) == f"{page} is written.\n"
    assert "| seed | 0 | 7 |" in text and "| policy | keep=0 | keep=3 |" in text
    assert "calib." not in text and " None " not in text
    assert "| held-out slice | Perplexity " in text
    assert "| layers that stay softmax | [0] | [3] |" in text and "KL, student" in text
    assert "| 0 | run | " in text and "| 3 | other | " in text
    reader = Reader(page.read_text())
    assert set(reader.labels) == PLOTS | {"Divergence from the teacher"}
    assert reader.labels.count("State and cache memory") == 2
    refused(call("tcal", "compare", finished, tmp_path / "none"), "RunFolderError", "no such run folder")
    blocked = ("--html", tmp_path / "none" / "c.html")
    refused(call("tcal", "compare", finished, other, *blocked), "ConfigError", "cannot be written", "No such file")


def test_names_from_outside_do_not_steer_the_terminal(finished):
    manifest = json.loads((finished / "tcal.json").read_text())
    manifest["teacher"]["source"] = "/x/\x1b]0;title\x07"
    (finished / "tcal.json").write_text(json.dumps(manifest))
    missing = call("tcal", "report", str(finished) + "\x1b[2J")
    said = done("tcal", "compare", finished, finished) + done("tcal", "report", finished) + missing.err
    assert "\x1b" not in said and "\x07" not in said and said.count("\\x1b") >= 3 and "\n" in said


def test_runs_that_are_compared_share_their_scales(shared_run):
    run = facts(shared_run)

    def edit(body: dict[str, Any]) -> None:
        site = body["stages"]["calibrate"]["evidence"]["sites"][0]
        site["distance"] = [1000.0 for _ in site["distance"]]

    far = edited(run, edit)
    assert plots.shared_scales([run, far]).distance[1] == 1000.0 > plots.shared_scales([run]).distance[1]
