"""Chunked divergence: against the full matrix and float64, in value, gradient and memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB, TinyModel, capture_of, scanned, student_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tcal_compiler.errors import StageError
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.site_program import tap_graph
from tcal_compiler.runtime.divergence import Objective, forward_kl
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.logits import SplitModel, compare, in_bfloat16, split_model
from tcal_compiler.runtime.student import Student

IDS = example_ids(3, 17, VOCAB, seed=5)
COUNTS = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.7


def naive_student(**options: object) -> Student:
    student = student_of("is_causal", "none", **options)
    for s in student.converted:
        naive_(student.gm.get_submodule(f"tcal_mixers.{s.index}"), torch.Generator().manual_seed(0))
    for p in student.gm.parameters():
        p.requires_grad_()
    return student


def chunked(student: Student, *, ids: Tensor = IDS, counts: Tensor = COUNTS, chunk: int = 5, **options):
    """Losses, and the gradient of every parameter."""
    for p in student.gm.parameters():
        p.grad = None
    losses = compare(split_model(student.gm), split_model(student.capture.gm), (ids,), counts, chunk=chunk, **options)
    return losses, {n: p.grad for n, p in student.gm.named_parameters() if p.grad is not None}


def js_of(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.stack((log_p, log_q)).logsumexp(0) - math.log(2)
    halves = (F.kl_div(log_m, x, log_target=True, reduction="batchmean") for x in (log_p, log_q))
    return sum(halves) / 2


WHOLE = {
    "forward-kl": lambda p, q: F.kl_div(q, p, log_target=True, reduction="batchmean"),
    "reverse-kl": lambda p, q: F.kl_div(p, q, log_target=True, reduction="batchmean"),
    "js": js_of,
}


def whole(student: Student, objective: Objective) -> tuple[float, float, dict[str, Tensor]]:
    """The same from full matrices, with PyTorch's own losses."""
    for p in student.gm.parameters():
        p.grad = None
    hard = student.gm(IDS)[:, :-1][COUNTS]
    with torch.no_grad():
        soft = student.capture.gm(IDS)[:, :-1][COUNTS]
    target = IDS[:, 1:][COUNTS]
    log_q, log_p = ((x / objective.temperature).log_softmax(-1) for x in (hard, soft))
    divergence = WHOLE[objective.divergence](log_p, log_q)
    nll = F.nll_loss(hard.log_softmax(-1), target)
    (objective.temperature**2 * divergence + objective.cross_entropy * nll).backward()
    return (
        divergence.item(),
        nll.item(),
        {n: p.grad.clone() for n, p in student.gm.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("tied, chunk", [(False, 1), (True, 5), (False, 1000)])
@pytest.mark.parametrize(
    "objective",
    [Objective(), Objective("forward-kl", 2.0, 0.3), Objective("reverse-kl", 2.0, 0.3), Objective("js", 0.7)],
    ids=lambda o: f"{o.divergence} {o.temperature}",
)
def test_values_and_gradients_are_those_of_the_full_matrix(tied, objective, chunk):
    student = naive_student(tied=tied)
    divergence, nll, expected = whole(student, objective)
    losses, found = chunked(student, chunk=chunk, objective=objective, backward=True)
    assert losses.count == int(COUNTS.sum())
    assert losses.divergence.item() / losses.count == pytest.approx(divergence, rel=1e-5)
    if objective.cross_entropy:
        assert losses.nll.item() / losses.count == pytest.approx(nll, rel=1e-5)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_score_leaves_no_gradient_and_sums_over_batches():
    student = naive_student()
    all_at_once, gradients = chunked(student)
    assert not gradients and all_at_once.nll > 0
    parts = [chunked(student, ids=IDS[i : i + 1], counts=COUNTS[i : i + 1])[0] for i in range(3)]
    total = parts[0] + parts[1] + parts[2]
    assert total.count == all_at_once.count and total.kl == total.divergence
    torch.testing.assert_close(total.kl, all_at_once.kl, rtol=1e-6, atol=0)


def check_padding_changes_nothing(counts: Tensor) -> None:
    """Rows of 12 tokens and 5 of padding: whatever the padding is, values and gradients are those without it."""
    student = naive_student()
    short, expected = chunked(student, ids=IDS[:, :12], counts=torch.ones(3, 11, dtype=torch.bool), backward=True)
    for filler in (0, 7):
        padded = F.pad(IDS[:, :12], (0, 5), value=filler)
        losses, gradients = chunked(student, ids=padded, counts=counts, backward=True)
        assert losses.count == short.count
        torch.testing.assert_close(losses.kl, short.kl, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_padding_takes_no_part():
    counts = F.pad(torch.ones(3, 11, dtype=torch.bool), (0, 5))
    check_padding_changes_nothing(counts)
    with pytest.raises(AssertionError):  # the fault of the published code: KL without a padding mask
        check_padding_changes_nothing(torch.ones_like(counts))


def test_nothing_that_counts_is_no_gradient():
    losses, gradients = chunked(naive_student(), counts=torch.zeros_like(COUNTS), backward=True)
    assert losses.count == 0 and losses.kl == 0
    assert all(not g.any() for g in gradients.values())


def test_a_score_also_holds_what_the_objective_leaves_out():
    student = naive_student()
    known = chunked(student)[0]
    losses = chunked(student, objective=Objective("js"))[0]
    assert losses.kl == known.kl and losses.nll == known.nll and losses.divergence < known.divergence
    trained = chunked(student, objective=Objective("js"), backward=True)[0]
    assert trained.divergence == losses.divergence and trained.kl == trained.nll == 0


def test_tapped_states_against_the_whole_graphs():
    """Only tokens that count take part, each tap over its own size, and the gradient adds to that of the divergence."""
    student = naive_student()
    taps, weight = [s.y for s in student.converted], 0.7
    assert len(taps) == 2
    _, _, expected = whole(student, Objective())
    for p in student.gm.parameters():
        p.grad = None
    own, aim = (tap_graph(gm, taps)(IDS) for gm in (student.gm, student.capture.gm))
    errors = []
    for s, t in zip(own, aim, strict=True):
        s, t = (x[:, :-1].flatten(0, 1)[COUNTS.flatten()] for x in (s, t))
        errors.append((s - t.detach()).pow(2).mean() / t.detach().pow(2).mean())
    (weight * sum(errors) / 2).backward()
    expected = {n: expected[n] + (0 if p.grad is None else p.grad) for n, p in student.gm.named_parameters()}

    for p in student.gm.parameters():
        p.grad = None
    models = [split_model(gm, taps) for gm in (student.gm, student.capture.gm)]
    losses = compare(*models, (IDS,), COUNTS, chunk=5, objective=Objective(hidden=weight), backward=True)
    assert losses.means()["hidden"] == pytest.approx(sum(errors).item() / 2, rel=1e-5)
    for name, p in student.gm.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    same = compare(models[1], models[1], (IDS,), COUNTS, chunk=5, objective=Objective(hidden=weight))
    assert same.hidden == 0 and same.divergence == pytest.approx(0, abs=1e-5)


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.dim() and t.shape[-1] == 512:  # the vocabulary
                self.numel = max(self.numel, t.numel() // 512)
        return out


@pytest.mark.parametrize("kind", list(WHOLE))
def test_logits_exist_for_one_chunk_at_a_time(kind):
    student = naive_student(vocab=512)
    ids = example_ids(3, 40, 512)
    counts = torch.ones(3, 39, dtype=torch.bool)
    with _Largest() as spy:
        chunked(student, ids=ids, counts=counts, chunk=16, objective=Objective(kind), backward=True)
    assert spy.numel <= 32  # rows of [V]: the head's transposed weight has as many as the model is wide
    with _Largest() as spy:
        chunked(student, ids=ids, counts=counts, chunk=10_000, objective=Objective(kind), backward=True)
    assert spy.numel == 3 * 39


def test_kl_against_float64_and_tokens_that_the_teacher_rules_out():
    gen = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 50, generator=gen).mul(4).unbind(0)
    exact = F.kl_div(student.double().log_softmax(-1), teacher.double().softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher).double(), exact, rtol=1e-5, atol=1e-6)
    teacher[:, 7] = -torch.inf
    student.requires_grad_()
    kl = forward_kl(student, teacher)
    exact = F.kl_div(student.double().log_softmax(-1), teacher.double().softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)
    kl.sum().backward()
    assert student.grad.isfinite().all()


class Tail(nn.Module):
    """A TinyModel with something behind its head."""

    def __init__(self, tail) -> None:
        super().__init__()
        self.model, self.tail = TinyModel("is_causal"), tail
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tail(self.model(input_ids))


@pytest.mark.parametrize(
    "tail, has_head",
    [(lambda x: torch.tanh(x / 30) * 30, True), (lambda x: x.float(), True), (lambda x: x.cumsum(1), False)],
    ids=["soft cap", "cast", "over tokens"],
)
def test_only_a_tokenwise_head_is_cut_off(tail, has_head):
    capture = capture_of(Tail(tail))
    split = split_model(capture.gm)
    assert (split.head is not None) == has_head
    with torch.no_grad():
        logits = capture.gm(IDS)
        rows = split.hidden((IDS,)).flatten(0, 1)
        found = torch.cat([split.logits(r) for r in rows.split(4)])
    torch.testing.assert_close(found, logits.flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_the_head_shares_the_models_weights():
    capture, _ = scanned("is_causal", tied=True)
    (weight,) = split_model(capture.gm).head.parameters()
    assert any(weight is p for p in capture.gm.parameters()) and weight.shape == (VOCAB, 32)


class _Products(TorchDispatchMode):
    """Dtypes of matrix products, by whether they make logits, and of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.attention = set(), set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            (self.head if out.shape[-1] == VOCAB else self.body).add(out.dtype)
        if "attention" in str(func):
            self.attention.add(args[0].dtype)
        return out


def test_a_body_in_bfloat16_under_a_head_as_it_was():
    gm = naive_student().capture.gm
    plain = split_model(gm, [s.y for s in scanned()[1].sites])
    half = in_bfloat16(plain, "teacher")
    assert half.head is plain.head
    with torch.no_grad(), _Products() as seen:
        hidden, *taps = half.counted((IDS,), COUNTS)
        logits = half.logits(hidden)
    assert seen.body == seen.attention == {torch.bfloat16} and seen.head == {torch.float32}
    assert len(taps) == 2 and hidden.dtype == logits.dtype == torch.float32
    with torch.no_grad():
        exact = plain.logits(plain.counted((IDS,), COUNTS)[0])
    error = (logits - exact).norm() / exact.norm()
    assert 1e-5 < error < 2e-2
    assert {p.dtype for p in gm.parameters()} == {torch.float32}


def test_a_teacher_that_does_not_mix_dtypes_is_refused():
    weight, index = torch.ones(4, 4), torch.tensor([0])

    def body(ids: Tensor) -> tuple[Tensor, ...]:
        return (torch.zeros(3, 4).index_add(0, index, F.linear(torch.ones(1, 4), weight)),)

    assert body(IDS)[0].sum() == 16
    with pytest.raises(StageError, match="bfloat16") as e:
        in_bfloat16(SplitModel(body, None), "teacher").hidden((IDS,))
    assert "teacher_dtype" in e.value.hint
