"""Written-out softmax attention becomes scaled_dot_product_attention, each core proved equal on random q, k and v.

Scores that are soft-capped or have sinks beside them become softmax_attention, which has words for those.

The capture itself keeps the teacher's spelling, and so its bits; only what is analysed, converted or made stateful is
brought to this form.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node

from .base import PassResult, run_passes
from .graph import argument, aten, is_effect, module_path, placeholders, value
from .masks import Evaluator
from .softmax_attention import softmax_attention
from .types import Capture, Rejection
from .written_attention import (
    MERGED,
    SHAPING,
    SOFTMAX,
    Product,
    TokenGraph,
    Unfit,
    WrittenCore,
    concrete,
    reaches_softmax_over_tokens,
    recognise,
    token_graph,
)

BATCH, LENGTH = 2, 24  # of the proof
_SAME_SHAPE = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
}


def sdpa_name(output: str) -> str:
    """Name of the attention node that stands for the core whose last product is `output`."""
    return f"{output}_sdpa"


@dataclass(frozen=True)
class WrittenToSdpa:
    """Rewrites the written-out cores of a graph; with `only`, those whose last product has one of these names.

    A core that is not proved equal stays, with its reason in `rejected`. Names of new nodes depend on the core alone.
    """

    capture: Capture
    only: Collection[str] | None = None

    def run(self, gm: GraphModule) -> PassResult:
        t = token_graph(gm)
        work = _Rewrite(replace(self.capture, gm=gm), t)
        changed, rejected = 0, []
        for n in list(gm.graph.nodes):
            if n.target not in SOFTMAX or n not in t.data or not reaches_softmax_over_tokens(t, n):
                continue
            try:
                core = recognise(t, n)
                if self.only is None or core.output.name in self.only:
                    work.rewrite(core)
                    changed += 1
            except Unfit as e:
                rejected.append(Rejection(n.name, module_path(n), str(e)))
        if changed:
            gm.graph.eliminate_dead_code(is_impure_node=is_effect)
        return PassResult(changed, tuple(rejected))

    def ensures(self, gm: GraphModule) -> None:
        names = {n.name for n in gm.graph.nodes}
        assert self.only is None or {sdpa_name(n) for n in self.only} <= names


def to_sdpa(capture: Capture) -> tuple[Capture, tuple[Rejection, ...]]:
    """The capture with every core that can be in scaled_dot_product_attention's form; also what stays, with reasons.

    The graph is a copy with the same parameters, whose logits may differ by rounding; where nothing was written out it
    is the capture itself.
    """
    graph = Graph()
    graph.output(graph.graph_copy(capture.gm.graph, {})).meta = {}
    gm = GraphModule(capture.gm, graph)
    result = run_passes(gm, [WrittenToSdpa(capture)])["WrittenToSdpa"]
    return replace(capture, gm=gm) if result.changed else capture, result.rejected


@dataclass
class _Rewrite:
    """Inserts nodes into one graph; nodes of a core that fails its proof are taken out again."""

    capture: Capture
    t: TokenGraph
    made: list[Node] = field(default_factory=list)
    masks: dict[str, Node] = field(default_factory=dict)

    def rewrite(self, core: WrittenCore) -> None:
        self.made = []
        try:
            with self.graph.inserting_before(core.output):
                scale, softcap = self.scale(core)
                q, k, v, last = self.sdpa(core, self.mask(core), scale, softcap)
            self.prove(core, (q, k, v), last)
        except (Unfit, RuntimeError, IndexError, KeyError, TypeError, ValueError) as e:
            for n in reversed(self.made):
                self.graph.erase_node(n)
            self.masks = {key: n for key, n in self.masks.items() if n not in self.made}
            if isinstance(e, Unfit):
                raise
            raise Unfit(f"its products cannot be read as attention: {str(e).splitlines()[0][:120]}") from e
        core.output.replace_all_uses_with(last)

    @property
    def graph(self) -> Graph:
        return self.capture.gm.graph

    def call(self, like: Node, name: str, target: Any, *args: Any, **kwargs: Any) -> Node:
        n = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self.made.append(n)
        n.meta = {k: m for k, m in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
        fake = value(placeholders(self.capture.gm)[0]).fake_mode
        with fake, enable_python_dispatcher(), torch.no_grad():  # without it torch 2.11 takes sizes for numbers
            values = torch.fx.node.map_arg((args, kwargs), value)
            n.meta["val"] = target(*values[0], **values[1])
        return n

    def sdpa(self, core: WrittenCore, mask: Node, scale: float, softcap: float) -> tuple[Node, Node, Node, Node]:
        """Layouts around the attention node; returns the sources of q, k, v and the product's new value."""
        out, first, second = core.output, core.first, core.second
        q0, q_axes = _unpermuted(first.left, first.left_axes)
        k0, k_axes = _unpermuted(first.right, first.right_axes)
        v0, v_axes = _unpermuted(second.right, second.right_axes)
        order = _head_order(first)
        q = self.standard(core, q0, q_axes, order, "td", "q")
        k = self.standard(core, k0, k_axes, order, "sd", "k")
        v = self.standard(core, v0, v_axes, _head_order(second), "se", "v")
        heads, kv_heads = value(q).shape[1], value(k).shape[1]
        options: dict[str, Any] = {"scale": scale} | ({"enable_gqa": True} if heads != kv_heads else {})
        if value(mask).dtype not in (torch.bool, value(q).dtype):
            mask = self.call(out, f"{out.name}_mask", aten.to.dtype, mask, value(q).dtype)
        if softcap or core.sinks is not None:
            sinks = core.sinks
            for dim in (3, 2, 0) if sinks is not None else ():
                sinks = self.call(out, f"{out.name}_sinks", aten.select.int, sinks, dim, 0)
            y = self.call(out, sdpa_name(out.name), softmax_attention, q, k, v, mask, scale, softcap, sinks)
        else:
            target = aten.scaled_dot_product_attention.default
            y = self.call(out, sdpa_name(out.name), target, q, k, v, mask, 0.0, False, **options)
        return q0, k0, v0, self.restored(core, y, _head_order(second))

    def standard(self, core: WrittenCore, n: Node, axes: str, order: str, last: str, part: str) -> Node:
        """n as [B, heads, tokens, dim]: q, k or v as scaled_dot_product_attention takes them."""
        like, name = core.output, f"{core.output.name}_{part}"
        if MERGED in axes:
            n = self.permuted(like, name, n, axes, MERGED + last)
            heads = concrete(value(n).shape[0], {self.t.batch: 1})
            return self.call(like, name, aten.unflatten.int, n, 0, [-1, heads])
        ones = axes.count("1")
        heads_here = "".join(a for a in order if a in axes)
        n = self.permuted(like, name, n, axes, "b" + heads_here + "1" * ones + last)
        for _ in range(len(heads_here) + ones - 1):
            n = self.call(like, name, aten.flatten.using_ints, n, 1, 2)
        return n if heads_here or ones else self.call(like, name, aten.unsqueeze.default, n, 1)

    def restored(self, core: WrittenCore, y: Node, order: str) -> Node:
        """y [B, H, T, E] in the layout that the core's last product has."""
        like, name, axes = core.output, f"{core.output.name}_out", core.second.out_axes
        if MERGED in axes:
            y = self.call(like, name, aten.flatten.using_ints, y, 0, 1)
            return self.permuted(like, name, y, MERGED + "te", axes)
        size = dict(zip(axes, value(core.output).shape, strict=True))
        if len(order) > 1:
            y = self.call(like, name, aten.unflatten.int, y, 1, [int(size[a]) for a in order])
        elif not order:
            y = self.call(like, name, aten.squeeze.dim, y, 1)
        return self.permuted(like, name, y, f"b{order}te", axes)

    def permuted(self, like: Node, name: str, n: Node, axes: str, want: str) -> Node:
        if axes == want:
            return n
        left = list(axes)
        perm = []
        for a in want:  # "1" may stand there more than once
            perm.append(left.index(a))
            left[perm[-1]] = ""
        return self.call(like, name, aten.permute.default, n, perm)

    def mask(self, core: WrittenCore) -> Node:
        """What is added to the scores, [1 or B, 1 or H, T, T]: the way from scores to softmax, taken by scores of 0."""
        out = core.output
        rank, dtype = value(core.scores).ndim, value(core.scores).dtype
        ids = placeholders(self.capture.gm)[0]
        length = self.shared(out, aten.sym_size.int, ids, 1)
        options = {"dtype": dtype, "device": value(core.scores).device}
        image = self.shared(out, aten.zeros.default, [1] * (rank - 2) + [length, length], **options)
        if core.scores.target is aten.baddbmm.default:
            bias = self.shared(out, aten.mul.Tensor, core.scores.args[0], argument(core.scores, "beta", 1))
            image = self.shared(out, aten.add.Tensor, image, bias)
        env = {core.scores: image}
        for n in core.between:
            before = env.get(n.args[0]) if n.target in SHAPING - _SAME_SHAPE else None  # type: ignore[arg-type]
            if before is not None and self.t.dims(before) != self.t.dims(n.args[0]):  # type: ignore[arg-type]
                env[n] = self.ranked(out, before, value(n).ndim)
            else:
                args, kwargs = torch.fx.node.map_arg((n.args, n.kwargs), lambda i: env.get(i, i))
                env[n] = self.shared(out, n.target, *args, **kwargs)
        return self.ranked(out, env[core.end], 4)

    def ranked(self, like: Node, image: Node, rank: int) -> Node:
        """The image with so many dimensions; those before the tokens are 1."""
        while value(image).ndim > rank:
            if value(image).shape[0] != 1:
                raise Unfit(self.bias(image))
            image = self.shared(like, aten.squeeze.dim, image, 0)
        while value(image).ndim < rank:
            if value(image).shape[0] != 1 and value(image).ndim > 2:
                raise Unfit(self.bias(image))
            image = self.shared(like, aten.unsqueeze.default, image, 0)
        return image

    def bias(self, image: Node) -> str:
        """Why an image that differs between heads or sequences is refused."""
        added = Evaluator(self.capture, LENGTH, batch=BATCH)(image).float()
        largest = added[added > -1e4].abs().max().item()
        return f"a position bias on the scores: adds values up to {largest:.3g} that differ between heads"

    def shared(self, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """One node for all cores that need the same value."""
        key = f"{target} {args} {kwargs}"
        if key not in self.masks:
            self.masks[key] = self.call(like, f"{like.name}_mask", target, *args, **kwargs)
        return self.masks[key]

    def sample(self, n: Node, seed: int) -> Tensor:
        symbols = {self.t.batch: BATCH, self.t.length: LENGTH}
        shape = [concrete(d, symbols) for d in value(n).shape]
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return made.to(value(n).device, value(n).dtype)

    def step(self, core: WrittenCore, score: float) -> float:
        """What a score adds, read off the scores' way to the softmax in float64 where the graph allows.

        Scores are 0, then 0 and `score` in turn along the keys; what counts is the step from key to key, because a
        softmax does not see what is added to a whole row.
        """
        zeros = torch.zeros_like(self.sample(core.scores, 0))
        turns = torch.arange(LENGTH, device=zeros.device) % 2
        steps = zeros.new_zeros(0, dtype=torch.float64)
        for dtype in (torch.float64, zeros.dtype):
            try:
                both = ({core.scores: (zeros + x).to(dtype)} for x in (0, score * turns))
                low, high = (Evaluator(self.capture, LENGTH, known, batch=BATCH)(core.end) for known in both)
                seen = (low > -1e4)[..., 1:] & (low > -1e4)[..., :-1]
                steps = ((high - low).double().diff(dim=-1) * turns.diff())[seen]
                break
            except RuntimeError:
                if dtype == zeros.dtype:
                    raise
        if steps.numel() == 0 or (steps - steps[0]).abs().max() > 1e-5 * steps[0].abs():
            raise Unfit("its scores are not scaled by one factor")
        return steps[0].item()

    def scale(self, core: WrittenCore) -> tuple[float, float]:
        """Factor of q k^T, and c where the scores are c tanh(scale q k^T / c), else 0."""
        alpha = argument(core.scores, "alpha", 1) if core.scores.target is aten.baddbmm.default else 1
        cap = self.step(core, 1e9) if any(n.target is aten.tanh.default for n in core.between) else 0.0
        found = alpha * (cap / 1e-3 * math.atanh(self.step(core, 1e-3) / cap) if cap else self.step(core, 1.0))
        if found <= 0:
            raise Unfit(f"its scores are scaled by {found:.3g}, want a positive factor")
        dim = value(core.first.left).shape[core.first.left_axes.index("d")]
        usual = [u for u in (1.0, 1 / math.sqrt(int(dim))) if abs(found - u) < 1e-6 * u]  # float32 rounds it
        return usual[0] if usual else found, cap

    def prove(self, core: WrittenCore, sources: tuple[Node, Node, Node], last: Node) -> None:
        """Both forms on the same random q, k, v: Unfit when they differ by more than rounding."""
        known = {n: self.sample(n, i) for i, n in enumerate(sources)}
        old, new = (Evaluator(self.capture, LENGTH, known, batch=BATCH)(n) for n in (core.output, last))
        if self.t.dims(last) != self.t.dims(core.output):
            raise Unfit(f"as attention it has the shape {self.t.dims(last)}, not {self.t.dims(core.output)}")
        error, most = (old - new).abs().max().item(), old.abs().max().item()
        if not error <= max(1e-5, 8 * torch.finfo(old.dtype).eps) * most:
            what = f"on random q, k, v it differs by {error:.2g} of {most:.2g}"
            raise Unfit(f"it is not softmax(scale q k^T + mask) v: {what}")


def _head_order(product: Product) -> str:
    """Head axes, those that keys and values have before those that they share."""
    heads = [a for a in product.left_axes if a not in f"btsde1{MERGED}"]
    own = [a for a in product.right_axes if a in heads]
    return "".join(own + [a for a in heads if a not in own])


def _unpermuted(node: Node, axes: str) -> tuple[Node, str]:
    """Above transposes and permutes, with the axes as they are there."""
    while True:
        rank = len(axes)
        if node.target is aten.transpose.int:
            perm = list(range(rank))
            a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[call-overload,arg-type]
            perm[a], perm[b] = b, a
        elif node.target is aten.permute.default:
            perm = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr,arg-type]
        else:
            return node, axes
        node, axes = node.args[0], "".join(axes[perm.index(i)] for i in range(rank))  # type: ignore[assignment]
