"""Registration of an operator with less to do at each call than torch.library.custom_op has.

custom_op checks at every call that no result aliases an argument, which takes longer than a small kernel; the tests ask
torch.library.opcheck for the same once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register(name: str, function: Callable[..., Any]) -> None:
    """Defines `name` ("tcal::...") with the schema of function's annotations; it mutates nothing and runs anywhere."""
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    torch.library.impl(name, "default", function)
