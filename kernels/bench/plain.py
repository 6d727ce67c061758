"""Plain PyTorch in bfloat16: what errors of kernels that multiply in bfloat16 are to be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

bmm, baddbmm, baddbmm_ = torch.ops.aten.bmm, torch.ops.aten.baddbmm.default, torch.ops.aten.baddbmm_.default


class Bfloat16Products(TorchDispatchMode):
    """Inside, batched products are those of torch.bmm of bfloat16 tensors, whose sums are float32 and whose results are
    bfloat16, as under torch.autocast; what they are added to, and all else, stays as it is. Our chunked path makes no
    other products.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in (bmm.default, bmm.out):
            product = _product(*args)
            return given["out"].copy_(product) if func is bmm.out else product
        if func in (baddbmm, baddbmm_):
            x, *factors = args
            assert set(given) <= {"alpha"}, given
            return (x.add_ if func is baddbmm_ else x.add)(_product(*factors), **given)
        return func(*args, **given)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.bfloat16(), b.bfloat16()).to(a.dtype)
