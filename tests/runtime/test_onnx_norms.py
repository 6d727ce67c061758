"""Norms and gates of an exported graph: one operator each in ONNX Runtime, with torch's numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from tcal_compiler.kernels.gated_rms_norm import gated_rms_norm
from tcal_compiler.kernels.gates import decay_gate, l2_normalize
from tcal_compiler.kernels.gates.onnx_rule import translation_table
from tcal_compiler.runtime.onnx_norms import fuse_norms

HEADS, DIM = 3, 8


class Norms(nn.Module):
    """An RMS norm with weights, one without, an L2 norm, a gated norm of heads: all that a student has."""

    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(HEADS * DIM, generator=gen))
        self.heads = nn.Parameter(torch.randn(HEADS, DIM, generator=gen))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        split = x.unflatten(-1, (HEADS, DIM))
        return self.weight * normed, -normed, -l2_normalize(split), gated_rms_norm(2 * split, split, self.heads)


class OtherNorms(nn.Module):
    """Close to a norm over the last axis, and none."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rate = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        along = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)
        return along, x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5), (x + 1) * rate, rate


class Decays(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = torch.linspace(-1, 1, x.shape[-1])
        return decay_gate(x, heads, heads.flip(0)), nn.functional.softplus(x, beta=2.5)


def inputs() -> Tensor:
    """[2, 5, 24] with tokens of very different size, so that eps matters for some."""
    x = torch.randn(2, 5, HEADS * DIM, generator=torch.Generator().manual_seed(1))
    return x * torch.tensor([1e-4, 1e-2, 0.0, 1.0, 30.0])[:, None]


def exported(model: nn.Module, folder: Path, *, fuse: bool) -> tuple[list[np.ndarray], Counter[str], int]:
    """Outputs in ONNX Runtime, the operators that it runs, and the number of norms found."""
    program = torch.export.export(model, (inputs(),), dynamic_shapes=({1: torch.export.Dim("tokens")},))
    onnx_program = torch.onnx.export(program, dynamo=True, opset_version=21, verbose=False,
                                     custom_translation_table=translation_table())  # fmt: skip
    assert onnx_program is not None
    count = fuse_norms(onnx_program.model) if fuse else 0
    onnx_ir.save(onnx_program.model, folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: inputs().numpy()})
    return found, Counter(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node), count


def test_every_norm_is_one_operator(tmp_path: Path):
    model = Norms()
    found, ops, count = exported(model, tmp_path, fuse=True)
    assert count == 3 and ops["Reciprocal"] == ops["Sqrt"] == ops["ReduceMean"] == ops["ReduceSum"] == 0
    assert ops["SimplifiedLayerNormalization"] == count
    with torch.no_grad():
        exact = model.double()(inputs().double())
        for onnx_output, wide in zip(found, exact, strict=True):
            np.testing.assert_allclose(onnx_output, wide.numpy(), rtol=2e-6, atol=1e-6)


def test_what_is_no_norm_stays(tmp_path: Path):
    found, ops, count = exported(OtherNorms(), tmp_path, fuse=True)
    assert count == 0 and ops["Reciprocal"] == 3 and ops["SimplifiedLayerNormalization"] == 0
    for onnx_output, wide in zip(found, OtherNorms()(inputs().double()), strict=True):
        np.testing.assert_allclose(onnx_output, wide.numpy(), rtol=2e-5)


def test_a_runtime_does_not_fuse_torch_s_spelling(tmp_path: Path):
    """When this fails, fuse_norms is no longer needed for norms that have a mean."""
    assert exported(Norms(), tmp_path, fuse=False)[1]["SimplifiedLayerNormalization"] == 0


def test_softplus_is_one_operator(tmp_path: Path):
    found, ops, _ = exported(Decays(), tmp_path, fuse=True)
    assert ops["Softplus"] == 2 and ops["Where"] == ops["Greater"] == 0
    for onnx_output, wide in zip(found, Decays()(inputs().double()), strict=True):
        np.testing.assert_allclose(onnx_output, wide.numpy(), rtol=2e-6, atol=1e-6)
