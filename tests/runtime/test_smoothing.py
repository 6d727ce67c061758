"""Inputs evened out before quantising: the same function, and channels of very different size cost nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_models import DIM, HEADS, VOCAB, capture_of_student

from tcal_compiler.passes.make_stateful import make_stateful
from tcal_compiler.runtime import quantize
from tcal_compiler.runtime.config import ExportConfig
from tcal_compiler.runtime.onnx_export import export_onnx
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.smoothing import smooth

IDS = np.random.default_rng(1).integers(0, 256, (4, 64))


def matrices(model: onnx.ModelProto) -> set[str]:
    return {t.name for t in model.graph.initializer if len(t.dims) == 2 and min(t.dims) >= 64}


def products(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Matrices by the input that they are multiplied with."""
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices(model):
            found.setdefault(node.input[0], []).append(node.input[1])
    return found


def saved(model: onnx.ModelProto, source: Path, folder: Path) -> Path:
    """In a folder of its own, with what lies beside the source."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(source.with_name("genai_config.json"), folder / "genai_config.json")
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def logits(path: Path) -> np.ndarray:
    session = OnnxSession(path, threads=1)
    session.reset(batch=len(IDS))
    return session.forward(IDS)


def test_the_function_stays_and_constants_take_the_factors(shared_run, tmp_path):
    source = shared_run / "onnx/model.onnx"
    model = onnx.load(source)
    before = len(model.graph.node)
    count = smooth(model, source, matrices(model))
    kept = sum(n.op_type == "GroupQueryAttention" for n in model.graph.node)
    assert count == len(products(model)) > 4 * kept > 0
    assert len(model.graph.node) == before + kept  # only behind attention is there no constant
    np.testing.assert_allclose(logits(saved(model, source, tmp_path / "a")), logits(source), rtol=1e-4, atol=2e-4)


def test_a_window_beside_a_state_takes_its_part(tmp_path):
    """Behind a converted layer products read a sum, of which both scales take the factors, one of them by head."""
    stateful = make_stateful(capture_of_student("is_causal", "none", local_window=7), verify=False, max_length=128)
    source = export_onnx(stateful, tmp_path, config=ExportConfig(max_length=128), info={"context_length": 128}).path
    model = onnx.load(source)
    makers = {o: n for n in model.graph.node for o in n.output}
    behind = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[0] in makers]
    sums = [n for n in behind if (m := makers[n.input[0]]).op_type == "Reshape" and makers[m.input[0]].op_type == "Add"]
    before = len(model.graph.node)
    assert smooth(model, source, {n.input[1] for n in sums}) == 2 and len(model.graph.node) == before
    scales = [list(t.dims) for t in model.graph.initializer if t.dims and t.dims[0] == HEADS]
    assert scales.count([HEADS, DIM]) == 4 and [HEADS, 1] not in scales
    runs = [OnnxSession(p, threads=1) for p in (source, saved(model, source, tmp_path / "a"))]
    for session in runs:
        session.reset(batch=len(IDS))
    np.testing.assert_allclose(*(session.forward(IDS % VOCAB) for session in runs), rtol=1e-4, atol=2e-4)


def with_outliers(model: onnx.ModelProto, factor: float) -> int:
    """The same function with every 16th channel of what norms with weights give that much larger; how many norms."""
    tensors = {t.name: t for t in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    count = 0
    for node in model.graph.node:
        own = readers.get(node.output[0], []) if node.op_type == "Mul" else []
        vectors = [tensors[i] for i in node.input if i in tensors and len(tensors[i].dims) == 1]
        if not vectors or not own or any(n.op_type != "MatMul" or n.input[1] not in tensors for n in own):
            continue
        if len(readers[vectors[0].name]) > 1:
            continue
        scale = np.where(np.arange(vectors[0].dims[0]) % 16, 1, factor).astype(np.float32)
        changes = [(vectors[0], scale)] + [(tensors[n.input[1]], 1 / scale[:, None]) for n in own]
        for tensor, by in changes:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * by, tensor.name))
        count += 1
    return count


def test_large_channels_cost_nothing(shared_run, tmp_path, monkeypatch):
    model = onnx.load(shared_run / "onnx/model.onnx")
    assert with_outliers(model, 64.0) > 2
    plain = shared_run / "onnx/model.onnx"
    source = saved(model, plain, tmp_path / "outliers")
    np.testing.assert_allclose(logits(source), logits(plain), rtol=1e-4, atol=2e-4)

    def kl(of: Path, name: str) -> float:
        made = quantize.quantize(of, tmp_path / name, "int8")
        shutil.copyfile(plain.with_name("genai_config.json"), made.with_name("genai_config.json"))
        return quantize.divergence(OnnxSession(plain, threads=1), OnnxSession(made, threads=1), IDS).kl

    even, evened = kl(plain, "even"), kl(source, "evened")
    monkeypatch.setattr(quantize, "smooth", lambda *_: 0)
    assert evened == pytest.approx(even, rel=0.2) and kl(source, "uneven") > 5 * even
