"""torch.compile(model, backend="tcal"): the student's logits at any length, and a typed error for whatever differs."""

from __future__ import annotations

import copy
import importlib.metadata
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from command_line import TINY
from tiny_models import llama
from torch._dynamo.backends import registry
from torch._dynamo.utils import counters

from examples.tiny_torch_teacher import factory
from tcal_compiler import Config, backend, convert
from tcal_compiler.errors import ConfigError, DataError, RunFolderError, UnsupportedModelError
from tcal_compiler.passes.choose import choose
from tcal_compiler.runtime.student import make_student
from tcal_compiler.runtime.weights import load_weights
from tcal_compiler.source import open_source

VOCAB = 256


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    backend.register_backend()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    """The plain PyTorch teacher that shared_run was converted from: do not edit."""
    return factory()


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A transformers teacher and its run folder: do not edit."""
    place = tmp_path_factory.mktemp("llama")
    model = llama(vocab_size=VOCAB)
    model.save_pretrained(place / "model")
    calib, align = {"sequences": 4, "length": 32, "holdout": 1}, {"steps": 3, "batch": 2}
    config = Config.model_validate({"policy": "keep=0", "local_window": 6, "calib": calib, "align": align})
    convert(str(place / "model"), tokenizer="bytes", out=place / "run", config=config, until="align")
    return model, place / "run"


def ids_of(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def compiled(model, run, *, dynamic=True, **options):
    options = {"student": str(run), "compiler": "eager"} | options
    return torch.compile(model, backend="tcal", fullgraph=True, dynamic=dynamic, options=options)


def exported(run: Path):
    """The student that the run folder ships."""
    return torch.export.load(run / "student.pt2").module()


def assert_close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


# The student's logits


@pytest.mark.parametrize(
    "compiler", ["inductor", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eager", "aot_eager"))]
)
def test_one_graph_for_all_lengths(tiny, shared_run, compiler):
    model, student = compiled(tiny, shared_run, compiler=compiler), exported(shared_run)
    graphs = []
    for shape in ((2, 9), (3, 70), (2, 33), (2, 8), (2, 5)):  # windows are of 8 tokens
        ids = ids_of(*shape)
        assert_close(model(ids), student(ids))
        assert (model(ids) - tiny(ids)).abs().max() > 0.1
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_the_student_is_made_once(tiny, shared_run, monkeypatch):
    made = []
    monkeypatch.setattr(backend, "prepare", lambda *a, real=backend.prepare: made.append(a) or real(*a))
    model, student = compiled(tiny, shared_run, dynamic=None), exported(shared_run)
    for shape in ((2, 9), (2, 12), (1, 1), (1, 20)):  # Dynamo traces the teacher anew for most of these
        assert_close(model(ids_of(*shape)), student(ids_of(*shape)))
    assert len(made) == 1


@pytest.mark.slow
def test_the_model_and_the_random_state_stay_as_they_are(tiny, shared_run):
    before, state = copy.deepcopy(tiny.state_dict()), torch.get_rng_state()
    grads = [p.requires_grad for p in tiny.parameters()]
    with torch.inference_mode():
        logits = compiled(tiny, shared_run)(ids_of(2, 9))
    with torch.enable_grad():
        again = compiled(tiny, shared_run)(ids_of(2, 9))
    assert torch.equal(logits, again) and not again.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in tiny.parameters()] == grads
    assert all(torch.equal(v, before[n]) for n, v in tiny.state_dict().items())


@pytest.mark.slow
def test_transformers(llama_run):
    teacher, run = llama_run
    source = open_source(str(run.parent / "model"), need_tokenizer=False).with_local_window(6)
    student = make_student(source.capture, source.scan, choose(source.scan, "keep=0"))
    load_weights(student, run / "weights.safetensors")
    model = compiled(teacher, run)
    for shape in ((2, 9), (3, 40)):
        assert_close(model(ids_of(*shape), use_cache=False).logits, student.logits(ids_of(*shape)))
    ids = ids_of(2, 9)
    positions = torch.arange(3, 12).expand(2, -1).contiguous()
    moved = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert_close(moved, student.gm(ids, positions))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    padded = model(ids, attention_mask=mask, use_cache=False).logits
    assert_close(padded[1, :5], student.logits(ids[1:, :5])[0])
    assert_close(padded[0], student.logits(ids[:1])[0])


# What is refused


def test_a_second_model_of_the_same_class_is_not_answered_with_the_first_ones_student(tiny, shared_run):
    other = copy.deepcopy(tiny)
    other.head.weight.mul_(1.5)
    compiled(tiny, shared_run)(ids_of(2, 9))
    with refused(UnsupportedModelError, "another one of the same class", r"_dynamo\.reset"):
        compiled(other, shared_run)(ids_of(2, 9))


def refused(kind: type[Exception], *words: str):
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{w})" for w in words))


def cached(model, ids):
    return model(ids, past_key_values=model(ids).past_key_values)


def left_padded(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return model(ids, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda model, ids: model(ids), ("cache of keys and values", "use_cache=False")),
        pytest.param(
            lambda model, ids: model(ids, logits_to_keep=1, use_cache=False),
            (r"\[2, 1, 256\]", r"\[2, 9, 256\]"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda model, ids: model(ids, labels=ids.clone(), use_cache=False),
            ("labels int64",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda model, ids: model(inputs_embeds=torch.ones(2, 9, 32), use_cache=False),
            ("inputs_embeds float32",),
            marks=pytest.mark.slow,
        ),
        (left_padded, ("attention_mask of row 1", "padding_side")),
    ],
    ids=["cache", "some logits", "labels", "embeddings", "padding on the left"],
)
def test_calls_that_are_no_plain_forward(llama_run, call, words):
    teacher, run = llama_run
    with refused(UnsupportedModelError, "the compiled call", *words):
        call(compiled(teacher, run), ids_of(2, 9))


def test_a_cache_that_goes_in(llama_run):
    teacher, run = llama_run
    past = teacher(ids_of(2, 9)).past_key_values
    with refused(UnsupportedModelError, r"past_key_values\S* float32", "use_cache=False"):
        compiled(teacher, run)(ids_of(2, 9), past_key_values=past)


def test_logits_that_are_not_returned_as_they_are(tiny, shared_run):
    with refused(UnsupportedModelError, "something else than the model's logits"):
        compiled(lambda ids: 2 * tiny(ids), shared_run)(ids_of(2, 9))
    other = copy.deepcopy(tiny)
    with refused(UnsupportedModelError, "weights of 2 models"):
        compiled(lambda ids: tiny(ids) + other(ids), shared_run)(ids_of(2, 9))


def test_training_mode(tiny, shared_run):
    model = copy.deepcopy(tiny)
    fast = compiled(model, shared_run)
    good = fast(ids_of(2, 9))
    model.train()
    with refused(UnsupportedModelError, "training mode", r"model\.eval\(\)"):
        fast(ids_of(2, 9))
    model.eval()
    assert torch.equal(fast(ids_of(2, 9)), good)
    torch._dynamo.reset()
    model.layers[1].train()
    with refused(UnsupportedModelError, "training mode", r"such as layers\.1"):
        compiled(model, shared_run)(ids_of(2, 9))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    [
        ("layers.2.mlp.up_proj.weight", r"values of layers\.2\.mlp\.up_proj\.weight differ, by 1 "),
        ("layers.2.attn.q_proj.weight", r"in layers that were converted, .*q_proj"),
    ],
)
def test_changed_weights(tiny, shared_run, name, words):
    """After the first call; the first of the two weights is the same in the student, the second is not."""
    model = copy.deepcopy(tiny)
    weight = model.get_parameter(name)
    fast = compiled(model, shared_run)
    good = fast(ids_of(2, 9))
    weight[0, 0] += 1
    with refused(RunFolderError, "another model", words):
        fast(ids_of(2, 9))
    weight.copy_(tiny.get_parameter(name))
    assert torch.equal(fast(ids_of(2, 9)), good)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_hidden_layers": 3}, ("it has", r"layers\.2\.")),
        pytest.param({"num_hidden_layers": 1}, ("it lacks", r"layers\.1\.", "no others"), marks=pytest.mark.slow),
        pytest.param(
            {"intermediate_size": 64},
            (r"mlp.down_proj.weight is float32 \[32, 64\]", r"\[32, 48\]"),
            marks=pytest.mark.slow,
        ),
        pytest.param({"tie_word_embeddings": False}, ("embed_tokens",), marks=pytest.mark.slow),
    ],
    ids=["deeper", "shallower", "wider", "untied"],
)
def test_another_model(llama_run, changes, words):
    with refused(RunFolderError, "run", *words):
        compiled(llama(vocab_size=VOCAB, **changes), llama_run[1])(ids_of(2, 9), use_cache=False)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"scale": 0.5}, ("attention 0: scale is 0.25", "here 0.5")),
        ({"is_causal": False}, ("attention 0", "not causal")),
    ],
)
def test_the_same_weights_in_another_attention(tiny, shared_run, monkeypatch, changes, words):
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **options: real(*args, **(options | changes))
    )
    with refused(RunFolderError, *words):
        compiled(tiny, shared_run, dynamic=None)(ids_of(2, 9))  # dynamic=True would make an input of the scale


@pytest.mark.slow
def test_another_dtype(llama_run):
    model = copy.deepcopy(llama_run[0]).bfloat16()
    with refused(RunFolderError, r"bfloat16 .* float32"):
        compiled(model, llama_run[1])(ids_of(2, 9), use_cache=False)


def test_run_folders(tiny, shared_run, tmp_path):
    with refused(RunFolderError, "no such run folder"):
        compiled(tiny, tmp_path / "none")(ids_of(2, 9))
    run = tmp_path / "planned"
    config = Config.model_validate({"calib": {"sequences": 4, "length": 32, "holdout": 1}})
    convert(TINY, tokenizer="bytes", out=run, config=config, until="plan")
    with refused(RunFolderError, "stage calibrate is not complete", "complete: plan"):
        compiled(tiny, run)(ids_of(2, 9))
    shutil.copytree(shared_run, tmp_path / "damaged")
    (tmp_path / "damaged" / "weights.safetensors").write_bytes(b"")
    with refused(RunFolderError, r"weights\.safetensors", "sha256"):
        compiled(tiny, tmp_path / "damaged")(ids_of(2, 9))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"studnet": "run"}, ("unknown option studnet", "did you mean student")),
        ({"compiler": "tvm"}, ("compiler = 'tvm'", "aot_eager")),
        ({"inductor_mode": "max-autotune"}, ("'max-autotune' is for inductor", "'eager'")),
        ({"inductor_mode": "fast"}, ("inductor_mode = 'fast'", "max-autotune")),
        ({"policy": "none"}, ("student and policy",)),
        ({"student": None}, ("none given",)),
        ({"student": None, "policy": "none"}, ("policy given", "calibrate")),
        ({"align": {"step": 3}}, (r"unknown option align\.step",)),
    ],
)
def test_options(options, words):
    with refused(ConfigError, "options of the backend tcal", *words):
        compiled(torch.nn.Linear(2, 2), "run", **options)(torch.zeros(1, 2))


def test_mode_belongs_into_options():
    with refused(ConfigError, "max-autotune", "inductor_mode"):
        torch.compile(torch.nn.Linear(2, 2), backend="tcal", mode="max-autotune")(torch.zeros(1, 2))


# Conversion on the first call


def converting(model, batches, policy="keep=0", **options):
    usual = {"compiler": "eager", "align": {"steps": 2, "batch": 2}, "local_window": 6}
    options = {"policy": policy, "calibrate": batches} | usual | options
    return torch.compile(model, backend="tcal", fullgraph=True, dynamic=True, options=options)


@pytest.mark.slow
def test_conversion_on_the_first_call(tiny):
    batches = [ids_of(3, 24, seed=s) for s in range(2)]
    model = copy.deepcopy(tiny)
    with torch.inference_mode():
        fast = converting(model, batches)
        logits = fast(ids_of(2, 9))
        assert torch.equal(fast(ids_of(2, 9)), logits)
        torch._dynamo.reset()
        assert torch.equal(converting(model, batches)(ids_of(2, 9)), logits)
        assert not torch.equal(converting(model, [ids_of(6, 24, seed=7)])(ids_of(2, 9)), logits)
    unconverted = converting(model, batches, policy="all")(ids_of(2, 9))
    assert_close(unconverted, tiny(ids_of(2, 9)))
    assert (logits - unconverted).abs().max() > 0.1
    model.head.weight[0, 0] += 1
    with refused(UnsupportedModelError, "changed after it was converted"):
        fast(ids_of(2, 9))


@pytest.mark.parametrize(
    "batches, words",
    [
        ([], ("none",)),
        ([torch.zeros(2, 9)], ("float32",)),
        ([ids_of(2, 9), ids_of(2, 10)], (r"\[2, 9\]", r"\[2, 10\]")),
        ([ids_of(1, 9)], ("1 sequences",)),
        ([ids_of(2, 4)], ("4 tokens",)),
        ([ids_of(2, 9) + 200], ("vocabulary has 256",)),
    ],
)
def test_calibration_batches(tiny, batches, words):
    with refused(DataError, "calibration batches", *words):
        converting(tiny, batches)(ids_of(2, 9))


@pytest.mark.slow
def test_conversion_passes_on_what_a_conversion_refuses(tiny):
    with refused(ConfigError, "uniform:9"):
        converting(tiny, [ids_of(2, 9)], policy="uniform:9")(ids_of(2, 9))
    with refused(UnsupportedModelError, "bfloat16"):
        converting(llama(vocab_size=VOCAB).bfloat16(), [ids_of(2, 9)])(ids_of(2, 9), use_cache=False)


# Registration


def test_the_entry_point_is_the_backend(monkeypatch):
    """As torch finds it in an installed package; loading it must not register it a second time."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    ((name, target),) = project["entry-points"]["torch_dynamo_backends"].items()
    entry = importlib.metadata.EntryPoint(name, target, "torch_dynamo_backends")
    monkeypatch.delitem(registry._COMPILER_FNS, "tcal", raising=False)
    monkeypatch.setitem(registry._BACKENDS, name, entry)
    assert registry.lookup_backend("tcal") is backend.tcal
    backend.register_backend()
    assert registry.lookup_backend("tcal") is backend.tcal


@pytest.mark.slow
@pytest.mark.parametrize("window", [6, 100])
def test_a_local_window_shorter_and_longer_than_the_text(tiny, window):
    batches = [ids_of(3, 24, seed=s) for s in range(2)]
    torch._dynamo.reset()
    options = {"policy": "keep=0", "calibrate": batches, "local_window": window, "compiler": "aot_eager"}
    fast = torch.compile(copy.deepcopy(tiny), backend="tcal", options=options | {"align": {"steps": 2, "batch": 2}})
    with torch.inference_mode():
        assert_close(fast(ids_of(2, 20)[:, :9].contiguous()), fast(ids_of(2, 20))[:, :9])
