"""Is the ONNX student the torch student? Logits over several chunkings, and greedy tokens, each with its bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcal_compiler.passes.graph import widen_to_float64
from tcal_compiler.passes.make_stateful import cuts, run_chunks
from tcal_compiler.passes.stateful_graph import StatefulGraph
from tcal_compiler.passes.types import Check

from .onnx_export import LOWERINGS, OnnxArtifact
from .session import OnnxSession

LEAST_TOLERANCE = 1e-4  # absolute, in logits
# A student after little training magnifies rounding at some tokens, so that the largest errors of two right programs in
# float32 lie apart: 2.2 times was seen with SmolLM2 after 8 steps of alignment.
MOST_TIMES_NOISE = 4
MOST_HALF_KL = 1e-3  # nats per token


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
    it, or MOST_TIMES_NOISE as far as the same graph in float32 is, where that is more. Both rounding errors may have
    opposite signs, so that the difference of the two float32 results, in a check's detail, can be the sum of them.
    Greedy tokens must be equal; a check's detail says how telling that is. Where products are float16, the predictions'
    mean KL(torch || ONNX) may be up to MOST_HALF_KL instead, and that is all.

    Args:
        whole: ids [B, T] -> logits [B, T, V] of the student without state, held to the same bound.
        prompts: token ids to continue greedily for new_tokens, as far as half the context and the whole of it go.
        length: tokens of the random sequences that logits are compared on, no more than the context.
    """
    session = OnnxSession(artifact.path, threads=threads)
    context = artifact.context_length
    length, prompts = min(length, context), [p[: context // 2] for p in prompts]
    if LOWERINGS[artifact.profile].half:
        return _divergence_checks(session, torch_logits(stateful, length))
    checks = _logit_checks(session, torch_logits(stateful, length), whole)
    room = [min(new_tokens, context - len(p) + 1) for p in prompts]
    greedy = (_greedy_check(session, stateful, p, n, i) for i, (p, n) in enumerate(zip(prompts, room, strict=True)))
    return (*checks, *greedy)


@dataclass(frozen=True)
class TorchLogits:
    """Logits [B, T, V] of ids [B, T] by the stateful torch graph: in float64, and in float32 by how they are cut."""

    ids: Tensor
    exact: Tensor
    by_chunks: dict[tuple[int, ...], Tensor]

    @property
    def noise(self) -> float:
        """How far float32 is from float64."""
        return max((run - self.exact).abs().max().item() for run in self.by_chunks.values())

    def allowed(self, times: float = MOST_TIMES_NOISE) -> float:
        """How far a runtime's logits may be from float64: so many times as far as torch's, or LEAST_TOLERANCE."""
        return max(LEAST_TOLERANCE, times * self.noise)


def torch_logits(stateful: StatefulGraph, length: int = 40) -> TorchLogits:
    """Two random sequences in one pass, token by token and in ragged chunks; makes a float64 copy of the weights."""
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, stateful.vocab_size, (2, length), generator=gen)
    chunkings = (length,), (1,) * length, cuts(length, (3, 1, 17))
    runs = {c: run_chunks(stateful, ids, c, dtype=torch.float32)[0] for c in chunkings}
    wide = replace(stateful, gm=widen_to_float64(stateful.gm))
    return TorchLogits(ids, run_chunks(wide, ids, chunkings[0], dtype=torch.float64)[0], runs)


def session_logits(session: OnnxSession, ids: Tensor, chunks: Sequence[int]) -> Tensor:
    """Logits [B, T, V] of ids [B, T] fed in chunks from an empty state."""
    session.reset(batch=len(ids))
    parts = [session.forward(part.numpy()) for part in ids.split(list(chunks), dim=1)]
    return torch.from_numpy(np.concatenate(parts, 1))


def _logit_checks(
    session: OnnxSession, torch_runs: TorchLogits, whole: Callable[[Tensor], Tensor] | None
) -> list[Check]:
    names = ("one pass", "single tokens", "ragged chunks")
    exact, noise, allowed = torch_runs.exact, torch_runs.noise, torch_runs.allowed()
    checks = []
    for name, (chunks, run) in zip(names, torch_runs.by_chunks.items(), strict=True):
        onnx = session_logits(session, torch_runs.ids, chunks)
        detail = f"torch float32 is {noise:.2g} from float64, and {(onnx - run).abs().max():.2g} from ONNX here"
        checks.append(Check(f"ONNX logits equal torch, {name}", (onnx - exact).abs().max().item(), allowed, detail))
    if whole is not None:
        with torch.no_grad():
            error = (whole(torch_runs.ids) - exact).abs().max().item()
        checks.append(Check("the whole-sequence student equals the graph with state", error, allowed))
    return checks


def _divergence_checks(session: OnnxSession, torch_runs: TorchLogits) -> tuple[Check, ...]:
    checks = []
    for chunks, run in torch_runs.by_chunks.items():
        found = session_logits(session, torch_runs.ids, chunks)
        log_p, log_q = (x.double().log_softmax(-1) for x in (run, found))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        what = f"largest logit error {(found - run).abs().max().item():.2g}"
        checks.append(Check(f"KL of float16 ONNX to torch, {len(chunks)} chunks", kl, MOST_HALF_KL, what))
    return tuple(checks)


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
