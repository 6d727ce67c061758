"""State in, state out: any cut into chunks is one pass, and padding is as if it were not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.kernels.gated_delta_rule import gated_delta_rule
from tcal_compiler.passes.capture import capture_program, example_ids, export_module
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import from_program, widen_to_float64
from tcal_compiler.passes.make_stateful import cuts, export_stateful, make_stateful, run_chunks, runs_behind
from tcal_compiler.passes.stateful_graph import StatefulGraph
from tcal_compiler.passes.types import Capture
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.student import make_student

VOCAB, WIDTH, HEADS, TABLE = 256, 32, 4, 128
DIM = WIDTH // HEADS


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products run faster on one thread, and much faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, shift: bool) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (z.view(b, t, HEADS, DIM).transpose(1, 2) for z in self.qkv(self.norm(x)).split(WIDTH, -1))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, WIDTH))
        return x + F.pad(x, (0, 0, 1, 0))[:, :t] if shift else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Plain(nn.Module):
    """A causal model that makes its positions itself, in one of many spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.learned = nn.Embedding(TABLE, WIDTH)
        self.table = nn.Parameter(torch.randn(1, TABLE, WIDTH))
        self.register_buffer("rates", 100.0 ** -torch.arange(0, 1, 2 / DIM))
        angles = torch.outer(torch.arange(TABLE).float(), self.rates)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("rows", torch.arange(TABLE)[None])
        self.register_buffer("tril", torch.ones(1, 1, TABLE, TABLE, dtype=torch.bool).tril())

    def positions(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        match self.spelling:
            case "embedding(arange)" | "nanogpt":
                return x + self.learned(torch.arange(0, t, dtype=torch.long))
            case "embedding(buffer)":
                return x + self.learned(self.rows[:, :t])
            case "embedding(expanded)":
                return x + self.learned(torch.arange(t).unsqueeze(0).expand(x.shape[0], t))
            case "embedding(arange with offset)":
                return x + self.learned(torch.arange(2, t + 2))
            case "parameter[:T]":
                return x + self.table[:, :t]
            case "cumsum":
                return x + self.learned(torch.ones(t, dtype=torch.long).cumsum(0))
        return x

    def rope(self, t: int) -> tuple[Tensor, Tensor] | None:
        match self.spelling:
            case "tables[:T]":
                return self.cos[:t], self.sin[:t]
            case "tables[None, None, :T]":
                return self.cos[None, None, :t], self.sin[None, None, :t]
            case "rope(arange)":
                angles = torch.outer(torch.arange(t, dtype=torch.float32), self.rates)
                return angles.cos(), angles.sin()
            case "rope(matmul)":
                angles = (self.rates[None, :, None] @ torch.arange(t)[None, None].float()).transpose(1, 2)
                return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        return None

    def forward(self, input_ids: Tensor) -> Tensor:
        t = input_ids.shape[1]
        x, rope = self.positions(self.embed(input_ids)), self.rope(t)
        mask = self.tril[:, :, :t, :t] if self.spelling == "nanogpt" else None
        for block in self.blocks:
            x = block(x, rope, mask, self.spelling == "token shift")
        return self.head(x)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def transformer(family: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=256
    )
    heads = dict(num_attention_heads=HEADS, num_key_value_heads=2, initializer_range=0.2, attn_implementation="sdpa")
    if family == "llama":
        config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
        return Wrapped(transformers.LlamaForCausalLM(config).eval())
    config = transformers.MistralConfig(**sizes, **heads, sliding_window=8, head_dim=DIM)
    return Wrapped(transformers.MistralForCausalLM(config).eval())


def capture_of(module: nn.Module, *, has_positions: bool) -> Capture:
    program = export_module(module, has_positions=has_positions, vocab_size=VOCAB)
    return capture_program(program, teacher=module, implementation="test", shapes=((2, 9),))


@cache
def student(family: str, policy: str) -> tuple[Capture, StatefulGraph]:
    """The capture of a student with gates that remember and forget, and its stateful form."""
    module = Plain(family).eval() if "[" in family or "(" in family else transformer(family)
    teacher = capture_of(module, has_positions=isinstance(module, Wrapped))
    scan = find_attention(teacher)
    made = make_student(teacher, scan, choose(scan, policy))
    gen = torch.Generator().manual_seed(1)
    for site in made.converted:
        naive_(made.gm.get_submodule(f"tcal_mixers.{site.index}"), gen)
    capture = capture_program(made.export(), teacher=made.gm, implementation="student", shapes=((2, 9),))
    return capture, make_stateful(capture)


def test_chunks_are_compared_on_no_more_tokens_than_the_longest_sequence_has():
    capture, _ = student("llama", "keep=0")
    checks = make_stateful(capture, max_length=16).checks
    assert [c.name for c in checks] == ["chunks of (14, 1, 1) equal one pass", "chunks of (1, 3, 12) equal one pass"]
    assert all(c.passed for c in checks) and [cuts(n, (1, 3, 17)) for n in (2, 21)] == [(1, 1), (1, 3, 17)]


def test_a_sequence_of_two_tokens_is_compared_without_an_empty_chunk():
    checks = make_stateful(tiny_models.scanned()[0], max_length=2).checks
    assert [c.name for c in checks] == ["chunks of (1, 1) equal one pass"] * 2


@pytest.mark.parametrize(
    "mask",
    [
        lambda far: torch.where(far >= 0, 0.0, float("-inf")),
        lambda far: (-0.1 * far).masked_fill(far < 0, float("-inf")),
        lambda far: (far / -8).masked_fill(far < 0, float("-inf")),
    ],
    ids=["where", "times a float", "divided"],
)
def test_masks_made_of_whole_numbers_are_compared_in_float64_too(monkeypatch: pytest.MonkeyPatch, mask):
    """scaled_dot_product_attention of float64 reads a float32 mask wrongly, without an error."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(tiny_models.distances(q)), enable_gqa=True)

    monkeypatch.setitem(tiny_models.CORES, "made of numbers", core)
    capture = tiny_models.capture_of(tiny_models.TinyModel("made of numbers"))
    assert all(c.passed for c in make_stateful(capture).checks)


def test_the_program_of_a_student_takes_positions_as_its_graph_does():
    teacher = capture_of(transformer("llama"), has_positions=True)
    scan = find_attention(teacher)
    made = make_student(teacher, scan, choose(scan, "keep=0"))
    args = teacher.inputs(example_ids(2, 7, VOCAB))
    assert len(args) == 2 and torch.equal(made.export().module()(*args), made.gm(*args))


def wide(capture: Capture) -> StatefulGraph:
    """The stateful graph of the capture in float64, rotary tables included."""
    return make_stateful(replace(capture, gm=widen_to_float64(capture.gm)), verify=False, max_length=TABLE)


def recurrent(stateful: StatefulGraph, state: tuple[Tensor, ...]) -> list[Tensor]:
    return [s for n, s in zip(stateful.state_names, state, strict=True) if n.endswith("recurrent_state")]


def padded_batch(rows: list[Tensor], sides: list[str]) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as one batch, padded with random tokens on the left or on the right."""
    longest = max(len(r) for r in rows)
    ids, mask = example_ids(len(rows), longest, VOCAB, seed=7), torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, (row, side) in enumerate(zip(rows, sides, strict=True)):
        start = 0 if side == "right" else longest - len(row)
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return ids, mask


def assert_batch_equals_single_runs(stateful: StatefulGraph, exact: Callable[[Tensor], Tensor]) -> None:
    rows = [example_ids(1, n, VOCAB, seed=n)[0] for n in (31, 9, 22)]
    ids, mask = padded_batch(rows, ["left", "left", "right"])
    for chunks in ((31,), (1, 3, 17, 10)):
        logits, _ = run_chunks(stateful, ids, chunks, mask=mask, dtype=torch.float64)
        assert logits.isfinite().all()
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[i][mask[i] == 1], exact(row[None])[0], rtol=0, atol=1e-11)


STUDENTS = [("llama", "keep=0"), ("llama", "none"), ("rope(arange)", "keep=1"), ("mistral", "keep=0")]


@pytest.mark.parametrize("family, policy", [*STUDENTS, pytest.param("llama", "all", marks=pytest.mark.slow)])
def test_any_cut_is_one_pass_and_ragged_batches_are_single_runs(family: str, policy: str):
    capture, stateful = student(family, policy)
    kinds = {"all": {"softmax"}, "none": {"gdn"}}.get(policy, {"softmax", "gdn"})
    assert {layer.kind for layer in stateful.layers} == kinds
    assert {layer.window for layer in stateful.layers if layer.kind == "softmax"} <= {
        8 if family == "mistral" else None
    }
    assert all(c.passed and c.measured < 1e-12 for c in stateful.checks)
    whole, graph = widen_to_float64(capture.gm), wide(capture)

    def exact(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return whole(*capture.inputs(ids))

    ids = example_ids(2, 75, VOCAB)
    for chunks in ((75,), (1, 3, 17, 54), (70, 1, 1, 1, 1, 1)):
        logits, _ = run_chunks(graph, ids, chunks, dtype=torch.float64)
        torch.testing.assert_close(logits, exact(ids), rtol=0, atol=1e-11)
    assert_batch_equals_single_runs(graph, exact)


SPELLINGS = [
    "embedding(arange)",
    "embedding(buffer)",
    "embedding(expanded)",
    "embedding(arange with offset)",
    "parameter[:T]",
    "tables[:T]",
    "tables[None, None, :T]",
    "rope(arange)",
    "rope(matmul)",
    "nanogpt",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_positions_that_a_model_makes_itself_follow_the_mask(spelling: str):
    capture = capture_of(Plain(spelling).eval(), has_positions=False)
    whole = widen_to_float64(capture.gm)
    graph = wide(capture)
    with torch.no_grad():
        assert_batch_equals_single_runs(graph, lambda ids: whole(ids))


def test_tables_of_positions_end_and_computed_positions_do_not():
    computed, tabled = (student(spelling, "none")[1] for spelling in ("rope(arange)", "tables[:T]"))
    assert runs_behind(computed, 100 * TABLE)
    assert runs_behind(tabled, TABLE - 1) and not runs_behind(tabled, TABLE)


def test_a_padded_chunk_leaves_recurrent_states_bit_equal():
    _, stateful = student("llama", "keep=0")
    ids = example_ids(2, 40, VOCAB)
    mask = torch.ones_like(ids)
    mask[:, 30:] = 0
    _, before = run_chunks(stateful, ids[:, :30], (30,), dtype=torch.float32)
    _, after = run_chunks(stateful, ids, (30, 1, 9), mask=mask, dtype=torch.float32)
    assert all(s.abs().max() > 0 for s in recurrent(stateful, before))
    assert all(torch.equal(a, b) for a, b in zip(recurrent(stateful, before), recurrent(stateful, after), strict=True))
    _, empty = run_chunks(stateful, ids, (7, 33), mask=torch.zeros_like(ids), dtype=torch.float32)
    assert all(torch.equal(s, torch.zeros_like(s)) for s in recurrent(stateful, empty))


@pytest.mark.parametrize("policy", ["keep=0", "none"])
def test_the_exported_program_is_the_graph(policy: str):
    _, stateful = student("llama", policy)
    again = replace(stateful, gm=from_program(export_stateful(stateful)))
    ids = example_ids(3, 30, VOCAB)
    for chunks in ((30,), (1, 3, 17, 9), (12, 1, 17)):
        a, b = (run_chunks(g, ids, chunks, dtype=torch.float32)[0] for g in (stateful, again))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_parameters_are_shared_and_names_are_those_of_the_deployed_form():
    capture, stateful = student("llama", "keep=0")
    mine = {p.data_ptr() for p in stateful.gm.parameters()}
    assert mine <= {p.data_ptr() for p in capture.gm.parameters()}
    assert stateful.input_names[2:] == (
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.recurrent_state",
    )
    assert stateful.output_names[:2] == ("logits", "present.0.key")
    assert [tuple(s.shape) for s in stateful.empty_state(5, past=3)] == [(5, 2, 3, 8), (5, 2, 3, 8), (5, 4, 8, 8)]


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj, self.out = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, VOCAB),
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        b, t = input_ids.shape
        q, k, v = (z.view(b, t, 1, WIDTH).transpose(1, 2) for z in self.proj(self.embed(input_ids)).split(WIDTH, -1))
        y = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(WIDTH))
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.embed(input_ids))


class Packed(Bag):
    """The rows of a batch one after another, as packed sequences."""

    def forward(self, input_ids: Tensor) -> Tensor:
        batch, tokens = input_ids.shape
        x = self.embed(input_ids).view(1, batch * tokens, 1, WIDTH)
        gate, ends = torch.zeros_like(x[..., 0]), torch.arange(batch + 1) * tokens
        y, _ = gated_delta_rule(F.normalize(x, dim=-1), F.normalize(x, dim=-1), x, g=gate, beta=gate, cu_seqlens=ends)
        return self.out(y.view(batch, tokens, WIDTH))


@pytest.mark.parametrize(
    "module, reason",
    [
        (Bidirectional(), "not causal"),
        (Bag(), "no attention core"),
        (Packed(), "packed"),
        (Plain("cumsum"), "mixes positions"),
        (Plain("token shift"), "equal one pass"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_cannot_be_made_stateful_says_why(module: nn.Module, reason: str):
    capture = capture_of(module.eval(), has_positions=False)
    with pytest.raises(UnsupportedModelError, match=reason):
        make_stateful(capture)


def test_a_stateful_graph_is_not_made_stateful_again():
    _, stateful = student("llama", "none")
    capture = Capture(stateful.gm, True, VOCAB, "stateful", "")
    with pytest.raises(UnsupportedModelError, match="stateful already"):
        make_stateful(capture, verify=False)
