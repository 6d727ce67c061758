"""Softmax attention over the last tokens beside the state of a converted site, from its start to ONNX."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_models import DIM, HEADS, KV_HEADS, VOCAB, capture_of_student, lone_site, scanned

from tcal_compiler.backend import BackendOptions
from tcal_compiler.config import Config, build_config
from tcal_compiler.errors import ConfigError, RunFolderError
from tcal_compiler.passes.budget import memory, state_bytes
from tcal_compiler.passes.capture import capture_program, example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.limits import MAX_PROBE
from tcal_compiler.passes.local_windows import with_local_windows
from tcal_compiler.passes.make_stateful import make_stateful, run_chunks
from tcal_compiler.passes.types import SiteScan
from tcal_compiler.runtime.align import align
from tcal_compiler.runtime.calibrate import SiteCalibrator, initialise
from tcal_compiler.runtime.config import LOCAL_WINDOW, AlignConfig, DistillConfig, ExportConfig
from tcal_compiler.runtime.distill import distill
from tcal_compiler.runtime.initialize import local_scale_, naive_, zero_gate_
from tcal_compiler.runtime.live import student_of_batches
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.onnx_export import export_onnx
from tcal_compiler.runtime.onnx_parity import check_parity, torch_generate
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.session_state import SessionState
from tcal_compiler.runtime.statistics import local_sums, output_sums
from tcal_compiler.runtime.student import Student, make_student, without_linear
from tcal_compiler.runtime.taps import SiteGroup, collect_taps
from tcal_compiler.runtime.weights import load_weights, save_weights

TOKENS = 40


def student_with(window: int, policy: str = "none") -> Student:
    capture, scan = scanned("is_causal", sharp=3.0)
    return make_student(capture, with_local_windows(scan, window), choose(scan, policy))


def taps_of(student: Student) -> list[SiteGroup]:
    return collect_taps(student, student.capture.gm, example_ids(4, TOKENS, VOCAB), batch=2)


def mixers(student: Student) -> list[GdnMixer]:
    return [m for m in student.gm.modules() if isinstance(m, GdnMixer)]


@pytest.mark.parametrize("made, said", [(8, "the student has no such weight"), (0, "has no ")], ids=["with", "without"])
def test_weights_made_with_or_without_a_window_do_not_fit_the_other(tmp_path, made, said):
    save_weights(student_with(made), file := tmp_path / "weights.safetensors")
    load_weights(student_with(made), file)
    student = student_with(8 - made)
    before = {n: w.clone() for n, w in student.state_dict().items()}
    with pytest.raises(RunFolderError, match=said) as found:
        load_weights(student, file)
    assert "local_scale" in found.value.what and "--restart" in found.value.hint
    assert "--local-window" in found.value.hint
    assert all(torch.equal(w, student.state_dict()[n]) for n, w in before.items())


def test_the_window_sees_no_more_than_the_teacher_and_only_beside_plain_scores():
    sites = (
        lone_site(),
        lone_site(window=4),
        lone_site(softcap=5.0),
        lone_site(slopes=(0.5,)),
        lone_site(sinks=(0.0,)),
    )
    found = with_local_windows(SiteScan(sites, ()), 6).sites
    assert [(s.local, s.local_first) for s in found] == [(6, True), (4, False), (0, False), (0, False), (0, False)]
    assert [s.summary().get("local_window") for s in found] == [6, 4, None, None, None]
    assert with_local_windows(SiteScan(found, ()), 0).sites == sites


def test_its_scale_is_the_least_squares_of_the_context():
    gen = torch.Generator().manual_seed(0)
    site = replace(lone_site(), local=5)
    q, k, v = (torch.randn(2, h, 30, DIM, generator=gen) for h in (HEADS, KV_HEADS, KV_HEADS))
    mixer, x = GdnMixer(site), torch.randn(2, 30, 32, generator=gen)
    o, w = 1e-3 * mixer.core(q, k, v, x), mixer.local_output(q, k, v)  # so small that the norm's eps counts
    context = 0.3 * w + torch.randn(w.shape, generator=gen) * w.std()
    sums = replace(output_sums(q, k, v, o, site=site), cn=_channels(context, o), nn=_channels(_unit(o), o))
    left = local_scale_(mixer, sums, local_sums(context, o, w))
    for h in range(HEADS):  # a factor per channel of n, and one for w: columns of one system over all channels
        rows, n = [], _unit(o)[..., h, :].flatten(0, 1).double()
        for d in range(DIM):
            columns = torch.zeros(len(n), DIM + 1, dtype=torch.float64)
            columns[:, d], columns[:, DIM] = n[:, d], w[..., h, d].flatten()
            rows.append(columns)
        target = context[..., h, :].flatten(0, 1).T.flatten().double()
        exact = torch.linalg.lstsq(torch.cat(rows), target[:, None]).solution[:, 0]
        torch.testing.assert_close(mixer.local_scale[h].double(), exact[-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(left.cn[h] / left.nn[h], exact[:-1], rtol=1e-3, atol=1e-4)


def _unit(o: torch.Tensor) -> torch.Tensor:
    return o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _channels(a: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    return (a * _unit(o)).sum((0, 1), dtype=torch.float64)


def test_a_window_as_long_as_the_text_is_the_teacher():
    student = student_with(TOKENS)
    groups = taps_of(student)
    initialise(student, groups, init="closed-form", seed=0, batch=2)
    for m in mixers(student):
        torch.testing.assert_close(m.local_scale, torch.ones(HEADS), rtol=1e-4, atol=1e-4)
    assert all(SiteCalibrator(student, g, i, 2).error() < 1e-6 for g in groups for i in range(len(g.sites)))


def test_a_window_starts_nearer_and_can_be_left_out():
    errors = {}
    for window, without in ((0, ()), (24, ()), (24, ("local-window",))):
        student = student_with(window)
        groups = taps_of(student)
        initialise(student, groups, init="closed-form", without=without, seed=0, batch=2)
        jobs = [SiteCalibrator(student, g, i, 2) for g in groups for i in range(len(g.sites))]
        errors[window, without] = [job.error() for job in jobs]
        if without:
            assert all(m.local_scale.abs().max() == 0 for m in mixers(student))
    assert all(with_ < 0.5 * base for base, with_ in zip(errors[0, ()], errors[24, ()], strict=True)), errors
    assert errors[24, ("local-window",)] == errors[0, ()]


def test_other_starts_are_without_it_and_training_finds_it():
    student = student_with(6)
    for m in mixers(student):
        m.local_scale.data.fill_(1.0)
        naive_(m, torch.Generator().manual_seed(0))
        assert m.local_scale.abs().max() == 0
        m.local_scale.data.fill_(1.0)
        zero_gate_(m, torch.Generator().manual_seed(0))
        assert m.local_scale.abs().max() == 0
    groups = taps_of(student)
    initialise(student, groups, init="taylor", seed=0, batch=2)
    _, curve = align(student, groups, train=3, config=AlignConfig(steps=20, batch=2), seed=0)
    assert all(curve[-1]["train"][i] < 0.6 * start for i, start in curve[0]["train"].items()), curve
    assert all(m.local_scale.abs().min() > 0.01 for m in mixers(student))


@pytest.mark.parametrize("second, groups", [("is_causal", 1), ("scale", 2), ("window", 2)])
def test_sites_are_aligned_with_their_own_scale_and_window(second: str, groups: int):
    """One program runs for all sites of a group, with the mixer of its first site."""
    capture, scan = scanned(("is_causal", second), sharp=3.0)
    student = make_student(capture, with_local_windows(scan, TOKENS), choose(scan, "none"))
    found = taps_of(student)
    assert len(found) == groups
    initialise(student, found, init="closed-form", seed=0, batch=2)
    _, curve = align(student, found, train=3, config=AlignConfig(steps=1, batch=2), seed=0)
    assert all(error < 1e-6 for error in curve[0]["held_out"].values()), curve  # each window is all that a site sees
    plain = make_student(capture, scan, choose(scan, "none"))
    assert len(taps_of(plain)) == (2 if second == "window" else 1)


def test_distillation_lowers_its_error_and_moves_its_scale():
    ends = {}
    for window in (0, 6):
        student = student_with(window, "keep=0")
        initialise(student, taps_of(student), init="closed-form", seed=0, batch=2)
        before = [m.local_scale.detach().clone() for m in mixers(student) if m.local]
        config = DistillConfig(steps=6, batch=3, warmup=2, lr_gdn=1e-3, lr_other=3e-4, score_every=3, chunk=64)
        counted = torch.ones(6, TOKENS - 1, dtype=torch.bool)
        _, curve = distill(student, example_ids(6, TOKENS, VOCAB), counted, train=4, config=config, seed=0)
        ends[window] = [p["held_out"] for p in (curve[0], curve[-1])]
        assert all(not torch.equal(m.local_scale, b) for m, b in zip(mixers(student), before, strict=False))
    assert ends[6][1] < ends[6][0] and ends[6][1] < ends[0][1], ends


def test_a_window_that_no_mask_shows_is_refused():
    assert build_config({"local_window": MAX_PROBE}, "test").local_window == MAX_PROBE
    for wrong in (-1, MAX_PROBE + 1, 1.5):
        with pytest.raises(ConfigError, match="local_window"):
            build_config({"local_window": wrong}, "test")


def test_without_the_linear_layers_it_is_gone_too():
    student = student_with(6, "keep=0")
    initialise(student, taps_of(student), init="closed-form", seed=0, batch=2)
    silent = without_linear(student)
    ids = example_ids(2, 12, VOCAB)
    zero = make_student(*scanned("is_causal", sharp=3.0), student.plan)
    for m in mixers(zero):
        zero_gate_(m, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(silent.logits(ids), zero.logits(ids), rtol=0, atol=0)


def test_budgets_count_its_keys_and_values():
    plain = scanned("is_causal")[1]
    scan = with_local_windows(plain, 6)
    own = state_bytes(heads=HEADS, kv_heads=KV_HEADS, key_dim=DIM, value_dim=DIM)
    beside = 6 * KV_HEADS * 2 * DIM * 4  # the first token, and what a token sees of its window beside itself
    assert state_bytes(heads=HEADS, kv_heads=KV_HEADS, key_dim=DIM, value_dim=DIM, held=6) == own + beside
    assert memory(scan, [], 100) == memory(plain, [], 100) + 2 * beside
    assert memory(scan, [0], 100) == memory(plain, [0], 100) + beside


def test_a_run_folder_records_it_only_where_there_is_one():
    assert Config(local_window=6).initial_values() == {"init": "closed-form", "seed": 0, "local_window": 6}
    assert "local_window" not in Config(local_window=0).initial_values()
    assert Config().initial_values()["local_window"] == Config().local_window == LOCAL_WINDOW
    assert BackendOptions().local_window == LOCAL_WINDOW
    assert signature(student_of_batches).parameters["local_window"].default == LOCAL_WINDOW


@pytest.mark.parametrize("policy", ["none", "keep=0"])
def test_the_exported_student_remembers_the_window_alone(tmp_path: Path, policy: str):
    student = student_with(6, policy)
    initialise(student, taps_of(student), init="closed-form", seed=0, batch=2)
    program = student.export()
    capture = capture_program(program, teacher=program.module(), implementation="student", shapes=((2, 9), (1, 1)))
    sites = find_attention(capture).sites
    windows = [s.window for s in sites]
    assert windows == ([6, 6] if policy == "none" else [None, 6])
    assert [s.first for s in sites] == [int(w is not None) for w in windows]
    stateful = make_stateful(capture, max_length=64)
    assert [layer.index for layer in stateful.layers] == ([0, 0, 1, 1] if policy == "none" else [0, 1, 1])
    assert stateful.depth == 2 and len(set(stateful.state_names)) == len(stateful.state_names)
    held = [layer.shape(part, batch=1, past=50) for layer in stateful.layers for part in layer.parts]
    assert held.count((1, 2 * 6, KV_HEADS * DIM)) == windows.count(6) and all(c.passed for c in stateful.checks)
    whole = make_stateful(capture, verify=False, max_length=64, bounded=False)
    assert [layer.held for layer in whole.layers] == [layer.held for layer in stateful.layers]
    rows, ids = [example_ids(1, n, VOCAB, seed=n) for n in (31, 9)], torch.zeros(2, 31, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -row.shape[1] :], mask[i, -row.shape[1] :] = row[0], 1
    logits, _ = run_chunks(stateful, ids, (1, 3, 17, 10), mask=mask, dtype=torch.float32)
    for i, row in enumerate(rows):  # padded on the left, in chunks shorter and longer than the window
        torch.testing.assert_close(logits[i, -row.shape[1] :], student.logits(row)[0], rtol=0, atol=1e-4)
    info = {"bos_token_id": 1, "eos_token_id": 2, "context_length": 64}
    artifact = export_onnx(stateful, tmp_path, config=ExportConfig(max_length=64), info=info)
    checks = check_parity(artifact, stateful, whole=student.logits, prompts=[[3, 4, 5, 6, 7, 8, 9, 10]], new_tokens=16)
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]


def test_a_window_longer_than_the_context_is_whole_beyond_it():
    """A student without caches runs on where its teacher's context ends."""
    capture = capture_of_student("is_causal", "none", local_window=12)
    stateful, ids = make_stateful(capture, max_length=8), example_ids(2, 30, VOCAB)
    assert {layer.window for layer in stateful.layers if layer.kind == "local"} == {12}
    logits, _ = run_chunks(stateful, ids, (1, 20, 9), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits, capture.gm(*capture.inputs(ids)), rtol=0, atol=1e-4)


def test_unequal_windows_have_states_of_one_shape(tmp_path: Path):
    """onnxruntime-genai takes no others: of a shorter window without a first token, a longer one, and none."""
    stateful = make_stateful(
        capture_of_student(("window", "is_causal", "alibi"), "none", local_window=7), max_length=64
    )
    assert [(layer.window, layer.first) for layer in stateful.layers if layer.kind == "local"] == [(5, 0), (7, 1)]
    export_onnx(stateful, tmp_path, config=ExportConfig(max_length=64), info={"context_length": 64})
    session = OnnxSession(tmp_path, threads=1)
    shapes = dict(zip(session.state_names, session.state_shapes(3), strict=True))
    assert {shapes[f"past_key_values.{i}.conv_state"] for i in range(3)} == {(1, 2 * 7, KV_HEADS * DIM)}
    prompt = example_ids(1, 17, VOCAB, seed=1)[0].tolist()
    expected, _ = torch_generate(stateful, prompt, 20)
    assert list(session.generate(prompt, 20)) == expected and len(set(expected)) > 10
    session.reset()
    session.prefill(prompt[:9])
    session.snapshot().save(tmp_path / "state.npz")
    session.step(1)
    session.restore(SessionState.load(tmp_path / "state.npz"))
    assert list(session.generate(prompt[9:], 20)) == expected


def test_batches_are_run_whole_where_only_windows_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows of unequal lengths, in chunks behind others."""
    stateful = make_stateful(capture_of_student("is_causal", "none", local_window=6), verify=False, max_length=64)
    export_onnx(stateful, tmp_path, config=ExportConfig(max_length=64), info={"context_length": 64})
    session, rows = OnnxSession(tmp_path, threads=1), []
    run = session._run_rows
    monkeypatch.setattr(session, "_run_rows", lambda ids, mask, row: (rows.append(row), run(ids, mask, row))[1])
    ids, mask = example_ids(3, 30, VOCAB), torch.ones(3, 30, dtype=torch.int64)
    mask[1, :7], mask[2, 11:] = 0, 0
    session.reset(batch=3)
    found = [session.forward(i.numpy(), m.numpy()) for i, m in zip(ids.split(13, 1), mask.split(13, 1), strict=True)]
    exact, _ = run_chunks(stateful, ids, (30,), mask=mask, dtype=torch.float32)
    difference = (torch.from_numpy(np.concatenate(found, 1)) - exact)[mask == 1]
    assert rows == [None] * 3 and difference.abs().max() < 1e-4


def test_in_profile_cuda_they_are_float16_as_caches_are(tmp_path: Path):
    """The one that a layer without a window has, too."""
    capture = capture_of_student(("window", "is_causal", "alibi"), "none", local_window=7)
    stateful = make_stateful(capture, verify=False, max_length=64)
    config, info = ExportConfig(max_length=64, profile="cuda"), {"context_length": 64}
    checks = check_parity(export_onnx(stateful, tmp_path, config=config, info=info), stateful, prompts=[], new_tokens=0)
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]
    graph = onnx.load(tmp_path / "model.onnx").graph
    states = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    windows = [kind for name, kind in states.items() if name.endswith(".conv_state")]
    assert windows == [onnx.TensorProto.FLOAT16] * 6
    assert states["past_key_values.0.recurrent_state"] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("bounded", [True, False])
def test_a_kept_core_that_sees_a_window_and_the_first_tokens_is_exported(tmp_path: Path, bounded: bool):
    capture, _ = scanned("window and first")
    stateful = make_stateful(capture, max_length=64, bounded=bounded)
    assert {(layer.window, layer.first, layer.held) for layer in stateful.layers} == {(5, 2, 6 if bounded else None)}
    artifact = export_onnx(stateful, tmp_path, config=ExportConfig(max_length=64), info={"context_length": 64})

    def whole(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return capture.gm(*capture.inputs(ids))

    checks = check_parity(artifact, stateful, whole=whole, prompts=[[3, 4, 5, 6, 7, 8, 9, 10]], new_tokens=16)
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]
