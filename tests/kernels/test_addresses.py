"""That the interpreter's addresses are checked (`addresses`), as they are wherever tests run kernels in it."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted, interpreter_or_skip
from rule_cases import make_args
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = [interpreted, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]


@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def _first(x, y):
    tl.store(y + tl.program_id(0), tl.load(x))


PLANTED = {
    "load from x: bytes 16 to 28 of 24": lambda x, y: _copy[(2,)](x[:6], y, 7, BLOCK=4),
    "store to y: bytes 16 to 28 of 24": lambda x, y: _copy[(2,)](x, y[:6], 7, BLOCK=4),
    "load from x: bytes 16 to 24 of 20": lambda x, y: _copy[(2,)](x.view(2, 4)[:, 0], y, 6, BLOCK=4),
    "another program of the launch wrote it": lambda x, y: _first[(2,)](x[:1], x),
    "another program of the launch read it": lambda x, y: _first[(2,)](x[1:2], x),
}


@pytest.mark.parametrize("message", PLANTED)
def test_sees_what_is_planted(message):
    x, y = torch.zeros(8), torch.zeros(8)  # one beyond a part of them lies in their storage
    with interpreter_or_skip() as kernels:
        _copy[(2,)](x, y, 7, BLOCK=4)
        with pytest.raises(Exception, match=message):
            PLANTED[message](x, y)
    assert "_copy" in kernels


def views(*tensors: Tensor) -> list[Tensor]:
    """The same numbers as parts of larger tensors, between others."""
    wider = (torch.nn.functional.pad(x, (2, 1, 1, 0, 1, 2)) for x in tensors)
    return [w[:, 1:-2, 1:, 2:-1] for w in wider]


@pytest.mark.parametrize("columns", [16, 32])
@pytest.mark.parametrize("tokens", [1, 3])
def test_step_on_parts_of_larger_tensors(tokens, columns):
    from tcal_compiler.kernels.gated_delta_step.triton_kernel import Tile, gated_delta_step_triton

    q, k, v, g, beta, state = make_args((2, tokens, 4, 2, 24, 24), torch.float32)
    q, k, v, gate = views(q, k, v, torch.randn(2, tokens, 4, 24))
    given = dict(scale=0.3, normalize=True, in_place=tokens > 1, tile=Tile(32, columns, 1))
    with interpreter_or_skip() as kernels:
        gated_delta_step_triton(q, k, v, g, beta, state, gate, torch.randn(4, 24), **given)
    assert kernels == ({"_step"} if columns == 32 else {"_step", "_norm"})
