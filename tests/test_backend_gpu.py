"""The torch.compile backend on a GPU, against the program that the run folder ships, on the CPU."""

from __future__ import annotations

import pytest
import torch
from test_backend import _fresh_dynamo, compiled, converting, exported, ids_of, refused
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from examples.tiny_torch_teacher import factory
from tcal_compiler.errors import UnsupportedModelError

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
fresh_dynamo = _fresh_dynamo


def test_one_graph_for_all_lengths_holds_our_ops(shared_run):
    model, student = compiled(factory().to(DEVICE), shared_run, compiler="inductor"), exported(shared_run)
    _, codes = run_and_get_code(model, ids_of(2, 9).to(DEVICE))  # resets Dynamo first
    assert sum("torch.ops.tcal.gated_delta_rule" in code for code in codes) == 1
    graphs = counters["stats"]["unique_graphs"]
    for shape in ((3, 70), (2, 33), (2, 9)):
        ids = ids_of(*shape)
        wanted = student(ids)
        torch.testing.assert_close(model(ids.to(DEVICE)).cpu(), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    assert counters["stats"]["unique_graphs"] == graphs > 0 and not counters["graph_break"]


def test_the_first_call_converts():
    here, there = factory(), factory().to(DEVICE)
    batches = [ids_of(3, 24, seed=s) for s in range(2)]
    expected = converting(here, batches, align={"steps": 0})(ids_of(2, 9))
    torch._dynamo.reset()
    fast = converting(there, [b.to(DEVICE) for b in batches], align={"steps": 0})
    torch.testing.assert_close(fast(ids_of(2, 9).to(DEVICE)).cpu(), expected, rtol=0, atol=1e-2)
    there.train()
    with refused(UnsupportedModelError, "training mode"):
        fast(ids_of(2, 9).to(DEVICE))
