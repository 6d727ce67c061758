"""Reads a mask's meaning by evaluating the mask's own sub-graph, never by trusting a flag's name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .graph import get_tensor, inputs, placeholders
from .limits import MAX_PROBE
from .types import Capture

SHORT, LONG = 48, 603  # lengths at which every mask is evaluated


@dataclass(frozen=True)
class MaskFacts:
    """kind: causal, none, bias (values other than 0 and -inf) or other. window: visible tokens, None for all.

    first: tokens at the start that are visible whatever the window. slopes: per head or one for all, what a score loses
    with each token of distance, where values are added that are -slope distance but for what a whole row has in common.
    """

    kind: str
    window: int | None
    detail: str
    slopes: tuple[float, ...] = ()
    first: int = 0


class Evaluator:
    """Evaluates chosen nodes of a graph on ids [batch, length], computing only what they need beyond `known`."""

    def __init__(
        self, capture: Capture, length: int, known: Mapping[Node, Tensor] | None = None, *, batch: int = 1
    ) -> None:
        self._gm: GraphModule = capture.gm
        device = next((p.device for p in capture.gm.parameters()), None)
        args = capture.inputs(torch.ones(batch, length, dtype=torch.long, device=device))
        self._env: dict[Node, Any] = dict(zip(placeholders(capture.gm), args, strict=True)) | dict(known or {})

    @torch.no_grad()
    def __call__(self, target: Node) -> Any:
        stack = [target]
        while stack:
            n = stack[-1]
            if n in self._env:
                stack.pop()
            elif n.op == "get_attr":
                self._env[n] = get_tensor(self._gm, str(n.target))
            elif missing := [i for i in inputs(n) if i not in self._env]:
                stack += missing
            else:
                args, kwargs = torch.fx.node.map_arg((n.args, n.kwargs), lambda i: self._env[i])
                self._env[n] = n.target(*args, **kwargs)  # type: ignore[operator]
        return self._env[target]


def classify_mask(mask: Tensor) -> MaskFacts:
    """mask [..., L, L], boolean (True = visible) or additive."""
    length = mask.shape[-1]
    if mask.shape[-2] not in (1, length):
        return MaskFacts("other", None, f"is of {mask.shape[-2]} x {length} tokens, want as many keys as queries")
    rows = mask.reshape(-1, length, length)
    if mask.dtype == torch.bool:
        visible, finite = rows, rows.new_zeros(1, dtype=torch.float32)
    else:
        visible = rows > -1e4  # additive masks hide with the dtype's minimum or -inf
        finite = rows[visible].float()
    slopes: tuple[float, ...] = ()
    if finite.numel() and finite.abs().max() > 0:
        slopes = _slopes(mask, mask > -1e4)
        if not slopes:
            added = f"adds values up to {finite.abs().max().item():.3g} to the scores"
            return MaskFacts("bias", None, f"{added}, which are no multiple of the distance")
    facts = _classify_visible(visible)
    return replace(facts, slopes=slopes, detail=facts.detail + (", with alibi slopes" if any(slopes) else ""))


def _slopes(mask: Tensor, visible: Tensor) -> tuple[float, ...]:
    """MaskFacts.slopes of an additive mask [.., 1 or H, L, L], to 1e-6 of its largest value; () where it has none."""
    length = mask.shape[-1]
    values, seen = (x.reshape(-1, *x.shape[-3:]) if x.ndim > 2 else x[None, None] for x in (mask.double(), visible))
    last = seen[0, 0, -1].nonzero().flatten()
    if not torch.equal(seen, seen[:1, :1].expand_as(seen)) or len(last) < 2 or not seen[0, 0].diagonal().all():
        return ()
    if not torch.equal(values.where(seen, 0), values[:1].where(seen, 0).expand_as(values)):
        return ()
    near, far = int(last[-1]), int(last[0])
    slopes = (values[0, :, -1, near] - values[0, :, -1, far]) / (near - far)
    rest = values[0] - slopes[:, None, None] * torch.arange(length, device=mask.device)
    rest = (rest - rest.diagonal(dim1=1, dim2=2)[..., None])[seen[0].expand_as(rest)]
    if not rest.abs().max() <= 1e-6 * values[seen.expand_as(values)].abs().max():
        return ()
    return tuple(slopes.tolist())


def _classify_visible(visible: Tensor) -> MaskFacts:
    """visible [N, L, L] bool."""
    length = visible.shape[-1]
    if not torch.equal(visible, visible[:1].expand_as(visible)):
        return MaskFacts("other", None, "differs between heads or sequences")
    seen = visible[0]
    steps = torch.arange(length)
    distance = steps[:, None] - steps[None, :]
    if torch.equal(seen, distance >= 0):
        return MaskFacts("causal", None, f"equals the lower triangle at {length} tokens")
    if bool(seen.all()):
        return MaskFacts("none", None, f"hides nothing at {length} tokens")
    first = int(seen[-1].long().cumprod(0).sum())  # visible ones before the first hidden one
    window = int(seen[-1].sum()) - first
    if torch.equal(seen, (distance >= 0) & ((distance < window) | (steps < first))):
        beside = f" and the first {first}" if first else ""
        return MaskFacts(
            "causal", window, f"equals a causal window of {window}{beside} at {length} tokens", first=first
        )
    future = (seen & (distance < 0)).nonzero()
    if len(future):
        row, col = future[0].tolist()
        return MaskFacts("other", None, f"at T={length} row {row} sees column {col}")
    return MaskFacts("other", None, f"hides past tokens in a pattern that is no window, at T={length}")


def _constants(capture: Capture, mask: Node) -> tuple[set[int], set[int]]:
    """Whole numbers in the mask's sub-graph, and sizes of its tables: windows among them decide how long to probe."""
    seen: set[Node] = set()
    found: set[int] = set()
    sizes: set[int] = set()
    stack = [mask]
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        stack += inputs(n)
        values = torch.utils._pytree.tree_leaves((n.args, n.kwargs))
        if n.op == "get_attr":
            table = get_tensor(capture.gm, str(n.target))
            sizes |= {size for size in table.shape[-2:] if 1 < size <= MAX_PROBE} if table.ndim > 1 else set()
            values = table.flatten().tolist() if table.numel() <= 64 else []
        for a in values:
            if isinstance(a, int | float) and not isinstance(a, bool) and a == a and 1 < abs(a) < 2**31:
                found.add(int(abs(a)))
    return found, sizes


def probe_mask(capture: Capture, mask: Node) -> MaskFacts:
    """Evaluates the mask at short lengths, at its tables' sizes and at one beyond every constant of its sub-graph."""
    consts, sizes = _constants(capture, mask)
    far = max((c for c in consts if c <= MAX_PROBE), default=0)
    first = max((c for c in consts if c < far and far + c <= MAX_PROBE), default=0)
    beyond = {far + 3, far + first + 3} if far >= SHORT - 2 else set()  # a window, and one behind the first tokens
    facts, why = None, ""
    for length in sorted({SHORT, LONG, *sizes} | beyond):
        try:
            facts = classify_mask(Evaluator(capture, length)(mask))
        except RuntimeError as e:  # a table of fixed size ends before
            why = why or f"cannot be evaluated at {length} tokens: {e}"
            continue
        if facts.kind != "causal":
            return facts
    if facts is None:
        return MaskFacts("other", None, why)
    if facts.window is None and beyond and 2 * far <= MAX_PROBE:  # as many first tokens as the window has
        with suppress(RuntimeError):
            facts = classify_mask(Evaluator(capture, 2 * far + 3)(mask))
        if facts.kind != "causal":
            return facts
    if any(facts.slopes):  # in few bits slopes times positions are a line at first only
        with suppress(RuntimeError):  # a table of fixed size ends before
            facts = classify_mask(Evaluator(capture, 300)(mask))
    over = [c for c in consts if MAX_PROBE < c < 2**20]
    if facts.window is None and beyond:  # a window behind so many first tokens hides something beyond both
        over += sorted(c for c in consts if c <= far and far + c > MAX_PROBE)
    if over:
        return replace(facts, detail=f"{facts.detail}; constants {over} reach beyond the probe")
    return facts
