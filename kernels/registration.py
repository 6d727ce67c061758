"""Registration of an operator with less to do at each call than torch.library.custom_op has.

custom_op checks at every call that no result aliases an argument, which takes longer than a small kernel; the tests ask
torch.library.opcheck for the same once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def register(name: str, function: Callable[..., Any]) -> None:
    """Defines `name` ("tcal::...") with the schema of function's annotations; it mutates nothing and runs anywhere."""
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    torch.library.impl(name, "default", function)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, operators take tensors as they are. Where autocast is off nothing is entered, to save microseconds."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def on_device(op: str, *tensors: Tensor | None) -> AbstractContextManager[Any]:
    """The GPU of all these tensors as the current one. Raises ValueError where they lie on several devices, of which
    kernels that take addresses see nothing."""
    given = [x for x in tensors if x is not None]
    index = given[0].get_device()
    if any([x.get_device() != index for x in given]):  # a list, to save microseconds
        raise ValueError(f"{op}: want all tensors on one device, got {', '.join(str(x.device) for x in given)}")
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)
