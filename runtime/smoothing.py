"""Channels of a product's input evened out before it is quantised.

Some channels of an input are many times as large as the rest of their block, which then keeps few of its bits. x W is
(x / s) (s W) for any s > 0, one for each of the K input channels; as in SmoothQuant (arXiv 2211.10438, migration
strength 1/2)

    s = sqrt(rms(x) / max |W|), max over the outputs of all products that read x,

in eighths of an octave, so that the last digits of a measurement change no byte. rms(x) is of random tokens: no text is
needed. 1 / s goes into the weights of the norm, or the matrix, that x comes from; only behind attention is it a product
with a vector.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcal_compiler.errors import ExportError

from .onnx_export import CONFIG_FILE
from .session import load_model, read_genai_config

SEQUENCES, LENGTH = 4, 128  # tokens that channels are measured on
_LEAST = 1e-4  # of the largest: what a channel that is never used counts as


def smooth(model: Any, source: Path, names: set[str]) -> int:
    """Changes the model, loaded from `source`, in place; returns the number of inputs that were evened out.

    names: matrices [K, N] that are to be quantised, of products MatMul(x, matrix). An input whose products share a
    matrix with another one stays as it is.

    Raises ExportError when the model cannot be run, or has no genai_config.json beside it.
    """
    readers = readers_of(model)
    products: dict[str, list[Any]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in names:
            products.setdefault(node.input[0], []).append(node)
    chosen = {x: own for x, own in products.items() if all(len(readers[n.input[1]]) == 1 for n in own)}
    if not chosen:
        return 0
    sizes = _channel_rms(source, sorted(chosen))
    work = _Folding(model, readers)
    matrices = {x: [_array(work.tensors[n.input[1]]) for n in own] for x, own in chosen.items()}
    factors = {x: _factors(sizes[x], matrices[x]) for x in chosen}
    for x, own in chosen.items():
        folds = all(n.op_type == "MatMul" and work.is_own(n.input[1], n) for n in readers[x])
        if folds and work.divide(x, factors[x]):
            own = readers[x]
        else:
            _divide(model.graph, x, own, factors[x])
        for node in own:
            work.multiply(node.input[1], factors[x][:, None])
    return len(chosen)


class _Folding:
    """Factors that go into the constants which a value is computed from."""

    def __init__(self, model: Any, readers: dict[str, list[Any]]) -> None:
        self.readers = readers
        self.makers = {o: n for n in model.graph.node for o in n.output}
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.outputs = {o.name for o in model.graph.output}

    def is_own(self, name: str, reader: Any) -> bool:
        """Whether it is a constant that nothing else reads."""
        return name in self.tensors and self.readers[name] == [reader]

    def multiply(self, name: str, factors: NDArray[np.float32]) -> None:
        """By factors that it may be broadcast to."""
        import onnx

        array = _array(self.tensors[name]) * factors
        self.tensors[name].CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), name))

    def divide(self, value: str, factors: NDArray[np.float32]) -> bool:
        """Divides a value by factors [K] of its last channels, whatever axes these are, in constants that made it.

        Returns False, with nothing changed, where no constants can take them.
        """
        inverse, found = (1 / factors).astype(np.float32), self._takers(value, len(factors))
        for name, shape in found:
            self.multiply(name, inverse.reshape(shape))
        return bool(found)

    def _takers(self, value: str, count: int) -> list[tuple[str, tuple[int, ...]]]:
        """Constants that together take factors of a value's last channels, with the shape that these have there."""
        maker = self.makers.get(value)
        if maker is None or value in self.outputs:
            return []
        kind = maker.op_type
        if kind == "MatMul" and self.is_own(maker.input[1], maker):
            return [(maker.input[1], (count,))]
        read = {"Mul": maker.input, "Add": maker.input, "Reshape": maker.input[:1], "Identity": maker.input[:1]}
        above = [self._takers(v, count) if self.readers[v] == [maker] else [] for v in read.get(kind, ())]
        if kind == "Add":  # a sum is divided where both of it are
            return [taker for found in above for taker in found] if all(above) else []
        own = [(n, shape) for n in maker.input if kind == "Mul" and (shape := self._channels(n, maker, count))]
        return next((found for found in (own[:1], *above) if found), [])

    def _channels(self, name: str, maker: Any, count: int) -> tuple[int, ...]:
        """The shape of factors for each channel of a constant, or () where it is none or not the maker's own.

        A constant has a number for each channel, or one for all of a head, in its last axis.
        """
        dims = list(self.tensors[name].dims) if self.is_own(name, maker) else []
        while dims[:1] == [1]:
            dims.pop(0)
        if len(dims) > 1 and dims[-1] == 1 and count % math.prod(dims) == 0:
            dims[-1] = count // math.prod(dims)
        return tuple(dims) if 1 not in dims and math.prod(dims) == count else ()


def readers_of(model: Any) -> dict[str, list[Any]]:
    """Value -> the nodes of an ONNX model that it goes into, once for each place."""
    found: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _array(tensor: Any) -> NDArray[np.float32]:
    import onnx

    return onnx.numpy_helper.to_array(tensor)  # type: ignore[return-value]


def _factors(rms: NDArray[np.float64], matrices: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """s [K], with a geometric mean near 1."""
    weights = np.max([np.abs(m).max(1) for m in matrices], 0).astype(np.float64)
    logs = [np.log2(np.maximum(v, _LEAST * v.max())) if v.max() else np.zeros_like(v) for v in (rms, weights)]
    exponents = (logs[0] - logs[1]) / 2
    return np.exp2(np.round(8 * (exponents - exponents.mean())) / 8).astype(np.float32)


def _divide(graph: Any, x: str, products: list[Any], factors: NDArray[np.float32]) -> None:
    """x / s in front of its first product."""
    import onnx

    name = f"{x}.smoothed"
    graph.initializer.append(onnx.numpy_helper.from_array(1 / factors, f"{x}.inverse"))
    node = onnx.helper.make_node("Mul", [x, f"{x}.inverse"], [name], name)
    graph.node.insert(next(i for i, n in enumerate(graph.node) if n.output[0] == products[0].output[0]), node)
    for product in products:
        product.input[0] = name


def random_tokens(source: Path) -> NDArray[np.int64]:
    """Sequences [N, T] for the model in the file `source`, no longer than its context.

    Raises ExportError when there is no genai_config.json beside it.
    """
    config, _ = read_genai_config(source.with_name(CONFIG_FILE))
    if not config:
        raise ExportError(str(source), f"has no {CONFIG_FILE} beside it", "a folder that tcal export wrote")
    length = min(LENGTH, config["context_length"])
    return np.random.default_rng(0).integers(0, config["vocab_size"], (SEQUENCES, length))


def _channel_rms(source: Path, values: list[str]) -> dict[str, NDArray[np.float64]]:
    """Root mean squares [K] of values [1, T, K] of the model in the file `source`, over random tokens."""
    session, tokens = _session_with(source, values), random_tokens(source)
    feeds = {i.name: _empty(i) for i in session.get_inputs()}
    total: dict[str, Any] = dict.fromkeys(values, 0.0)
    for row in tokens:
        feeds |= {"input_ids": row[None], "attention_mask": np.ones_like(row[None])}
        for name, value in zip(values, session.run(values, feeds), strict=True):
            total[name] = total[name] + np.square(value[0], dtype=np.float64).mean(0)
    return {name: np.sqrt(sums / len(tokens)) for name, sums in total.items()}


def _session_with(source: Path, values: list[str]) -> Any:
    """A session on the model that also gives these float32 values."""
    import onnx

    with tempfile.TemporaryDirectory() as work:
        probe = onnx.load(source, load_external_data=False)
        kinds = [onnx.helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, None) for v in values]
        probe.graph.output.extend(kinds)
        for data in {e.value for t in probe.graph.initializer for e in t.external_data if e.key == "location"}:
            shutil.copyfile(source.parent / data, Path(work, data))
        onnx.save(probe, Path(work, source.name))
        return load_model(Path(work, source.name), threads=1)


def _empty(given: Any) -> NDArray[Any]:
    """A state of one row before its first token."""
    return np.zeros([1, *(d if isinstance(d, int) else 0 for d in given.shape[1:])], np.float32)
