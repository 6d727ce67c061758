"""The student as a transformers model, against the run folder's program, recomputed whole for every token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, student_of
from torch import Tensor

from tcal_compiler import StudentForCausalLM
from tcal_compiler.errors import ConfigError, DataError
from tcal_compiler.hf import StudentConfig
from tcal_compiler.runtime import session as session_module
from tcal_compiler.runtime.hf_cache import StudentCache
from tcal_compiler.runtime.hf_files import open_program
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.program_file import load_program
from tcal_compiler.runtime.session import OnnxSession

Logits = Callable[[Tensor], Tensor]
NEW = 12
ROW = torch.zeros(1, 3, dtype=torch.long)


@pytest.fixture(scope="module")
def model(shared_run: Path) -> StudentForCausalLM:
    return StudentForCausalLM.from_pretrained(shared_run)


@pytest.fixture(scope="module")
def whole(shared_run: Path) -> Logits:
    """The run folder's student on whole, unpadded sequences [B, T] -> [B, T, V]: no state, none of the model's code."""
    program, facts = load_program(shared_run / "student.pt2", allow_pickle=False)
    module = program.module()

    def logits(ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1]).expand(ids.shape).contiguous()
        with torch.no_grad():
            return module(ids, positions) if facts.has_positions else module(ids)

    return logits


def ids_of(*lengths: int) -> list[Tensor]:
    """Rows of random tokens of these lengths."""
    gen = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (n,), generator=gen) for n in lengths]


def padded(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """The rows as one batch and its mask; padding is tokens like others."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 7), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def greedy(whole: Logits, prompt: Tensor, count: int) -> list[int]:
    ids = prompt[None]
    for _ in range(count):
        ids = torch.cat([ids, whole(ids)[:, -1].argmax(-1)[:, None]], 1)
    return ids[0, len(prompt) :].tolist()


def beams(whole: Logits, prompt: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
    """The `width` best continuations that beam search finds, best first, and their mean log-probabilities."""
    found, scores = prompt[None], torch.zeros(1)
    for _ in range(count):
        each = scores[:, None] + whole(found)[:, -1].log_softmax(-1)
        scores, flat = each.flatten().topk(width)
        found = torch.cat([found[flat // each.shape[1]], (flat % each.shape[1])[:, None]], 1)
    return found, scores / count


def test_a_plain_call_is_the_run_folders_own_graph_bit_for_bit(model, whole):
    for ids in (torch.stack(ids_of(9, 9)), ids_of(50)[0][None], ids_of(1)[0][None]):
        out = model(ids)
        assert torch.equal(out.logits, whole(ids)) and out.loss is None and out[-1] is out.logits
    assert torch.equal(model(ids, logits_to_keep=1).logits, out.logits[:, -1:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_plain_call_is_as_if_it_were_not_there(model, whole, side):
    rows = ids_of(31, 9, 22)
    ids, mask = padded(rows, side)
    ids[mask == 0] = -1  # no token at all
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i][mask[i] == 1], whole(row[None])[0], rtol=0, atol=1e-4)


def test_loss_and_gradients_are_those_of_next_tokens(model, whole):
    ids = torch.stack(ids_of(20, 20))
    labels = ids.clone()
    labels[:, :5] = -100
    loss = model(ids, labels=labels).loss
    expected = -whole(ids)[:, 4:-1].log_softmax(-1).gather(2, ids[:, 5:, None]).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    assert all(g is not None and g.isfinite().all() for g in gradients) and sum(g.abs().sum() for g in gradients) > 0


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_greedy_tokens_are_those_of_the_whole_graph_and_of_onnx_runtime(model, whole, shared_run, options):
    (prompt,) = ids_of(23)
    expected = greedy(whole, prompt, NEW)
    assert list(OnnxSession(shared_run / "onnx").generate(prompt.tolist(), NEW)) == expected
    out = model.generate(prompt[None], max_new_tokens=NEW, do_sample=False, **options)
    assert out[0, len(prompt) :].tolist() == expected and len(set(expected)) > 3


def test_a_static_cache_has_its_slots_from_the_start_and_gives_the_logits_of_one_that_grows(model):
    (row,) = ids_of(30)
    static, grows = model.new_cache(slots=30), model.new_cache()
    for part in row[None].split([17, 1, 12], 1):
        a, b = (model(part, past_key_values=c, use_cache=True).logits for c in (static, grows))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        sizes = [c.states[0].shape[2] for c in (static, grows)]
        assert sizes == [30, grows.get_seq_length()]
    with pytest.raises(DataError, match="do not fit in a static cache of 30"):
        model(row[None, :1], past_key_values=static)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_beams_are_those_of_a_search_that_keeps_no_state(model, whole, options):
    (prompt,) = ids_of(11)
    sequences, scores = beams(whole, prompt, NEW, 4)
    out = model.generate(
        prompt[None],
        max_new_tokens=NEW,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    assert torch.equal(out.sequences, sequences)
    torch.testing.assert_close(out.sequences_scores, scores, rtol=0, atol=1e-5)


def test_beams_go_wrong_when_the_state_is_not_reordered(model, whole, monkeypatch):
    (prompt,) = ids_of(11)
    expected = beams(whole, prompt, NEW, 4)[0]
    monkeypatch.setattr(StudentCache, "reorder_cache", lambda *_: None)
    out = model.generate(prompt[None], max_new_tokens=NEW, num_beams=4, num_return_sequences=4, do_sample=False)
    assert not torch.equal(out, expected)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_left_padded_rows_get_the_tokens_that_each_gets_alone(model, options):
    rows = ids_of(19, 4, 11)
    ids, mask = padded(rows)
    settings = dict(max_new_tokens=NEW, do_sample=False, **options)
    together = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    alone = [model.generate(row[None], **settings)[0, len(row) :] for row in rows]
    assert torch.equal(together, torch.stack(alone)) and len({tuple(t.tolist()) for t in alone}) > 1


def test_a_row_that_ends_early_leaves_the_others_as_they_are(model, whole):
    rows = ids_of(19, 4)
    alone = [greedy(whole, row, NEW) for row in rows]

    def until(eos: int) -> list[list[int]]:
        return [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in alone]

    eos = next(t for t in alone[0] + alone[1] if len(until(t)[0]) != len(until(t)[1]))
    longest = max(map(len, until(eos)))
    ids, mask = padded(rows)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    assert out[:, 19:].tolist() == [tokens + [0] * (longest - len(tokens)) for tokens in until(eos)]


def test_sampling_draws_from_the_same_logits_with_and_without_a_state(model):
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = dict(do_sample=True, top_k=20, num_return_sequences=3, use_cache=use_cache)
        drawn.append(model.generate(ids_of(9)[0][None], max_new_tokens=NEW, **options))
    assert torch.equal(*drawn) and len({tuple(t.tolist()) for t in drawn[0]}) == 3


def test_a_long_prompt_is_fed_in_pieces_where_its_logits_are_not_wanted(model, monkeypatch):
    ids, mask = padded(ids_of(40, 13))
    args = dict(attention_mask=mask, use_cache=True)
    whole = model(ids, **args)
    monkeypatch.setattr(session_module, "_LONGEST_CHUNK", 7)
    pieces = model(ids, **args, logits_to_keep=9)
    torch.testing.assert_close(pieces.logits, whole.logits[:, -9:], rtol=0, atol=1e-4)
    assert [s.shape for s in pieces[-1].states] == [s.shape for s in whole[-1].states]
    next_ids = torch.tensor([[3], [4]])
    again = [model(next_ids, past_key_values=out[-1]).logits for out in (pieces, whole)]
    torch.testing.assert_close(*again, rtol=0, atol=1e-4)


def test_a_state_is_continued_many_times_and_its_rows_are_repeated_and_selected(model, whole):
    prefix, first, second = ids_of(21, 5, 8)
    cache = model(prefix[None], use_cache=True)[-1]
    for more in (first, second):
        text = torch.cat([prefix, more])
        out = model.generate(text[None], past_key_values=copy.deepcopy(cache), max_new_tokens=5, do_sample=False)
        assert out[0, len(text) :].tolist() == greedy(whole, text, 5)
    assert cache.get_seq_length() == 21
    cache.batch_repeat_interleave(3)
    tokens = torch.tensor([[1], [2], [3]])
    logits = model(tokens, past_key_values=cache).logits[:, 0]
    cache.batch_select_indices(torch.tensor([2, 0]))
    logits = torch.cat([logits, model(torch.tensor([[9], [9]]), past_key_values=cache).logits[:, 0]])
    for row, last in zip(logits, ([1], [2], [3], [3, 9], [1, 9]), strict=True):
        expected = whole(torch.cat([prefix, torch.tensor(last)])[None])[0, -1]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size) == (0, -1)


def test_states_that_are_not_this_students_are_refused(model):
    from transformers import DynamicCache

    row = ids_of(6)[0][None]
    other = copy.deepcopy(model)
    cache = other(row, use_cache=True)[-1]
    with pytest.raises(ConfigError, match="of another model"):
        model(row, past_key_values=cache)
    with pytest.raises(ConfigError, match="DynamicCache"):
        model.generate(row, past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(DataError, match="has 2 rows, the cache 1"):
        other(row.repeat(2, 1), past_key_values=cache)
    with pytest.raises(DataError, match="6 tokens seen and 1 new ones"):
        other(row[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 5))
    with pytest.raises(DataError, match="hides other tokens"):
        other(row[:, :1], past_key_values=cache, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]]))
    with pytest.raises(ConfigError, match="keep no history"):
        cache.crop(-1)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize(
    "call, error, reason",
    [
        (lambda m: m(torch.tensor([[256]])), DataError, "outside the vocabulary of 256"),
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), DataError, "at least 1"),
        (lambda m: m(torch.zeros(1, 9000, dtype=torch.long)), DataError, "do not fit in the context"),
        (lambda m: m(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 1, 3, 3)), DataError, "has shape"),
        (lambda m: m(ROW, torch.ones(1, 5)), DataError, r"want \[1, 3\]: 0 tokens seen and 3 new"),
        (lambda m: m(ROW, torch.ones(1, 5), use_cache=True), DataError, r"want \[1, 3\]"),
        (lambda m: m(ROW, logits_to_keep=-1), DataError, "is -1; there are 3 new tokens"),
        (lambda m: m(ROW, logits_to_keep=torch.tensor([3])), DataError, r"names the tokens 3\.\.3"),
        (lambda m: m(ROW, logits_to_keep=torch.tensor([0.5])), DataError, r"is torch\.float32 \[1\]"),
        (lambda m: m(ROW, labels=ROW, logits_to_keep=1), DataError, "labels: are given with logits_to_keep"),
        (lambda m: m(ROW, labels=ROW[:, :2]), DataError, r"labels: are torch\.int64 \[1, 2\]; want int64 \[1, 3\]"),
        (lambda m: m(ROW, labels=ROW + 256), DataError, r"labels: 256\.\.256 are outside the vocabulary of 256"),
        (lambda m: m(torch.zeros(1, 3, dtype=torch.long), output_attentions=True), ConfigError, "output_attentions"),
        (
            lambda m: m.generate(torch.zeros(1, 3, dtype=torch.long), cache_implementation="offloaded"),
            ConfigError,
            "offl",
        ),
        (lambda m: m.generate(torch.zeros(1, 3, dtype=torch.long), prompt_lookup_num_tokens=2), ValueError, "assisted"),
        (lambda m: m.new_cache(slots=0), ConfigError, "a static cache holds"),
        (lambda m: m.half(), ConfigError, "float16"),
        (lambda m: m.to(torch.bfloat16), ConfigError, "bfloat16"),
        (lambda m: type(m)(m.config), ConfigError, "from_pretrained"),
    ],
)
def test_what_a_student_cannot_do_is_refused(model, call, error, reason):
    with pytest.raises(error, match=reason):
        call(model)
    assert model.dtype == torch.float32


def test_both_graphs_follow_the_model_to_another_device(model):
    model = copy.deepcopy(model).to("meta")
    for gm in (model.graph, model._stateful.gm):
        named = {str(a) for n in gm.graph.nodes for a in [*n.args, *n.kwargs.values()] if isinstance(a, torch.device)}
        held = {t.device.type for t in [*gm.parameters(), *gm.buffers()]}
        assert named <= {"meta"} and held == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "cores, policy", [(("window", "is_causal"), "keep=0"), (("is_causal", "mask"), "none"), (("alibi", "scale"), "all")]
)
def test_windows_recurrent_states_alone_and_caches_alone_are_carried_and_reordered(cores, policy):
    student = student_of(cores, policy)
    for site in student.converted:
        naive_(student.gm.get_submodule(f"tcal_mixers.{site.index}"), torch.Generator().manual_seed(1))
    config = StudentConfig(vocab_size=VOCAB, max_position_embeddings=128)
    model = StudentForCausalLM(config, open_program(student.export()))
    ids, mask = padded([row % VOCAB for row in ids_of(19, 4, 11)])
    for beams in (1, 3):
        settings = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False, num_beams=beams)
        expected = model.generate(ids, use_cache=False, **settings)
        for kind in ("dynamic", "static"):
            assert torch.equal(model.generate(ids, cache_implementation=kind, **settings), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_a_student_on_cuda_gives_the_tokens_of_the_cpu(model, options):
    here, there = model, copy.deepcopy(model).to("cuda")
    ids, mask = padded(ids_of(19, 4, 11))
    settings = dict(max_new_tokens=NEW, do_sample=False, **options)
    there_ids, there_mask = ids.cuda(), mask.cuda()
    torch.testing.assert_close(there(there_ids).logits.cpu(), here(ids).logits, rtol=0, atol=1e-3)
    expected = here.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(there.generate(there_ids, attention_mask=there_mask, **settings).cpu(), expected)
