"""What the next token costs at an attention site in the deployed student, softmax and converted, on this machine.

H query heads, K key/value heads, D head dim, C model width, T tokens before.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from tcal_compiler.errors import ConfigError
from tcal_compiler.kernels.cached_attention import held_positions
from tcal_compiler.kernels.cached_attention.onnx_rule import is_fused
from tcal_compiler.kernels.local_attention import window_rows_reference
from tcal_compiler.passes.budget import Costs, cache_bytes
from tcal_compiler.passes.choose import budget_of, scored_by
from tcal_compiler.passes.local_windows import local_held
from tcal_compiler.passes.types import AttentionSite, SiteScan

Array = NDArray[Any]
ROUNDS = 9
MOST_COPIES, MOST_BYTES = 64, 1 << 28  # of what the sites of one size read; more than processors keep near
DOMAIN = "com.microsoft"


def step_seconds(scan: SiteScan, tokens: int, *, threads: int | None = None) -> dict[int, tuple[float, float]]:
    """Site -> seconds of a step behind so many tokens as softmax and as Gated DeltaNet.

    Measured with the operators of the profile ort in ONNX Runtime on the CPU, once for each distinct size. Softmax is
    GroupQueryAttention on a cache in place; converted is LinearAttention and the product of x with W_a, W_b and W_g,
    and the operators of a window beside the state where a site has one; what both forms have is in neither. A round
    steps once through as many caches as there are sites of the size, or MOST_BYTES of them, as the model does; of
    ROUNDS rounds, in which all forms take turns, the median counts.

    Raises ConfigError for a site whose sizes GroupQueryAttention does not take, or whose cache memory cannot hold.
    """
    found: dict[tuple[int, ...], tuple[float, float]] = {}
    costs = {}
    for site in scan.sites:
        _check(site, tokens)
    sizes = {s.index: _size(s, tokens) for s in scan.sites}
    for site in scan.sites:
        size = sizes[site.index]
        if size not in found:
            found[size] = _measure(site, size[-1], list(sizes.values()).count(size), threads)
        costs[site.index] = found[size]
    return costs


def _check(site: AttentionSite, tokens: int) -> None:
    where, dims = f"--policy, {site.layer or site.anchor}", {"key_dim": site.key_dim, "value_dim": site.value_dim}
    if not is_fused(site.key_dim, site.value_dim):
        what = f"no decode time is measured of {site.key_dim} key and {site.value_dim} value channels"
        raise ConfigError(where, what, "SIZE@TOKENS, N sites or P%")
    size = cache_bytes(tokens, kv_heads=site.num_kv_heads, window=site.window, first=site.first, **dims)
    if 3 * size > (free := psutil.virtual_memory().available):
        what = f"the cache of {tokens} tokens is {size} bytes, and {free} are free to time it with"
        raise ConfigError(where, what, "fewer tokens")


def policy_seconds(scan: SiteScan, policy: str) -> Costs | None:
    """step_seconds for a policy with a budget of time, None for any other. Raises ConfigError as they do."""
    if scored_by(policy) is None and not policy.startswith("uniform:"):
        return None
    budget = budget_of(scan, policy)
    return step_seconds(scan, budget.tokens) if budget.timed else None


def _size(site: AttentionSite, tokens: int) -> tuple[int, ...]:
    """All that a step's time depends on; last, the tokens whose keys and values the softmax form holds."""
    held = tokens if site.window is None else min(tokens, held_positions(site.window) + site.first)
    return site.num_heads, site.num_kv_heads, site.key_dim, site.hidden, site.local, site.local_first, held


def _measure(site: AttentionSite, held: int, sites: int, threads: int | None) -> tuple[float, float]:
    forms = [_Step(*make(site, held), sites, threads) for make in (_softmax, _converted)]
    forms += [_Step(*_window(site), sites, threads)] if site.local else []
    for form in forms:
        form.seconds()  # a warm-up
    rounds = [[form.seconds() for form in forms] for _ in range(ROUNDS)]
    softmax, *converted = (median(times) for times in zip(*rounds, strict=True))
    return softmax, sum(converted)


Form = tuple[list[Any], dict[str, Array], dict[str, str]]  # nodes, inputs, and which output overwrites which input


def _softmax(site: AttentionSite, tokens: int) -> Form:
    from onnx import helper

    heads, kv_heads, dim = site.num_heads, site.num_kv_heads, site.key_dim
    cache = np.full((1, kv_heads, tokens + 1, dim), 0.01, np.float32)
    inputs: dict[str, Array] = {"query": np.full((1, 1, heads * dim), 0.01, np.float32)}
    inputs |= {n: np.full((1, 1, kv_heads * dim), 0.01, np.float32) for n in ("key", "value")}
    inputs |= {"past_key": cache, "past_value": cache.copy()}
    inputs |= {"last": np.array([tokens], np.int32), "total": np.array(tokens + 1, np.int32)}
    kinds: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": site.scale}
    outputs = ["output", "keys", "values"]
    node = helper.make_node("GroupQueryAttention", list(inputs), outputs, domain=DOMAIN, **kinds)
    return [node], inputs, {"keys": "past_key", "values": "past_value"}


def _converted(site: AttentionSite, tokens: int) -> Form:
    from onnx import helper

    heads, dim = site.num_heads, site.key_dim
    inputs: dict[str, Array] = {n: np.full((1, 1, heads * dim), 0.01, np.float32) for n in ("query", "key", "value")}
    inputs |= {"past": np.full((1, heads, dim, dim), 0.01, np.float32)}
    inputs |= {"decay": np.full((1, 1, heads), -0.01, np.float32), "beta": np.full((1, 1, heads), 0.5, np.float32)}
    kinds: dict[str, Any] = {
        "q_num_heads": heads,
        "kv_num_heads": heads,
        "update_rule": "gated_delta",
        "scale": site.scale,
    }
    rule = helper.make_node("LinearAttention", list(inputs), ["output", "state"], domain=DOMAIN, **kinds)
    gates = heads * (dim + 2)
    given = {"x": np.full((1, 1, site.hidden), 0.01, np.float32), "W": np.full((site.hidden, gates), 0.01, np.float32)}
    return [rule, helper.make_node("MatMul", ["x", "W"], ["gates"])], inputs | given, {}


def _window(site: AttentionSite) -> Form:
    """A step of kernels/local_attention behind a whole window; its rows, which all sites share, are given."""
    import torch
    from onnx import helper

    slots, width = local_held(site.local, site.local_first), site.num_kv_heads * site.key_dim
    rows = window_rows_reference(
        torch.zeros(1, 1),
        torch.tensor([slots + 1]),
        torch.ones(1, dtype=torch.int64),
        torch.zeros(1),
        window=site.local,
        first=site.local_first,
        slots=slots,
        front=site.local_first,
        heads=site.num_heads,
        kv_heads=site.num_kv_heads,
    )
    inputs: dict[str, Array] = {f"{n}_rows": x.numpy() for n, x in rows._asdict().items()}
    inputs |= {"past": np.full((1, 2 * slots, width), 0.01, np.float32), "by_row": np.array([-1, site.key_dim])}
    inputs |= {n: np.full((1, 1, width), 0.01, np.float32) for n in ("key", "value")}
    inputs |= {"query": np.full((1, 1, site.num_heads * site.key_dim), 0.01, np.float32)}
    written: list[tuple[str, str, str, dict[str, Any]]] = [
        ("Concat", "past key value", "slots", {"axis": 1}),
        ("Reshape", "slots by_row", "table", {}),
        ("Gather", "table keys_rows", "keys", {}),
        ("Gather", "table values_rows", "values", {}),
        ("Reshape", "query by_row", "heads", {}),
        ("Gather", "heads queries_rows", "queries", {}),
        ("FusedMatMul", "queries keys", "scores", {"domain": DOMAIN, "transB": 1, "alpha": site.scale}),
        ("Add", "scores mask_rows", "masked", {}),
        ("Softmax", "masked", "weights", {}),
        ("MatMul", "weights values", "results", {}),
        ("Reshape", "results by_row", "result_rows", {}),
        ("Gather", "result_rows context_rows", "output", {}),
        ("GatherND", "slots held_rows", "held", {"batch_dims": 1}),
    ]
    nodes = [helper.make_node(op, given.split(), [made], **kinds) for op, given, made, kinds in written]
    return nodes, inputs, {}


class _Step:
    """A model of these nodes, and as many sets of its inputs as it has sites, each bound to its own memory."""

    def __init__(
        self, nodes: list[Any], inputs: dict[str, Array], in_place: dict[str, str], sites: int, threads: int | None
    ) -> None:
        import onnxruntime as ort
        from onnx import TensorProto, helper

        given = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in inputs.items()
        ]
        read = {n for node in nodes for n in node.input}
        self._results = [n for node in nodes for n in node.output if n not in read]
        made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in self._results]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(
            helper.make_graph(nodes, "step", given, made), opset_imports=opsets, ir_version=10
        ).SerializeToString()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads or 0
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        each = sum(x.nbytes for x in inputs.values())
        copies = max(1, min(sites, MOST_COPIES, MOST_BYTES // each))
        self._memory: list[Array] = []  # which ONNX Runtime uses and does not hold
        self._bindings = [self._bound(inputs, in_place) for _ in range(copies)]

    def _own(self, inputs: dict[str, Array]) -> dict[str, Array]:
        copies = {n: x.copy() for n, x in inputs.items()}
        self._memory += copies.values()
        return copies

    def _bound(self, inputs: dict[str, Array], in_place: dict[str, str]) -> Any:
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        values = {n: OrtValue.ortvalue_from_numpy(x) for n, x in self._own(inputs).items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._results:
            if name in in_place:
                binding.bind_ortvalue_output(name, values[in_place[name]])
            else:
                binding.bind_output(name, "cpu")
        return binding

    def seconds(self) -> float:
        """Of one site."""
        start = time.perf_counter()
        for binding in self._bindings:
            self._session.run_with_iobinding(binding)
        return (time.perf_counter() - start) / len(self._bindings)
