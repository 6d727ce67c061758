"""tcal inspect --memory and what it counts with: tensors without values against tensors with memory."""

from __future__ import annotations

import gc
import importlib
import json
import weakref
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from command_line import TINY, call, contents, done, refused
from pydantic import TypeAdapter
from support import allocated
from test_json import Bytes, Strict
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tcal_compiler import conversion
from tcal_compiler.api import convert
from tcal_compiler.config import Config
from tcal_compiler.kernels.gated_delta_rule import gated_delta_rule
from tcal_compiler.kernels.local_attention import local_attention
from tcal_compiler.runtime.allocations import without_values
from tcal_compiler.runtime.checkpoints import shell_of
from tcal_compiler.runtime.taps import SiteGroup
from tcal_compiler.runtime.teacher import shell_teacher
from tcal_compiler.stage_memory import HEADER, loading_bytes, memory_needs

ROOT = Path(__file__).parents[1]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50_000}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


class Need(Strict):
    stage: str
    peak_bytes: Bytes
    file_bytes: Bytes
    scratch_bytes: Bytes


class Needs(Strict):
    teacher: str
    parameters: int
    weight_bytes: Bytes
    value_bytes: Bytes
    policy: str
    converted: int
    kept: int
    processes: int
    stages: list[Need]


@pytest.fixture(scope="module")
def config_only(tmp_path_factory):
    """A folder of a model with config.json and no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("config")
    config = LlamaConfig(**SIZES, **LAYERS, tie_word_embeddings=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def _needs(*words) -> Needs:
    return TypeAdapter(Needs).validate_json(done("tcal", "inspect", *words, "--memory", "--json"))


SMALL = ("--calib-sequences", "8", "--calib-length", "32")


@pytest.mark.slow
def test_needs_of_a_configuration(config_only):
    before = contents(config_only)
    found = _needs(config_only, *SMALL, "--policy", "keep=0")
    per_layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64
    assert found.parameters == 2 * per_layer + 64 * 50_000 + 64
    assert 4 * found.parameters <= found.weight_bytes <= 4 * found.parameters + 4096  # buffers of rotary positions
    assert (found.converted, found.kept) == (1, 1)
    assert found.value_bytes == 1 * 2 * (8 + 8) * 32 * 64 * 4  # x and y of the text and of what is held out
    names = ["load", "capture", "calibrate", "align", "distill", "export", "generate"]
    assert [s.stage for s in found.stages] == names
    rows = {s.stage: s for s in found.stages}
    student = rows["align"].file_bytes
    assert found.weight_bytes < student < found.weight_bytes + 4 * 5 * 64 * 64
    assert rows["export"].file_bytes == 2 * student and rows["distill"].file_bytes == student
    # teacher, student, gradients, two moments and the best weights so far
    assert rows["distill"].peak_bytes - rows["load"].peak_bytes > 4.5 * student
    assert contents(config_only) == before


@pytest.mark.slow
def test_scores_of_sets_that_are_distilled_need_what_distillation_does(config_only, tmp_path):
    (tmp_path / "c.toml").write_text("[score]\ndistill_steps = 2\n[distill]\nbatch = 24\n")
    rows = {s.stage: s for s in _needs(config_only, *SMALL, "--policy", "kl:1", "--config", tmp_path / "c.toml").stages}
    assert rows["score"].peak_bytes > 0.98 * rows["distill"].peak_bytes > 1.2 * rows["align"].peak_bytes


@pytest.mark.slow
def test_a_process_with_a_part_of_the_weights_needs_less(tmp_path):
    """Until a checkpoint passes through the first one's memory. The weights lie in layers: where nearly all are a table
    that the head uses, which every step puts together for both models, parts save no memory."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 512}
    LlamaConfig(**sizes, **(LAYERS | {"num_hidden_layers": 4}), tie_word_embeddings=True).save_pretrained(tmp_path)
    peaks = []
    for more in ("steps = 2\nshard = true", "steps = 90\nshard = true", "steps = 2"):
        (tmp_path / "c.toml").write_text(f"[distill]\nbatch = 4\nchunk = 16\n{more}\n")
        found = _needs(tmp_path, *SMALL, "--processes", "2", "--config", tmp_path / "c.toml")
        assert found.processes == 2
        rows = {s.stage: s.peak_bytes for s in found.stages}
        peaks.append(rows["distill"] - rows["capture"])  # without what the process has beside
    assert peaks[0] + 15e6 < min(peaks[1:]), peaks


def test_a_distillation_that_cannot_be_shared_is_refused_before_anything_is_measured(config_only, tmp_path):
    (tmp_path / "c.toml").write_text("[distill]\nbatch = 4\nshard = true\n")
    for words, where, hint in (
        (("--memory", "--config", tmp_path / "c.toml"), "distill.shard", "--processes 2"),
        (("--memory", "--config", tmp_path / "c.toml", "--processes", "5"), "distill.batch", "fewer processes"),
        (("--processes", "2"), "inspect", "--memory"),
    ):
        refused(call("tcal", "inspect", config_only, *words), "ConfigError", where, hint)


@pytest.mark.slow
def test_more_text_needs_more(config_only):
    one, two = (_needs(config_only, "--calib-length", "32", "--calib-sequences", n).value_bytes for n in ("8", "24"))
    assert two == 2 * one


@pytest.mark.slow
def test_many_layers_are_read_off_a_line(config_only, tmp_path, monkeypatch):
    """Against a measurement of all of them."""
    from transformers import LlamaConfig

    from tcal_compiler import stage_memory
    from tcal_compiler.config import Config

    LlamaConfig(**SIZES, **(LAYERS | {"num_hidden_layers": 12})).save_pretrained(tmp_path)
    config = Config.model_validate({"calib": {"sequences": 8, "length": 32}, "policy": "uniform:3"})
    memory_needs(str(tmp_path), config=config)  # the process keeps what it loads
    found = memory_needs(str(tmp_path), config=config)
    monkeypatch.setattr(stage_memory, "LEAST_LAYERS", 12)
    exact = memory_needs(str(tmp_path), config=config)
    assert (found.parameters, found.value_bytes) == (exact.parameters, exact.value_bytes)
    assert (found.kept, found.converted) == (exact.kept, exact.converted) == (3, 9)
    for a, b in zip(found.stages, exact.stages, strict=True):
        assert (a.file_bytes, a.scratch_bytes) == (b.file_bytes, b.scratch_bytes)
        assert a.peak_bytes == pytest.approx(b.peak_bytes, rel=0.05)


def test_loading_takes_what_the_files_hold_beside_the_weights(config_only, tmp_path):
    shell, config = shell_teacher(str(config_only)), json.loads((config_only / "config.json").read_text())
    for dtype, factor in (("float32", 0), (None, 0), ("bfloat16", 1.5), ("float16", 1.5)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        assert loading_bytes(replace(shell, source=str(tmp_path)), 1000) == 1000 * factor
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(500))
    table, matrix = 4 * 64 * 50_000, 4 * 64 * 96
    for weights, most in ((table, 3 * table), (9 * table, 9 * table + 2 * matrix)):
        assert loading_bytes(replace(shell, source=str(file), kind="gguf"), weights) == HEADER * 50_000 + 500 + most


def test_what_has_no_configuration_is_refused(tmp_path):
    refused(call("tcal", "inspect", TINY, "--memory"), "TeacherError", "config.json")
    refused(call("tcal", "inspect", tmp_path, "--memory"), "TeacherError", "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    refused(call("tcal", "inspect", tmp_path, "--memory"), "TeacherError", "causal")
    refused(call("tcal", "inspect", TINY, "--calib-length", "32"), "ConfigError", "--memory")


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 1_000_000}, {"max_position_embeddings": -5}], ids=str)
def test_sizes_that_no_model_has_are_refused_before_one_is_built(tmp_path, sizes, monkeypatch):
    from transformers import AutoModelForCausalLM, LlamaConfig

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", None)
    LlamaConfig(**(SIZES | LAYERS | sizes)).save_pretrained(tmp_path)
    folder = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(folder | {"architectures": ["LlamaForCausalLM"]}))
    ((name, value),) = sizes.items()
    refused(call("tcal", "inspect", tmp_path, "--memory"), "TeacherError", f"{name} is {value}")
    refused(call("tcal", "inspect", tmp_path), "TeacherError", f"{name} is {value}")


def test_a_shell_takes_no_memory_for_its_weights(config_only):
    before = psutil.Process().memory_info().rss
    model = shell_of(config_only)
    assert sum(p.numel() for p in model.parameters()) * 4 > 12e6
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) < 1000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(b.is_meta for b in model.buffers())
    assert psutil.Process().memory_info().rss - before < 100e6


def _train(layer: nn.Linear, x: torch.Tensor) -> None:
    for _ in range(2):
        layer(layer(x).relu()).square().sum().backward()


def _rule(layer: nn.Linear, x: torch.Tensor) -> None:
    q = layer(x).view(4, 512, 8, 64)
    g, beta = q[..., 0].abs().neg(), q[..., 1].sigmoid()
    gated_delta_rule(q, q, q, g=g, beta=beta)[0].sum().backward()


def _rule_on_short_rows(layer: nn.Linear, x: torch.Tensor) -> None:
    """Many rows fit into what the rule handles at once."""
    q = layer(x).view(128, 64, 8, 16)
    g, beta = q[..., 0].abs().neg(), q[..., 1].sigmoid()
    gated_delta_rule(q, q, q, g=g, beta=beta)[0].sum().backward()


def _attend(layer: nn.Linear, x: torch.Tensor) -> None:
    q = layer(x).view(4, 512, 8, 64).transpose(1, 2)
    mask = torch.ones(512, 512, dtype=torch.bool).tril()
    scaled_dot_product_attention(q, q[:, :2], q[:, :2], attn_mask=mask, enable_gqa=True).sum().backward()


def _last_tokens(layer: nn.Linear, x: torch.Tensor) -> None:
    q = layer(x).view(4, 512, 8, 64).transpose(1, 2)
    local_attention(q, q[:, :2], q[:, :2], scale=0.1, window=48).sum().backward()


@pytest.mark.parametrize(
    "work, batch", [(_train, 16), (_rule, 4), (_rule_on_short_rows, 4), (_attend, 4), (_last_tokens, 4)]
)
def test_counted_bytes_are_those_that_are_taken(work, batch):
    def run() -> None:
        work(nn.Linear(512, 512), torch.zeros(batch, 512, 512))

    with without_values() as counted:
        run()
    assert counted.all.live == 0
    assert counted.all.peak == pytest.approx(allocated(run), rel=0.15)


def test_a_view_takes_nothing_and_what_is_freed_is_given_back():
    with without_values() as counted:
        a = torch.empty(1000)
        b = a.view(10, 100).t()
        assert (counted.all.live, counted.all.peak) == (4000, 4000)
        c = b + 1
        assert (counted.all.live, counted.all.peak) == (8000, 8000)
        del a, b
        assert (counted.all.live, counted.all.peak) == (4000, 8000)
        assert c[c > 0].shape == (1000,) and c.sum().item() > 0


def test_what_alignment_trained_on_is_gone_when_distillation_begins(tmp_path, monkeypatch):
    """Cycles hold it too."""
    collect, groups, alive = conversion.collect_taps, [], []

    def noted(*args: object, **options: object) -> list[SiteGroup]:
        found = collect(*args, **options)
        groups.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(conversion, "collect_taps", noted)
    monkeypatch.setattr(conversion, "distill_stage", lambda work: alive.extend(g() is not None for g in groups))
    config = {
        "local_window": 8,
        "calib": {"sequences": 4, "length": 24, "holdout": 2},
        "align": {"steps": 1, "batch": 2},
    }
    config = Config.model_validate(config | {"policy": "keep=0"})
    gc.disable()
    try:
        convert(str(TINY), out=tmp_path / "run", tokenizer="bytes", config=config, until="distill")
    finally:
        gc.enable()
    assert alive and not any(alive)


@pytest.mark.slow
def test_export_takes_what_is_said(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    words = ["embedded", "--policy", "uniform:25%", "--calib-sequences", "8", "--align-steps", "4"]
    stages = importlib.import_module("measure_dry_run").compared_memory(words, tmp_path)["stages"]
    said, seen = stages["export"]["peak_bytes"]
    assert seen <= said <= 1.6 * seen
