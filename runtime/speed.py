"""How fast an ONNX student answers on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from .session import OnnxSession
from .session_state import SessionState

FILL = 0.01  # in every state and cache: no time depends on the values
CHUNK, STEPS = 128, 8


@dataclass(frozen=True)
class Speed:
    """Behind `context` tokens of one row: tokens/s of a chunk that ends there, and seconds of the token after it."""

    context: int
    prefill_tokens_per_second: float
    decode_seconds: float


def go_behind(session: OnnxSession, length: int, *, batch: int = 1) -> None:
    """Puts a session behind so many tokens of each row without having read them."""
    session.reset(batch=batch)
    empty: SessionState = session.snapshot()
    pairs = zip(empty.values, session.state_shapes(length), strict=True)
    values = tuple(np.broadcast_to(v.dtype.type(FILL), (batch, *shape[1:])) for v, shape in pairs)
    session.restore(replace(empty, length=length, mask=np.ones((batch, length), np.int64), values=values))


def prefill_seconds(session: OnnxSession, context: int, *, chunk: int, batch: int = 1) -> float:
    """Of the chunk whose last token is the context's last; the first of two runs is a warm-up."""
    tokens = np.ones((batch, chunk), np.int64)
    for _ in range(2):
        go_behind(session, context - chunk, batch=batch)
        start = time.perf_counter()
        session.forward(tokens)
    return time.perf_counter() - start


def decode_seconds(session: OnnxSession, *, steps: int, batch: int = 1) -> float:
    """Median of so many tokens, one by one, after one that is a warm-up."""
    token, times = np.ones((batch, 1), np.int64), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        session.forward(token)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def measure_speed(session: OnnxSession, contexts: Sequence[int]) -> list[Speed]:
    """Of each of the contexts that the session has room for."""
    rows = []
    for context in contexts:
        if session.context_length is not None and context + STEPS + 1 > session.context_length:
            break
        chunk = min(CHUNK, context)
        prefill = chunk / prefill_seconds(session, context, chunk=chunk)
        go_behind(session, context)
        rows.append(Speed(context, prefill, decode_seconds(session, steps=STEPS)))
    session.reset()
    return rows
