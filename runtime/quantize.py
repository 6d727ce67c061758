"""An exported student with smaller weights, and how far its predictions moved.

fp16: matrices stored as float16 and widened when the model is loaded: a smaller file, not a smaller or faster model.
int8, int4: MatMulNBits, symmetric blocks of 128 8-bit or 32 4-bit weights with a scale each, products with int8
activations whose channels are evened out (smoothing.py). The head of int4 has 8 bits. Embeddings are float16 rows,
widened when they are read. Gated delta rules, attention and their states stay as they are, and so do matrices with an
edge below 64, such as the decay and write gates. int8-caches: int8, and so are keys and values of caches
(int8_caches.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tcal_compiler.errors import ExportError

from .int8_caches import ATTENTION, quantize_caches
from .onnx_export import DATA_FILE, FINGERPRINT, MODEL_FILE, SINGLE_FILE_LIMIT
from .session import OnnxSession
from .smoothing import random_tokens, readers_of, smooth

WeightType = Literal["fp16", "int8", "int8-caches", "int4"]
WEIGHT_TYPES: tuple[str, ...] = get_args(WeightType)
MOST_KL = {
    "fp16": 1e-4,
    "int8": 1e-2,
    "int8-caches": 1e-2,
    "int4": 1e-1,
}  # nats per token, where the user states no bound
BLOCKS = (128, 32)  # 8-bit weights with a common scale: what ONNX Runtime is fastest with, and what errs less
_BLOCK_OF_4_BITS = 32
_LEAST_EDGE = 64
_INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits


@dataclass(frozen=True)
class Divergence:
    """Means over tokens against a reference: kl = KL(reference || other) in nats, and both perplexities."""

    kl: float
    perplexity: float
    reference_perplexity: float
    tokens: int


def quantize(
    source: Path, folder: Path, dtype: WeightType, *, block: int = BLOCKS[0], ids: NDArray[np.int64] | None = None
) -> Path:
    """Writes the model `source` with weights of another type as folder/model.onnx; same input, same bytes.

    block: how many 8-bit weights have a common scale. ids [N, T]: tokens of a text, which caches are measured on where
    they become int8; random ones where None.

    Raises ExportError when the model cannot be read, run or written, or has no matrix, or no cache, that can be made
    smaller.
    """
    import onnx

    try:
        model = onnx.load(source)
    except Exception as e:  # protobuf raises types of its own
        raise ExportError(str(source), f"cannot be read: {' '.join(str(e).split())[:200]}", "tcal export again") from e
    changed = _halve_embeddings(model)
    if dtype == "fp16":
        changed += _halve_matrices(model)
    else:
        smooth(model, source, set(_matrices(model)))
        model, count = _to_blocks(model, 4 if dtype == "int4" else 8, block)
        changed += count
    if not changed:
        raise ExportError(str(source), f"holds no matrix that {dtype} makes smaller", "the float32 model")
    if dtype == "int8-caches" and not quantize_caches(model, source, random_tokens(source) if ids is None else ids):
        raise ExportError(str(source), f"holds no cache of {ATTENTION} that {dtype} makes smaller", "--dtype int8")
    for entry in model.metadata_props:
        if entry.key == FINGERPRINT:
            entry.value = f"{entry.value}-{dtype}" + f"-{block}" * (dtype != "fp16")
    path = folder / MODEL_FILE
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DATA_FILE).unlink(missing_ok=True)  # onnx would write behind what it holds
        if size > SINGLE_FILE_LIMIT:
            onnx.save(model, path, save_as_external_data=True, location=DATA_FILE)
        else:
            onnx.save(model, path)
    except OSError as e:
        raise ExportError(str(folder), f"cannot be written: {e.strerror or e}", "free space, or another folder") from e
    return path


def _matrices(model: Any) -> dict[str, Any]:
    """Float32 initializers with two dimensions, none of them short, by name."""
    import onnx

    return {
        t.name: t
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2 and min(t.dims) >= _LEAST_EDGE
    }


def _half(tensor: Any, name: str) -> Any:
    import onnx

    array = onnx.numpy_helper.to_array(tensor)
    if np.abs(array).max() > np.finfo(np.float16).max:
        largest = np.abs(array).max()
        raise ExportError(tensor.name, f"holds {largest:.3g}, more than float16 can", "int8, whose blocks have scales")
    return onnx.numpy_helper.from_array(array.astype(np.float16), name)


def _untie(model: Any) -> None:
    """A product with a transposed matrix gets a matrix of its own: the head, where it is the embedding."""
    import onnx

    matrices = _matrices(model)
    transposed = {n.output[0]: n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in matrices}
    for node in list(model.graph.node):
        if node.op_type == "MatMul" and node.input[1] in transposed:
            turn = transposed[node.input[1]]
            name = f"{turn.input[0]}.transposed"
            if not any(t.name == name for t in model.graph.initializer):
                array = onnx.numpy_helper.to_array(matrices[turn.input[0]]).T
                model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
            node.input[1] = name
    _drop_unused(model)


def _drop_unused(model: Any) -> None:
    outputs = {o.name for o in model.graph.output}
    while True:
        read = {i for n in model.graph.node for i in n.input} | outputs
        dead = [n for n in model.graph.node if n.op_type == "Transpose" and n.output[0] not in read]
        if not dead:
            break
        for node in dead:
            model.graph.node.remove(node)
    for tensor in [t for t in model.graph.initializer if t.name not in read]:
        model.graph.initializer.remove(tensor)


def _halve_embeddings(model: Any) -> int:
    """Gather(float32 table) becomes Cast(Gather(float16 table))."""
    import onnx

    _untie(model)
    matrices = _matrices(model)
    places = [i for i, n in enumerate(model.graph.node) if n.op_type == "Gather" and n.input[0] in matrices]
    halves: dict[str, str] = {}
    for i in reversed(places):
        node = model.graph.node[i]
        table, rows = node.input[0], node.output[0]
        if table not in halves:
            halves[table] = f"{table}.float16"
            model.graph.initializer.append(_half(matrices[table], halves[table]))
        node.input[0], node.output[0] = halves[table], f"{rows}_float16"
        cast = onnx.helper.make_node("Cast", [node.output[0]], [rows], f"{node.name}_widen", to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(i + 1, cast)
    _drop_unused(model)
    return len(places)


def _halve_matrices(model: Any) -> int:
    import onnx

    readers, matrices = readers_of(model), _matrices(model)
    chosen = [n for n in matrices if all(r.op_type == "MatMul" for r in readers.get(n, []))]
    for name in chosen:
        model.graph.initializer.append(_half(matrices[name], f"{name}.float16"))
        model.graph.initializer.remove(matrices[name])
        node = onnx.helper.make_node("Cast", [f"{name}.float16"], [name], f"{name}_widen", to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(0, node)
    return len(chosen)


def _to_blocks(model: Any, bits: int, block: int) -> tuple[Any, int]:
    matrices = _matrices(model)
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in matrices]
    vocabulary = model.graph.output[0].type.tensor_type.shape.dim[2].dim_value
    head = [n.name for n in products if matrices[n.input[1]].dims[1] == vocabulary]
    others = [n.name for n in products if n.name not in head]
    every = [n.name for n in model.graph.node if n.op_type == "MatMul"]
    for names, width in ((head, 8), (others, bits)):
        if names:
            size = block if width == 8 else _BLOCK_OF_4_BITS
            model = _quantize_nodes(model, [n for n in every if n not in names], width, size)
    return model, len(products)


def _quantize_nodes(model: Any, excluded: list[str], bits: int, block: int) -> Any:
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # configures the root logger

    root.setLevel(before[0])
    root.handlers[:] = before[1]
    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
    work = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=block,
        is_symmetric=True,
        accuracy_level=_INT8_ACTIVATIONS,
        nodes_to_exclude=excluded,
        op_types_to_quantize=("MatMul",),
    )
    work.process()
    return work.model.model


def divergence(
    reference: OnnxSession,
    other: OnnxSession,
    ids: NDArray[np.int64],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """How far `other` is from `reference` on sequences ids [N, T], tokens 1..T-1 from scratch; float64 sums."""
    kl, losses = [], []
    for done, row in enumerate(ids):
        if progress:
            progress(done, len(ids))
        log_p, log_q = (log_p for log_p in map(lambda s: _log_probabilities(s, row), (reference, other)))
        kl.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        losses.append([-table[np.arange(len(row) - 1), row[1:]] for table in (log_p, log_q)])
    first, second = np.exp(np.mean(losses, axis=(0, 2)))
    return Divergence(float(np.mean(kl)), float(second), float(first), ids[:, 1:].size)


def _log_probabilities(session: OnnxSession, row: NDArray[np.int64]) -> NDArray[np.float64]:
    session.reset()
    logits = np.concatenate([session.forward(part[None])[0] for part in _chunks(row)])[:-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _chunks(row: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(row), 256):
        yield row[start : start + 256]
