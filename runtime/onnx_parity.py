"""Is the ONNX student the torch student? Logits over several chunkings, and greedy tokens, each with its bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcal_compiler.passes.graph import widen_to_float64
from tcal_compiler.passes.make_stateful import StatefulGraph, run_chunks
from tcal_compiler.passes.types import Check

from .onnx_export import OnnxArtifact
from .session import OnnxSession

LEAST_TOLERANCE = 1e-4  # absolute, in logits


def check_parity(
    artifact: OnnxArtifact,
    stateful: StatefulGraph,
    *,
    whole: Callable[[Tensor], Tensor] | None = None,
    prompts: Sequence[Sequence[int]] = (),
    new_tokens: int = 64,
    length: int = 40,
    threads: int | None = None,
) -> tuple[Check, ...]:
    """Compares model.onnx in ONNX Runtime with the stateful torch graph.

    The graph in float64 is the referee (it needs a float64 copy of the weights): ONNX Runtime's logits may be 1e-4 from
    it, or twice as far as the same graph in float32 is, where that is more. Both rounding errors may have opposite
    signs, so that the difference of the two float32 results, in a check's detail, can be the sum of them. Greedy tokens
    must be equal; a check's detail says how telling that is.

    Args:
        whole: ids [B, T] -> logits [B, T, V] of the student without state, held to the same bound.
        prompts: token ids to continue greedily for new_tokens.
        length: tokens of the random sequences that logits are compared on.
    """
    session = OnnxSession(artifact.path, threads=threads)
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, stateful.vocab_size, (2, length), generator=gen)
    checks = _logit_checks(session, stateful, ids, whole)
    return (*checks, *(_greedy_check(session, stateful, p, new_tokens, i) for i, p in enumerate(prompts)))


def _chunkings(length: int) -> tuple[tuple[int, ...], ...]:
    return (length,), (1,) * length, (3, 1, 17, length - 21)


def _logit_checks(
    session: OnnxSession, stateful: StatefulGraph, ids: Tensor, whole: Callable[[Tensor], Tensor] | None
) -> list[Check]:
    names = ("one pass", "single tokens", "ragged chunks")
    chunkings = _chunkings(ids.shape[1])
    runs = [run_chunks(stateful, ids, c, dtype=torch.float32)[0] for c in chunkings]
    wide = replace(stateful, gm=widen_to_float64(stateful.gm))
    exact = run_chunks(wide, ids, chunkings[0], dtype=torch.float64)[0]
    noise = max((r - exact).abs().max().item() for r in runs)
    allowed = max(LEAST_TOLERANCE, 2 * noise)
    checks = []
    for name, chunks, run in zip(names, chunkings, runs, strict=True):
        onnx = _onnx_logits(session, ids, chunks)
        detail = f"torch float32 is {noise:.2g} from float64, and {(onnx - run).abs().max():.2g} from ONNX here"
        checks.append(Check(f"ONNX logits equal torch, {name}", (onnx - exact).abs().max().item(), allowed, detail))
    if whole is not None:
        with torch.no_grad():
            error = (whole(ids) - exact).abs().max().item()
        checks.append(Check("the whole-sequence student equals the graph with state", error, allowed))
    return checks


def _onnx_logits(session: OnnxSession, ids: Tensor, chunks: tuple[int, ...]) -> Tensor:
    session.reset(batch=len(ids))
    parts = [session.forward(part.numpy()) for part in ids.split(list(chunks), dim=1)]
    return torch.from_numpy(np.concatenate(parts, 1))


def _greedy_check(
    session: OnnxSession, stateful: StatefulGraph, prompt: Sequence[int], count: int, index: int
) -> Check:
    """Number of differing tokens. Telling only when the tokens vary and no choice was close."""
    expected, logits = torch_generate(stateful, prompt, count)
    session.reset()
    got = list(session.generate(prompt, count))
    best = np.sort(logits, -1)[:, -2:]
    margin = float((best[:, 1] - best[:, 0]).min())
    wrong = sum(a != b for a, b in zip(expected, got, strict=True))
    detail = f"{count} tokens, {len(set(expected))} distinct, smallest top-1 margin {margin:.2g}"
    return Check(f"greedy tokens of prompt {index} that differ", float(wrong), 0.0, detail)


def torch_generate(
    stateful: StatefulGraph, ids: Sequence[int], max_new_tokens: int
) -> tuple[list[int], NDArray[np.float32]]:
    """Greedy tokens of the stateful torch graph, and the logits [n, V] that they were chosen from."""
    state = stateful.empty_state(1)
    new, mask = torch.tensor([list(ids)]), torch.ones(1, len(ids), dtype=torch.int64)
    tokens: list[int] = []
    rows = []
    with torch.no_grad():
        for _ in range(max_new_tokens):
            logits, *present = stateful.gm(new, mask, *state)
            state = tuple(present)
            rows.append(logits[0, -1].numpy())
            tokens.append(int(rows[-1].argmax()))
            new, mask = torch.tensor([tokens[-1:]]), torch.ones(1, mask.shape[1] + 1, dtype=torch.int64)
    return tokens, np.stack(rows)
