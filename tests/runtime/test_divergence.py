"""Divergences against float64: values and gradients, also where probabilities underflow or tokens are ruled out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tcal_compiler.runtime.divergence import DIVERGENCES, Objective, forward_kl

KINDS = list(DIVERGENCES)
INF = torch.inf


def exact(kind: str, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """From entropies, in float64: cross entropies for the KLs, H((p + q) / 2) - (H(p) + H(q)) / 2 for js."""
    log_p, log_q = ((x.double() / temperature).log_softmax(-1) for x in (teacher, student))
    p, q = log_p.exp(), log_q.exp()

    def cross(weight: Tensor, log: Tensor) -> Tensor:
        return -torch.where(weight > 0, weight * log, 0.0).sum(-1)

    def entropy(x: Tensor) -> Tensor:
        return torch.special.entr(x).sum(-1)

    if kind == "forward-kl":
        return cross(p, log_q) - entropy(p)
    if kind == "reverse-kl":
        return cross(q, log_p.clamp(min=-100)) - entropy(q)
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def slope(kind: str, student: Tensor, teacher: Tensor, temperature: float, h: float = 1e-4) -> Tensor:
    """Central differences of `exact`, summed over rows; a logit of -inf stays what it is."""
    student, found = student.double(), torch.zeros(student.shape, dtype=torch.float64)
    for v in range(student.shape[-1]):
        step = torch.zeros_like(student)
        step[:, v] = h
        up, down = (exact(kind, student + s, teacher, temperature) for s in (step, -step))
        found[:, v] = (up - down) / (2 * h)
    return found


def random_rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(seed)).mul(3).unbind(0)


def extreme_rows() -> tuple[Tensor, Tensor]:
    """One side's probability underflows, the other's does not; tokens that the teacher, or both, rule out."""
    student, teacher = random_rows(1)
    student[0, 0], teacher[0, 1] = 1e4, 1e4
    student[1, 2], teacher[1, 2] = -1e4, 1e4
    student[2, 3], teacher[2, 3] = 1e4, -1e4
    teacher[3, :4] = -INF
    student[4, :4], teacher[4, :4] = -INF, -INF
    teacher[5] = -INF
    teacher[5, 8] = 0.0
    return student, teacher


def check(divergence, kind: str, student: Tensor, teacher: Tensor, temperature: float) -> None:
    """Finite, and that of float64 for the same logits, within rounding: terms are up to 100 or, of forward-kl, 2e4."""
    student = student.clone().requires_grad_()
    found = divergence(student, teacher, temperature)
    found.sum().backward()
    assert found.dtype == torch.float32 and student.grad.dtype == student.dtype
    assert bool(found.isfinite().all()) and bool(student.grad.isfinite().all())
    value = exact(kind, student.detach(), teacher, temperature)
    torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-6)
    expected, rtol = slope(kind, student.detach(), teacher, temperature), torch.finfo(student.dtype).eps
    atol = max(1e-5, torch.finfo(torch.float32).eps * 100 / temperature)
    torch.testing.assert_close(student.grad.double(), expected, rtol=max(rtol, 1e-5), atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [random_rows, extreme_rows], ids=["random", "extreme"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(kind, rows, dtype, temperature):
    student, teacher = (x.to(dtype) for x in rows())
    check(DIVERGENCES[kind], kind, student, teacher, temperature)


def by_the_formula(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_p, log_q = ((x.float() / temperature).log_softmax(-1) for x in (teacher, student))
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def test_the_plain_formula_would_not_pass():
    check(by_the_formula, "reverse-kl", *random_rows(), 1.0)
    with pytest.raises(AssertionError):
        check(by_the_formula, "reverse-kl", *extreme_rows(), 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_against_autograd_in_float64(kind):
    student, teacher = random_rows(2)
    wide = student.double().requires_grad_()
    exact(kind, wide, teacher).sum().backward()
    own = student.double().requires_grad_()
    DIVERGENCES[kind](own, teacher.double(), 1.0).sum().backward()
    torch.testing.assert_close(own.grad, wide.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [random_rows, extreme_rows], ids=["random", "extreme"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_have_no_divergence_and_no_gradient(kind, rows):
    student = rows()[1].clone().requires_grad_()
    found = DIVERGENCES[kind](student, student.detach(), 1.0)
    found.sum().backward()
    assert found.abs().max() < 1e-6 and student.grad.abs().max() < 3e-7


def test_they_differ_as_they_should():
    student, teacher = random_rows(3)
    forward, backward, js = (DIVERGENCES[k](student, teacher, 1.0) for k in ("forward-kl", "reverse-kl", "js"))
    torch.testing.assert_close(backward, forward_kl(teacher, student))
    torch.testing.assert_close(js, DIVERGENCES["js"](teacher, student, 1.0))
    assert not torch.allclose(forward, backward, rtol=1e-2)
    apart = DIVERGENCES["js"](torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]), 1.0)
    assert apart.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_squared_temperature_keeps_the_size_of_the_gradient(kind):
    def largest(temperature: float) -> float:
        student, teacher = (x * 0.01 for x in random_rows(4))
        student.requires_grad_()
        objective = Objective(kind, temperature)
        (temperature**2 * objective.rows(student, teacher)).sum().backward()
        return student.grad.abs().max().item()

    assert largest(3.0) == pytest.approx(largest(1.0), rel=0.05)
