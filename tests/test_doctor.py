"""tcal doctor: what it says of a machine where all is well, and of one where something is missing or wrong."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from collections.abc import Callable

import pytest
import torch
from command_line import done
from torch import Tensor

from tcal_compiler import doctor
from tcal_compiler.progress import Progress
from tcal_compiler.runtime import onnx_probe

OPS = ("gated_delta_rule", "gated_delta_step", "gated_rms_norm", "attention_statistics")
CPU = torch.device("cpu")


def test_what_it_says_where_all_is_well():
    found = json.loads(done("tcal", "doctor", "--json"))
    for row in (
        *(f"{op} on cpu" for op in OPS),
        "LinearAttention in onnxruntime",
        "GroupQueryAttention in onnxruntime",
    ):
        assert found[row].startswith("right: largest relative error "), row
    assert "GB free of" in found["memory"] and "free at" in found["disk"] and found["torch"] == torch.__version__
    assert "GPU" in found or "GPU 0" in found
    *plain, last = done("tcal", "doctor").splitlines()
    assert last == "all right"
    assert [line.split(": ")[0] for line in plain] == list(found)


def test_every_result_and_gradient_is_looked_at():
    assert set(doctor.op_errors("gated_delta_rule", CPU)) == {
        *("output", "state"),
        *(f"gradient of {n}" for n in ("q", "k", "v", "g", "beta", "state")),
    }
    assert set(doctor.op_errors("gated_rms_norm", CPU)) == {"output", *(f"gradient of {n}" for n in ("o", "gate", "w"))}


def test_what_is_missing_is_said_with_what_installs_it(monkeypatch):
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert doctor.package("gguf") == "not installed: pip install gguf, for GGUF teachers"
    assert doctor.package("onnx") == "not installed: pip install onnx"
    for gpu, said in ((False, "which torch does not see"), (True, "pip install onnxruntime-gpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert said in doctor.package("onnxruntime-gpu")


def test_what_is_not_right_is_counted_at_the_end():
    errors = {"output": 1.0}
    found = {"a": doctor.verdict(errors, 0.1), "b": doctor.failure(ValueError("x")), "c": "MISSING (x): y", "d": "x"}
    found |= {"onnx": "not installed: pip install onnx", "gguf": "not installed: pip install gguf"}
    found |= {"e": doctor.verdict(errors, 2.0), "f": f"float32 {found['a']}; it runs in plain PyTorch"}
    assert doctor.conclusion(found) == "5 not right: a, b, c, onnx, f"


def test_an_operator_that_onnxruntime_lacks(monkeypatch):
    monkeypatch.setitem(onnx_probe.CASES, "NoSuchAttention", onnx_probe.CASES["LinearAttention"])
    assert doctor.onnx_verdict("NoSuchAttention").startswith("MISSING (")
    assert "NoSuchAttention" in doctor.onnx_verdict("NoSuchAttention")


def test_a_wrong_operator_and_a_wrong_gradient(monkeypatch):
    def twice(*args):
        inputs, kinds, outputs, exact = onnx_probe._linear_attention(*args)
        return inputs, kinds, outputs, [exact[0] * 2, exact[1]]

    monkeypatch.setitem(onnx_probe.CASES, "LinearAttention", twice)
    assert doctor.onnx_verdict("LinearAttention") == "WRONG: largest relative error 5.0e-01 (output) against float64"
    assert doctor.verdict({"output": 1e-9, "gradient of k": float("nan")}, 1e-3).startswith("WRONG: ")


def failing(*_: object) -> dict[str, float]:
    raise RuntimeError("no\nPTX")


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda device, dtype, dim: {"y": 1e-6 if dtype == torch.float32 else 1e-1}, "bfloat16 WRONG: largest"),
        (failing, "float32 FAILS with RuntimeError: no PTX; it runs in plain PyTorch, try another version of triton"),
    ],
)
def test_a_kernel_that_fails_its_own_proof(check, said):
    assert said in doctor.triton_verdict(check, CPU, (64,))


def test_a_card_that_fails_is_told_of(monkeypatch):
    """What a driver raises stands in its rows, and every other row is there."""

    def broken(*_: object) -> tuple[int, int]:
        raise RuntimeError("CUDA driver version is insufficient\nfor CUDA runtime version")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    to = Tensor.to
    cuda = torch.device("cuda")
    monkeypatch.setattr(Tensor, "to", lambda self, *a, **b: broken() if a and a[0] == cuda else to(self, *a, **b))
    found = doctor.examine()
    said = "FAILS with RuntimeError: CUDA driver version is insufficient for CUDA runtime version"
    assert found["GPU 0"] == said
    for op in OPS:
        assert found[f"{op} on cuda"] == said and found[f"{op} on cpu"].startswith("right: ")
    assert all("FAILS with" in found[f"{op} in Triton"] for op in doctor.TRITON)


def test_the_check_that_is_being_made_is_shown(monkeypatch):
    said: list[str] = []

    class Shown(Progress):
        def begin(self, text: str, so_far: Callable[[], str] | None = None) -> None:
            assert so_far is not None
            said.append(text)
            self.now = so_far

    shown = Shown(quiet=True)
    found = doctor._checked(shown, "kernels", {n: lambda: said.append(shown.now()) or "right" for n in ("a", "b")})
    assert found == {"a": "right", "b": "right"}
    assert said == ["kernels", "a, 0/2, 0 s so far", "b, 1/2, 0 s so far"]


def test_proofs_are_called_with_what_they_take():
    for check, dims in doctor.TRITON.values():
        inspect.signature(check).bind(CPU, torch.float32, *dims)
