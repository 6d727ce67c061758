"""What enters and leaves a site, kept in memory or on the disk."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCAB, WIDTH, student_of

from tcal_compiler.errors import StageError
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.graph import by_name
from tcal_compiler.passes.site_program import tap_graph
from tcal_compiler.runtime import taps
from tcal_compiler.runtime.taps import collect_taps

IDS = example_ids(5, 20, VOCAB)


@pytest.fixture
def student():
    return student_of("is_causal", "keep=1")


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(taps.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))


def test_taps_are_the_teachers_values_whatever_the_batch(student):
    site = student.converted[0]
    with torch.no_grad():
        x, y = tap_graph(student.capture.gm, [site.x, site.y])(IDS)
    for batch in (1, 2, 5, 9):
        (group,) = collect_taps(student, student.capture.gm, IDS, batch=batch)
        assert group.x.shape == group.y.shape == (1, 5, 20, WIDTH)
        torch.testing.assert_close(group.x[0], x)
        torch.testing.assert_close(group.y[0], y)
    assert site.x in by_name(student.capture.gm)


def test_on_the_disk_the_same_bits_and_no_file_stays(student, tmp_path, no_memory, monkeypatch):
    (spilled,) = collect_taps(student, student.capture.gm, IDS, batch=2, spill=tmp_path)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(taps.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 40))
    (kept,) = collect_taps(student, student.capture.gm, IDS, batch=2)
    assert torch.equal(spilled.x, kept.x) and torch.equal(spilled.y, kept.y)


def test_neither_memory_nor_disk(student, tmp_path, no_memory, monkeypatch):
    with pytest.raises(StageError, match="the disk has no room either"):
        collect_taps(student, student.capture.gm, IDS, batch=2)
    monkeypatch.setattr(taps.psutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    with pytest.raises(StageError, match="the disk has no room either"):
        collect_taps(student, student.capture.gm, IDS, batch=2, spill=tmp_path)


def test_a_disk_that_fills_up_meanwhile_is_an_error_and_no_signal(student, tmp_path, no_memory, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(taps.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        collect_taps(student, student.capture.gm, IDS, batch=2, spill=tmp_path)
    assert os.listdir(tmp_path) == []


def test_output_that_is_not_finite_names_the_site(student):
    gm = student.capture.gm
    weight = gm.get_parameter("blocks.0.attn.out.weight")
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = float("inf")
        with pytest.raises(StageError, match=r"blocks\.0\.attn: the teacher's attention output is not finite"):
            collect_taps(student, gm, IDS, batch=2)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_teacher_that_fails_on_the_length_says_so(student, monkeypatch):
    def fails(*_: object) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(taps, "tap_graph", lambda *_: fails)
    with pytest.raises(StageError, match=r"fails on 2 x 20 tokens: index out of range"):
        collect_taps(student, student.capture.gm, IDS, batch=2)
