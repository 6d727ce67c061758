"""Scores of models on examples whose answers are continuations of a text: what retrieval and zero-shot tasks share.

T tokens, V vocabulary. A model is a function from ids [B, T] to logits [B, T, V]; rows are padded behind their end,
which causal models do not see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tcal_compiler.errors import DataError, StageError

from .evaluate import Logits, mean_and_error
from .tokenizer import TokenizerLike

BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # in one forward, padding included; a longer row runs alone


@dataclass(frozen=True)
class Request:
    """Token ids of a context, at least one, and of the continuation to score, at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """log_likelihood: sum of log p of the continuation's tokens, each behind the ones before it; nats.
    greedy: whether each is the likeliest one there, so that greedy decoding gives exactly this continuation.
    """

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Task:
    """Examples with their requests.

    measure(i, answers) gives the metrics of example i from the answers to its requests; every example has the same
    ones. chance: mean of a metric under blind guessing, where that is known.
    """

    name: str
    examples: Sequence[Sequence[Request]]
    measure: Callable[[int, Sequence[Answer]], dict[str, float]]
    chance: Mapping[str, float]


@dataclass(frozen=True)
class TaskScore:
    """A model's mean of a metric over the examples of a task.

    stderr: of the mean, sqrt(sum (x - mean)^2 / (n - 1) / n). change: value minus the teacher's, 0 for the teacher;
    change_stderr: of the mean of the differences example by example, which is less than two separate errors say.
    """

    task: str
    metric: str
    value: float
    stderr: float
    examples: int
    chance: float | None
    change: float
    change_stderr: float


def encode_request(tokenizer: TokenizerLike, context: str, continuation: str) -> Request:
    """Spaces at the end of the context go to the continuation; both are encoded together, with the special tokens of
    a prompt, and split behind as many tokens as the context alone has, as lm-evaluation-harness does.

    Raises:
        DataError: no token is left for one of them.
    """
    text = context.rstrip()
    continuation = context[len(text) :] + continuation
    whole, start = (tokenizer.encode(t, special=True) for t in (text + continuation, text))
    if not start or len(whole) <= len(start):
        what = f"context {context[-40:]!r} and continuation {continuation[:40]!r} have {len(start)} and "
        raise DataError("task", f"{what}{len(whole) - len(start)} tokens", "an example with both")
    return Request(tuple(whole[: len(start)]), tuple(whole[len(start) :]))


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices in groups of at most `most` tokens with padding, longest first; a longer row is a group of its own."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and (len(group) + 1) * lengths[group[0]] > most:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


@torch.no_grad()
def score_requests(
    requests: Sequence[Request],
    logits: Logits,
    *,
    device: torch.device,
    context_length: int | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Answers in the order of the requests. Requests of one input (all tokens but the last) share a forward.

    context_length: positions that the model knows; a longer input loses tokens at its start. Log-softmax in float32.

    Raises:
        DataError: a continuation is longer than context_length.
        StageError: a log likelihood is not finite.
    """
    waiting: dict[tuple[int, ...], list[int]] = {}
    for i, r in enumerate(requests):
        tokens = (r.context + r.continuation)[:-1]
        if context_length is not None and len(r.continuation) > context_length:
            what = f"a continuation of {len(r.continuation)} tokens, but the teacher's context holds {context_length}"
            raise DataError("task", what, "shorter examples")
        waiting.setdefault(tokens[-context_length:] if context_length else tokens, []).append(i)
    inputs = list(waiting)
    answers: list[Answer | None] = [None] * len(requests)
    for done, group in _counted(_batches([len(t) for t in inputs], batch_tokens or BATCH_TOKENS[device.type])):
        rows = [torch.tensor(inputs[i]) for i in group]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        out = logits(ids.to(device))
        for row, i in enumerate(group):
            for number in waiting[inputs[i]]:
                answers[number] = _answer(out[row, : len(inputs[i])], requests[number].continuation)
        if progress:
            progress(done, len(inputs))
    return [a for a in answers if a is not None]


def _counted(groups: Iterator[list[int]]) -> Iterator[tuple[int, list[int]]]:
    done = 0
    for group in groups:
        done += len(group)
        yield done, group


def _answer(logits: Tensor, continuation: tuple[int, ...]) -> Answer:
    """logits [T, V] of an input that ends with all of the continuation but its last token."""
    log_p = logits[-len(continuation) :].float().log_softmax(-1)
    target = torch.tensor(continuation, device=log_p.device)
    total = log_p.gather(-1, target[:, None]).double().sum().item()
    if not math.isfinite(total):
        raise StageError("eval", f"a log likelihood is {total}", "tcal verify RUN checks the student")
    return Answer(total, bool((log_p.argmax(-1) == target).all()))


def score_tasks(
    tasks: Sequence[Task],
    models: Mapping[str, Logits],
    *,
    device: torch.device,
    context_length: int | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[str], Callable[[int, int], None]] | None = None,
) -> dict[str, list[TaskScore]]:
    """Every model on every task, and how far it is from the model "teacher", which has to be among them."""
    found: dict[str, list[TaskScore]] = {name: [] for name in models}
    for task in tasks:
        requests = [r for example in task.examples for r in example]
        values: dict[str, dict[str, list[float]]] = {}
        for name, logits in models.items():
            answers = iter(
                score_requests(
                    requests,
                    logits,
                    device=device,
                    context_length=context_length,
                    batch_tokens=batch_tokens,
                    progress=progress(f"{task.name}: {name}") if progress else None,
                )
            )
            rows = [task.measure(i, [next(answers) for _ in e]) for i, e in enumerate(task.examples)]
            values[name] = {metric: [row[metric] for row in rows] for metric in rows[0]}
        for name, metrics in values.items():
            found[name] += [_score(task, m, v, values["teacher"][m]) for m, v in metrics.items()]
    return found


def _score(task: Task, metric: str, values: list[float], teacher: list[float]) -> TaskScore:
    value, error = mean_and_error(values)
    change, change_error = mean_and_error([a - b for a, b in zip(values, teacher, strict=True)])
    return TaskScore(task.name, metric, value, error, len(values), task.chance.get(metric), change, change_error)
