"""Other profiles than ort, of the student that the tests share: what their graphs are made of, and torch's numbers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.graph import copy_module
from tcal_compiler.passes.make_stateful import make_stateful, run_chunks
from tcal_compiler.passes.stateful_graph import StatefulGraph
from tcal_compiler.run_models import student_program
from tcal_compiler.runtime.config import ExportConfig
from tcal_compiler.runtime.onnx_export import OnnxArtifact, export_onnx
from tcal_compiler.runtime.onnx_parity import check_parity
from tcal_compiler.runtime.run_folder import RunFolder


@pytest.fixture(scope="module")
def student(shared_run: Path) -> StatefulGraph:
    """Layer 0 keeps its attention, the others are converted."""
    with RunFolder.open_existing(shared_run) as run:
        return make_stateful(student_program(run), verify=False, max_length=300)


def exported(student: StatefulGraph, profile: str, folder: Path) -> tuple[OnnxArtifact, onnx.ModelProto]:
    config = ExportConfig.model_validate({"profile": profile})
    artifact = export_onnx(student, folder, config=config, info={"context_length": 300})
    assert all(c.passed for c in artifact.checks)
    return artifact, onnx.load(artifact.path)


@pytest.mark.slow
def test_standard_is_standard_operators_with_torch_s_numbers(student: StatefulGraph, tmp_path: Path):
    """In ONNX Runtime and, independently of it, in onnx's reference implementation."""
    artifact, model = exported(student, "standard", tmp_path)
    assert {o.domain: o.version for o in model.opset_import} == {"": 27} and not model.functions
    assert {n.domain for n in model.graph.node} == {""}
    ops = Counter(n.op_type for n in model.graph.node)
    assert ops["LinearAttention"] == len(student.layers) - 1 and ops["Attention"] == 1
    checks = check_parity(artifact, student, prompts=[[3, 141, 59]], new_tokens=24, threads=1)
    assert len(checks) == 4 and all(c.passed for c in checks), checks
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert not config["search"]["past_present_share_buffer"]
    ids, state = example_ids(1, 6, student.vocab_size), [s.numpy() for s in student.empty_state(1)]
    feed = {i.name: np.zeros((1, 1, 1), np.float32) for i in model.graph.input if i.name.endswith("conv_state")}
    names = [i.name for i in model.graph.input if i.name not in feed]
    feed |= dict(zip(names, [ids.numpy(), np.ones((1, 6), np.int64), *state], strict=True))
    found = ReferenceEvaluator(model).run(["logits"], feed)[0]
    expected = run_chunks(student, ids, (6,), dtype=torch.float32)[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.slow
def test_cuda_has_half_products_and_caches_and_whole_states(student: StatefulGraph, tmp_path: Path):
    """Run on the CPU, which has kernels for all of it but widens the products."""
    artifact, model = exported(student, "cuda", tmp_path)
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    caches = {f"{side}.0.{part}" for side in ("past_key_values", "present") for part in ("key", "value")}
    assert {n for n, kind in types.items() if kind == half} == caches
    assert types["logits"] == types["past_key_values.1.recurrent_state"] == whole
    weights = {t.name: t.data_type for t in model.graph.initializer}
    matrices = [weights[n.input[1]] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    assert len(matrices) > 10 and set(matrices) == {half}
    checks = check_parity(artifact, student, threads=1)
    assert len(checks) == 3 and all(c.passed and c.measured > 0 for c in checks), checks
    wrong = replace(student, gm=copy_module(student.gm))
    with torch.no_grad():
        dict(wrong.gm.named_parameters())["tcal_mixers.1.dt_bias"].add_(2.0)
    assert not any(c.passed for c in check_parity(artifact, wrong, threads=1))


def test_nothing_is_reduced_over_no_columns_at_the_first_token(shared_run: Path, tmp_path: Path):
    """ONNX Runtime on a GPU refuses that; on the CPU it is a sum of 0."""
    model = onnx.load(shared_run / "onnx" / "model.onnx")
    reduced = [n.input[0] for n in model.graph.node if n.op_type.startswith("Reduce")]
    inside = list(dict.fromkeys(reduced))
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inside)
    onnx.save(model, tmp_path / "model.onnx")
    config = json.loads((shared_run / "onnx" / "genai_config.json").read_text())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {"input_ids": np.ones((1, 1), np.int64), "attention_mask": np.ones((1, 1), np.int64)}
    for i in session.get_inputs():
        sizes = [1, *(d if isinstance(d, int) else config["model"]["context_length"] for d in i.shape[1:])]
        feed.setdefault(i.name, np.zeros(sizes, np.float32))
    found = session.run(inside, feed)
    assert inside and all(v.size for v in found)
