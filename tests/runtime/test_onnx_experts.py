"""Grouped products of experts in ONNX Runtime against one product for each row."""

from __future__ import annotations

import importlib
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tcal_compiler.errors import TeacherError
from tcal_compiler.runtime import program_archive, program_file
from tcal_compiler.runtime.onnx_experts import translation_table

EXPERTS, WIDTH, INNER = 3, 4, 5


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        import transformers.integrations.moe  # noqa: F401  registers the op

        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight, offs)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    path: Path = tmp_path_factory.mktemp("experts") / "model.onnx"
    args = (torch.randn(6, WIDTH), torch.tensor([2, 4, 6], dtype=torch.int32))
    program = torch.export.export(Experts(), args, dynamic_shapes=({0: torch.export.Dim("rows")}, None))
    torch.onnx.export(
        program, (), None, dynamo=True, opset_version=21, custom_translation_table=translation_table(program)
    ).save(path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("counts", [(2, 2, 2), (0, 1, 0), (3, 0, 4), (0, 0, 1)], ids=str)
def test_every_row_meets_its_expert(session: onnxruntime.InferenceSession, counts: tuple[int, ...]):
    x = torch.randn(sum(counts), WIDTH, generator=torch.Generator().manual_seed(1))
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    (found,) = session.run(None, {"x": x.numpy(), "offs": ends.numpy()})
    expert = [e for e, n in enumerate(counts) for _ in range(n)]
    exact = torch.stack([row @ Experts().weight[e] for row, e in zip(x, expert, strict=True)])
    torch.testing.assert_close(torch.from_numpy(found), exact.detach())


def test_a_saved_program_brings_its_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked, real = [], importlib.import_module
    monkeypatch.setattr(program_archive.importlib, "import_module", lambda name: asked.append(name) or real(name))
    args = (torch.randn(6, WIDTH), torch.tensor([2, 4, 6], dtype=torch.int32))
    torch.export.save(torch.export.export(Experts(), args), tmp_path / "experts.pt2")
    with pytest.raises(TeacherError, match="int64"):  # no language model
        program_file.load_program(tmp_path / "experts.pt2", allow_pickle=False)
    assert "transformers.integrations.moe" in asked
