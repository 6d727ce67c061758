"""Log likelihoods of continuations against sums made by hand, and means with their errors."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from tcal_compiler.errors import DataError, StageError
from tcal_compiler.runtime.tasks import Answer, Request, Task, encode_request, score_requests, score_tasks
from tcal_compiler.runtime.tokenizer import ByteTokenizer

CPU, VOCAB = torch.device("cpu"), 11
WEIGHT = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
REQUESTS = [
    Request((1, 2, 3), (4,)),
    Request((1, 2), (3, 4)),  # the same input as the first
    Request((5,), (6, 7, 8, 9)),
    Request((1, 2, 3, 4, 5, 6, 7), (10,)),
    Request((1, 2, 3), (9,)),
]


def running_sums(ids: torch.Tensor) -> torch.Tensor:
    """Logits that depend on every token so far, and on none that follows."""
    return WEIGHT[ids].cumsum(1) * 0.3


def by_hand(request: Request, window: int | None = None) -> Answer:
    """One token after the other, without padding, batches or shared inputs."""
    seen, total, greedy = list(request.context), 0.0, True
    for number, token in enumerate(request.continuation):
        # what a window drops is counted from the end of the input, which is all tokens but the last
        drop = max(0, len(request.context) + len(request.continuation) - 1 - (window or 10**9))
        sums = sum((WEIGHT[t].double() * 0.3 for t in seen[drop:]), torch.zeros(VOCAB, dtype=torch.float64))
        total += (sums[token] - sums.exp().sum().log()).item()
        greedy = greedy and int(sums.argmax()) == token
        seen.append(request.continuation[number])
    return Answer(total, greedy)


@pytest.mark.parametrize("batch_tokens", [1, 9, 1000])
@pytest.mark.parametrize("window", [None, 4])
def test_likelihoods_are_those_of_single_runs(batch_tokens, window):
    best = Request((1,), (int(WEIGHT[1].argmax()),))
    requests = [*REQUESTS, best]
    found = score_requests(requests, running_sums, device=CPU, context_length=window, batch_tokens=batch_tokens)
    expected = [by_hand(r, window) for r in requests]
    assert [a.greedy for a in found] == [a.greedy for a in expected] and found[-1].greedy
    assert [a.log_likelihood for a in found] == pytest.approx([a.log_likelihood for a in expected], abs=1e-5)


def test_equal_inputs_run_once_in_batches_of_bounded_size():
    shapes = []

    def model(ids):
        shapes.append(tuple(ids.shape))
        return running_sums(ids)

    score_requests(REQUESTS, model, device=CPU, batch_tokens=8)
    assert shapes == [(1, 7), (2, 4)]  # the inputs have 7, 4 and 3 tokens


def test_what_cannot_be_scored_is_said():
    with pytest.raises(DataError, match="a continuation of 4 tokens, but the teacher's context holds 3"):
        score_requests(REQUESTS, running_sums, device=CPU, context_length=3)
    with pytest.raises(StageError, match="a log likelihood is nan"):
        score_requests(REQUESTS, lambda ids: running_sums(ids) * math.nan, device=CPU)


def test_a_pair_is_split_where_its_context_ends():
    tokenizer = ByteTokenizer()
    assert encode_request(tokenizer, "ab  ", "c") == Request((97, 98), (32, 32, 99))
    for context, continuation in ((" \n", "x"), ("x", "")):
        with pytest.raises(DataError, match="tokens"):
            encode_request(tokenizer, context, continuation)


def test_means_errors_and_the_distance_from_the_teacher():
    greedy = [[Request((c,), (int(WEIGHT[c].argmax()),))] for c in range(6)]
    task = Task("t", greedy, lambda i, answers: {"exact": float(answers[0].greedy), "i": float(i)}, {"exact": 0.1})

    def wrong_on_two(ids):
        return torch.where((ids < 2)[..., None], -1.0, 1.0) * running_sums(ids)

    found = score_tasks([task], {"teacher": running_sums, "student": wrong_on_two}, device=CPU)
    exact, index = found["student"]
    seen, change = [0, 0, 1, 1, 1, 1], [-1, -1, 0, 0, 0, 0]
    assert exact.value == pytest.approx(4 / 6) and exact.stderr == pytest.approx(statistics.stdev(seen) / math.sqrt(6))
    assert exact.change == pytest.approx(-2 / 6)
    assert exact.change_stderr == pytest.approx(statistics.stdev(change) / math.sqrt(6))
    assert (exact.examples, exact.chance, index.chance, index.change) == (6, 0.1, None, 0)
    assert found["teacher"][0].value == 1 and found["teacher"][0].change_stderr == 0
