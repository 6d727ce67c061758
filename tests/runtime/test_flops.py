"""Operations counted in a pass, against a count by hand; the peaks of cards; what is shown while training."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TinyModel, capture_of

from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.local_windows import with_local_windows
from tcal_compiler.progress import Progress
from tcal_compiler.runtime.flops import PEAKS, device_peak, distillation_flops, forward_flops, peak_flops
from tcal_compiler.runtime.student import make_student

LENGTH = 24


@pytest.mark.parametrize("core", ["is_causal", "mask"])
def test_operations_are_those_counted_by_hand(core):
    """Two layers, the second one converted: every matrix once a token, attention over all pairs, the delta rule."""
    model = TinyModel(core, layers=2)
    capture = capture_of(model)
    student = make_student(capture, scan := find_attention(capture), choose(scan, "keep=0"))
    site = scan.sites[1]
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith("embed"))
    attention = 2 * site.num_heads * LENGTH * (site.key_dim + site.value_dim)  # of a token of one layer
    rule = 6 * site.num_heads * site.key_dim * site.value_dim
    gates = site.hidden * site.num_heads * (2 + site.value_dim)  # W_a, W_b and W_g
    teacher = 2 * weights + 2 * attention
    converted = 2 * (weights + gates) + attention + rule
    assert distillation_flops(student, LENGTH) == LENGTH * (teacher + 3 * converted)


@pytest.mark.parametrize("window, tokens, keys", [(8, LENGTH, 16), (9, 27, 18), (100, LENGTH, 2 * LENGTH)])
def test_attention_over_the_last_tokens_counts_as_it_is_computed(window, tokens, keys):
    capture = capture_of(TinyModel("is_causal", layers=2))
    scan = find_attention(capture)
    students = (make_student(capture, with_local_windows(scan, w), choose(scan, "keep=0")) for w in (0, window))
    without, found = (forward_flops(s.gm, capture.inputs(torch.zeros(1, LENGTH, dtype=torch.long))) for s in students)
    site = scan.sites[1]
    assert found - without == 2 * site.num_heads * tokens * keys * (site.key_dim + site.value_dim)


def test_peaks_are_of_known_cards():
    assert peak_flops("NVIDIA H100 80GB HBM3") == PEAKS["NVIDIA H100"] != peak_flops("NVIDIA H100 PCIe")
    assert peak_flops("NVIDIA A100-SXM4-80GB") == PEAKS["NVIDIA A100"]
    assert peak_flops("NVIDIA L40") is peak_flops("NVIDIA H1000") is device_peak(torch.device("cpu")) is None


def test_mfu_is_shown_beside_the_rate(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tcal_compiler.progress.time.monotonic", lambda: now[0])
    update = Progress().bar("distillation", tokens=100, utilisation=0.2)
    now[0] = 20.0
    update(1, 2, 0.5)
    assert capsys.readouterr().err == "distillation: 1/2, 20 s each, 20 s left, 5 tokens/s, MFU 1.0%, error 0.5000\n"
