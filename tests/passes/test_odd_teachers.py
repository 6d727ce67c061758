"""Teachers that are written in unusual ways: converted as what they are, or refused for exactly that."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    CORES,
    VOCAB,
    TinyModel,
    capture_of,
    causal,
    distances,
    program_of,
    sdpa,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.make_stateful import make_stateful, run_chunks
from tcal_compiler.passes.types import Capture
from tcal_compiler.runtime.capture_teacher import capture_teacher
from tcal_compiler.runtime.teacher import Teacher

IDS = example_ids(2, 9, VOCAB, seed=5)


def captured(model: nn.Module, **info: Any) -> Capture:
    """As conversions capture a module."""
    teacher = Teacher("odd", "factory", model.eval(), None, None, {"vocab_size": VOCAB, **info})
    return capture_teacher(teacher, shapes=((2, 9), (1, 1)))


def with_core(monkeypatch: pytest.MonkeyPatch, core: Callable[..., Tensor], **options: Any) -> TinyModel:
    """A model whose layers all have this attention, q, k, v -> y."""
    monkeypatch.setitem(CORES, "odd", core)
    return TinyModel("odd", **{"layers": 1} | options)


class Returns(TinyModel):
    """Returns what a function makes of its logits."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__(layers=1)
        self.made = made

    def forward(self, input_ids: Tensor) -> Any:
        return self.made(super().forward(input_ids))


# Arguments and results


def test_positions_are_passed_by_name():
    class Masked(TinyModel):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            steps = torch.arange(input_ids.shape[1]) if position_ids is None else position_ids
            logits = super().forward(input_ids) + steps[..., None]
            return logits if attention_mask is None else logits * attention_mask[..., None]

    model = Masked(layers=1)
    capture = captured(model)
    assert capture.has_positions
    assert torch.equal(capture.gm(*capture.inputs(IDS)), model(IDS))


@pytest.mark.parametrize(
    "made",
    [lambda y: {"hidden": y[..., :5], "logits": y}, lambda y: (None, y), lambda y: (y, y.mean())],
    ids=["by name", "after None", "first"],
)
def test_the_logits_among_results(made):
    capture, whole = captured(Returns(made)), Returns(lambda y: y)
    assert capture.vocab_size == VOCAB and torch.equal(capture.gm(IDS), whole(IDS))


@pytest.mark.parametrize(
    "made", [lambda y: y[:, [-1]], lambda y: y.mean(), lambda y: None], ids=["last", "loss", "none"]
)
def test_no_logits_of_all_tokens(made):
    with pytest.raises(
        UnsupportedModelError, match=r"returns \[.*\], want logits of all tokens: \[\w+, \w+, vocabulary\]"
    ):
        captured(Returns(made))


def test_a_compiled_teacher_is_what_it_was_before():
    model = TinyModel(layers=1)
    capture = captured(torch.compile(model, backend="eager"))
    assert torch.equal(capture.gm(IDS), model(IDS)) and "head.weight" in dict(capture.gm.named_parameters())


# What the code does beside computing


@pytest.mark.parametrize(
    "made, said",
    [
        (lambda y: F.dropout(y, 0.1), r"aten\.dropout\.default in the model, dropout 0\.1, also in eval mode"),
        (lambda y: y + torch.rand_like(y), r"aten\.rand_like\.default"),
    ],
)
def test_random_numbers(made, said):
    with pytest.raises(UnsupportedModelError, match=f"draws random numbers: {said}") as e:
        captured(Returns(made))
    assert "model.eval()" in e.value.hint


class Counts(TinyModel):
    """Counts its calls; what it computes depends on the count, or not."""

    def __init__(self, used: bool) -> None:
        super().__init__(layers=1)
        self.used = used
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input_ids) + (self.calls if self.used else 0)


def test_buffers_that_are_written_to():
    model = Counts(used=False)
    capture = captured(model)
    assert torch.equal(capture.gm(IDS), model(IDS)) and float(model.calls) > 0
    with pytest.raises(UnsupportedModelError, match="writes to its buffer calls"):
        captured(Counts(used=True))


def test_what_the_code_sets_while_it_is_exported_is_taken_back():
    class Keeps(TinyModel):
        def forward(self, input_ids):
            self.kept = super().forward(input_ids)
            return self.kept + 1

    model = Keeps(layers=1)
    program_of(model)
    assert "kept" not in vars(model)


def test_code_that_branches_on_the_length_ends_the_context():
    class Branches(TinyModel):
        def forward(self, input_ids):
            return super().forward(input_ids) * (1 if input_ids.shape[1] <= 40 else 2)

    info = {"vocab_size": VOCAB, "context_length": 200}
    teacher = Teacher("odd", "factory", Branches(layers=1), None, None, info)
    assert "T=40" in capture_teacher(teacher).checks[-1].name and info["context_length"] == 40


# Where attention hides


@torch.library.custom_op("odd_tests::attention", mutates_args=())
def own_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k, v, enable_gqa=True)


@torch.library.custom_op("odd_tests::scaled", mutates_args=())
def own_scaled(x: Tensor) -> Tensor:
    return 2 * x


@torch.library.custom_op("odd_tests::routed", mutates_args=())
def own_routed(x: Tensor, ends: Tensor) -> Tensor:
    assert ends.ndim == 1
    return 2 * x


for op in (own_attention, own_scaled, own_routed):
    op.register_fake(lambda x, *_: torch.empty_like(x))


def with_memory(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    k, v = (torch.cat([x[:, :, :1] * 0, x], 2) for x in (k, v))
    return sdpa(q, k, v, enable_gqa=True, **mask or {"is_causal": True})


def masked_memory(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return with_memory(q, k, v, attn_mask=F.pad(distances(q) >= 0, (1, 0), value=True))


def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return causal(q, k, v, enable_gqa=True).float()


REFUSED = [
    (own_attention, r"odd_tests\.attention\.default, an operator that mixes tokens"),
    (under_autocast, "inside of wrap_with_autocast"),
    (with_memory, r"queries, keys and values are of \w+, \w+ \+ 1, \w+ \+ 1 tokens"),
    (masked_memory, "is of 48 x 49 tokens, want as many keys as queries"),
]


@pytest.mark.parametrize("core, reason", REFUSED, ids=lambda v: getattr(v, "__name__", getattr(v, "_name", "")))
def test_cores_that_cannot_be_looked_into(monkeypatch, core, reason):
    scan = find_attention(capture_of(with_core(monkeypatch, core, rope=False)))
    assert not scan.sites and len(scan.rejected) == 1
    assert re.search(reason, scan.rejected[0].reason), scan.rejected[0].reason


def test_an_operator_of_the_models_own_that_mixes_no_tokens_is_no_attention(monkeypatch):
    scan = find_attention(
        capture_of(with_core(monkeypatch, lambda q, k, v: causal(own_scaled(q), k, v, enable_gqa=True)))
    )
    assert len(scan.sites) == 1 and not scan.rejected


def under_enable_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        return causal(q, k, v, enable_gqa=True)


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return checkpoint(under_enable_grad, q, k, v, use_reentrant=False)


@pytest.mark.parametrize("core", [under_enable_grad, checkpointed])
def test_parts_that_export_sets_apart_are_looked_into(monkeypatch, core):
    model = with_core(monkeypatch, core)
    capture = capture_of(model)
    scan = find_attention(capture)
    assert len(scan.sites) == 1 and not scan.rejected and torch.equal(capture.gm(IDS), model(IDS))
    assert not any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in capture.gm.graph.nodes)


# Windows that no constant of the graph tells

TABLE = torch.ones(128, 128).tril().triu(-99) > 0
HUNDRED = torch.tensor(100)


def in_a_table(q: Tensor) -> Tensor:
    return TABLE[: q.shape[2], : q.shape[2]]


def in_a_tensor(q: Tensor) -> Tensor:
    return (distances(q) >= 0) & (distances(q) < HUNDRED)


def in_a_product(q: Tensor) -> Tensor:
    return (distances(q) >= 0) & (distances(q) / 10 < 10)


@pytest.mark.parametrize("rule", [in_a_table, in_a_tensor, in_a_product])
def test_windows(monkeypatch, rule):
    core = lambda q, k, v: sdpa(q, k, v, attn_mask=rule(q), enable_gqa=True)  # noqa: E731
    (site,) = find_attention(capture_of(with_core(monkeypatch, core))).sites
    assert site.window == 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_kept_core_in_another_precision(monkeypatch, dtype):
    core = lambda q, k, v: causal(q.to(dtype), k.to(dtype), v.to(dtype), enable_gqa=True).float()  # noqa: E731
    capture = capture_of(with_core(monkeypatch, core))
    stateful = make_stateful(capture, max_length=64)
    logits, state = run_chunks(stateful, IDS, (5, 1, 3), dtype=torch.float32)
    assert {s.dtype for s in state} == {torch.float32}
    torch.testing.assert_close(logits, capture.gm(IDS), rtol=0, atol=2e-3)


# Tables of positions


class Placed(nn.Embedding):
    """Adds the rows of a table that a rule of the ids chooses."""

    def __init__(self, tokens: nn.Embedding, rows: int, index: Callable[[Tensor], Tensor]) -> None:
        super().__init__(rows, tokens.embedding_dim)
        self.tokens, self.index = tokens, index

    def forward(self, input: Tensor) -> Tensor:
        return self.tokens(input) + super().forward(self.index(input))


@pytest.mark.parametrize(
    "index, context",
    [
        (lambda ids: torch.arange(ids.shape[1]), 40),
        (lambda ids: torch.arange(ids.shape[1]) + 2, 38),
        (lambda ids: 2 * torch.arange(ids.shape[1]), 20),
        (lambda ids: torch.zeros_like(ids), None),
        (lambda ids: ids % 40, None),
    ],
    ids=["rows from 0", "rows from 2", "every second", "always row 0", "rows of tokens"],
)
def test_a_table_of_positions_ends_the_context(index, context):
    model = TinyModel(layers=1)
    model.embed = Placed(model.embed, 40, index)
    teacher = Teacher("odd", "factory", model, None, None, {"vocab_size": VOCAB})
    capture_teacher(teacher, shapes=((2, 9), (1, 1)))
    assert teacher.info.get("context_length") == context
    if context:
        assert model(torch.zeros(1, context, dtype=torch.int64)).shape[1] == context
        with pytest.raises(IndexError):
            model(torch.zeros(1, context + 1, dtype=torch.int64))
