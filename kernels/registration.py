"""Registration of an operator with less to do at each call than torch.library.custom_op has.

custom_op checks at every call that no result aliases an argument, which takes longer than a small kernel; the tests ask
torch.library.opcheck for the same once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def register(name: str, function: Callable[..., Any]) -> None:
    """Defines `name` ("tcal::...") with the schema of function's annotations; it mutates nothing and runs anywhere."""
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    torch.library.impl(name, "default", function)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, operators take tensors as they are. Where autocast is off nothing is entered, to save microseconds."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """torch.cuda.device(device), where another one is current."""
    return nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)
