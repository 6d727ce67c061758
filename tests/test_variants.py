"""Smaller variants of a finished run: what they hold, what they cost, and the guard that refuses a bad one."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from command_line import TINY, call, contents, done, refused
from test_json import Checked

from tcal_compiler.errors import ExportError
from tcal_compiler.runtime import onnx_export
from tcal_compiler.runtime.quantize import WEIGHT_TYPES, divergence, quantize
from tcal_compiler.runtime.session import OnnxSession

TYPES = ("fp16", "int8", "int4")


def export(run: Path, dtype: str, *options: str) -> dict:
    words = ("tcal", "export", run, "--dtype", dtype, "--json", "--quiet", *options)
    return Checked.model_validate_json(done(*words)).model_dump()


def test_every_variant_is_smaller_near_and_runs(finished):
    whole = (finished / "onnx/model.onnx").stat().st_size
    sizes, kls = [], []
    for dtype in TYPES:
        check = export(finished, dtype)
        assert check["passed"] and 0 < check["measured"] <= check["allowed"] and "perplexity" in check["detail"]
        folder = finished / f"onnx-{dtype}"
        assert {f.name for f in folder.iterdir()} == {f.name for f in (finished / "onnx").iterdir()}
        sizes.append((folder / "model.onnx").stat().st_size / whole)
        kls.append(check["measured"])
        text = done("tcal", "generate", finished, "The old man", "--max-new-tokens", "8", "--dtype", dtype)
        assert text.startswith("The old man") and len(text) > len("The old man\n")
    assert sizes[0] < 0.75 and sizes[2] < sizes[1] < sizes[0] and kls[0] < kls[1] < kls[2]
    before = contents(finished)
    assert export(finished, "int8")["passed"] and contents(finished) == before  # done already
    assert export(finished, "int8-caches")["passed"]
    printed = done("tcal", "verify", finished, "--quiet")
    assert all(f"{d} student: KL to the float32 student" in printed for d in WEIGHT_TYPES)
    assert all(f"ok   {d} student: the float32 one" in printed for d in WEIGHT_TYPES)
    assert "int4 student: KL" in (finished / "report.md").read_text()


def test_int8_takes_small_blocks_where_large_ones_err_too_much(finished):
    large = export(finished, "int8")
    assert {b["block_size"] for b in operators(finished / "onnx-int8/model.onnx")[1]} == {128}
    small = export(finished, "int8", "--max-kl", str(0.99 * large["measured"]))
    assert small["passed"] and small["measured"] < large["measured"]
    assert {b["block_size"] for b in operators(finished / "onnx-int8/model.onnx")[1]} == {32}


@pytest.mark.slow
def test_the_guard_refuses_and_force_overrules(finished):
    before = contents(finished)
    command = ("tcal", "export", finished, "--dtype", "int4", "--max-kl", "1e-9", "--quiet")
    refused(call(*command), "ParityError", "KL to the float32 student is", "allowed 1e-09", "--force")
    assert contents(finished) == before
    assert not export(finished, "int4", "--max-kl", "1e-9", "--force")["passed"]
    record = json.loads((finished / "tcal.json").read_text())["stages"]["export-int4"]
    assert record["evidence"]["forced"] and (finished / "onnx-int4/model.onnx").is_file()
    assert "ok   int4 student: KL" in done("tcal", "verify", finished, "--quiet")  # to its own stated divergence


def test_options_that_do_not_go_together(finished, tmp_path):
    for words, kind, said in (
        (("--dtype", "int2"), "ConfigError", "'int2' is unknown"),
        (("--dtype", "int8", "--max-kl", "-1"), "ConfigError", "no positive number"),
        (("--dtype", "int8", "--seed", "3"), "ConfigError", "--seed change nothing"),
        (("--force",), "ConfigError", "--dtype"),
    ):
        refused(call("tcal", "export", finished, *words), kind, said)
    refused(call("tcal", "export", TINY, "--dtype", "int8"), "RunFolderError", "not a run folder")


@pytest.mark.parametrize("profile", [["ort"], "fast", None], ids=str)
def test_a_profile_that_the_manifest_cannot_have(finished, profile):
    manifest = json.loads((finished / "tcal.json").read_text())
    manifest["stages"]["export"]["evidence"]["profile"] = profile
    (finished / "tcal.json").write_text(json.dumps(manifest))
    before = contents(finished)
    refused(call("tcal", "export", finished, "--dtype", "int8"), "RunFolderError", f"profile {profile!r}")
    assert contents(finished) == before


def test_a_variant_that_is_not_there(finished):
    command = ("tcal", "generate", finished, "x", "--dtype")
    hint = f"tcal export {finished} --dtype int8"
    refused(call(*command, "int8"), "RunFolderError", "no int8 student; it holds: float32\n", hint)
    refused(call(*command, "fp32"), "ConfigError", "'fp32' is unknown", "int8-caches, int4", "without --dtype")
    assert export(finished, "fp16")["passed"]
    refused(call(*command, "int8"), "RunFolderError", "it holds: float32, fp16\n", hint)
    with (finished / "onnx-fp16/genai_config.json").open("a") as config:
        config.write(" ")
    refused(call(*command, "fp16"), "RunFolderError", "onnx-fp16/genai_config.json", "--dtype fp16")
    assert export(finished, "fp16")["passed"] and call(*command, "fp16", "--max-new-tokens", "2").code == 0


def operators(path: Path) -> tuple[Counter, list[dict]]:
    graph = onnx.load(path).graph
    blocks = [{a.name: a.i for a in n.attribute} for n in graph.node if n.op_type == "MatMulNBits"]
    return Counter(n.op_type for n in graph.node), blocks


@pytest.mark.parametrize("dtype, bits", [("int8", 8), ("int4", 4)])
def test_products_become_blocks_and_the_recurrence_stays(shared_run, tmp_path, dtype, bits):
    source = shared_run / "onnx/model.onnx"
    before, _ = operators(source)
    after, blocks = operators(quantize(source, tmp_path / "a", dtype))
    assert all(b["block_size"] == {8: 128, 4: 32}[b["bits"]] and b["accuracy_level"] == 4 for b in blocks)
    head = [b for b in blocks if b["N"] == 256]
    assert len(head) == 1 and head[0]["bits"] == 8
    assert {b["bits"] for b in blocks if b["N"] != 256} == {bits}
    for op in ("LinearAttention", "GroupQueryAttention"):
        assert after[op] == before[op] > 0
    assert after["MatMul"] + after["MatMulNBits"] == before["MatMul"] and after["MatMulNBits"] > after["MatMul"]
    again = quantize(source, tmp_path / "b", dtype)
    assert again.read_bytes() == (tmp_path / "a/model.onnx").read_bytes()


def test_divergence_is_torch_s(shared_run, tmp_path):
    first = OnnxSession(shared_run / "onnx", threads=1)
    second = OnnxSession(quantize(shared_run / "onnx/model.onnx", tmp_path, "int4"), threads=1)
    ids = np.random.default_rng(0).integers(0, 256, (2, 40))
    found = divergence(first, second, ids)
    tables = []
    for session in (first, second):
        session.reset(batch=2)
        tables.append(F.log_softmax(torch.from_numpy(session.forward(ids)[:, :-1]).double(), -1))
    expected = F.kl_div(tables[1], tables[0], log_target=True, reduction="none").sum(-1).mean().item()
    assert found.kl == pytest.approx(expected, rel=1e-3) and found.tokens == 78
    target = torch.from_numpy(ids[:, 1:])
    for value, table in zip((found.reference_perplexity, found.perplexity), tables, strict=True):
        assert value == pytest.approx(F.nll_loss(table.flatten(0, 1), target.flatten()).exp().item(), rel=1e-4)
    assert divergence(first, first, ids).kl == 0


def test_models_that_cannot_be_made_smaller(shared_run, tmp_path):
    with pytest.raises(ExportError, match="cannot be read"):
        quantize(tmp_path / "missing.onnx", tmp_path, "int8")
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (float[n, 1, 5] y) { y = Neg(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "small.onnx")
    with pytest.raises(ExportError, match="no matrix"):
        quantize(tmp_path / "small.onnx", tmp_path / "out", "int8")
    model = onnx.load(shared_run / "onnx/model.onnx")
    for t in model.graph.initializer:
        if list(t.dims) and len(t.dims) == 2 and min(t.dims) >= 64:
            t.CopyFrom(onnx.numpy_helper.from_array(1e6 * np.ones(t.dims, np.float32), t.name))
    onnx.save(model, tmp_path / "large.onnx")
    with pytest.raises(ExportError, match="more than float16 can"):
        quantize(tmp_path / "large.onnx", tmp_path / "out", "fp16")


def test_int8_caches_give_what_float32_ones_give(shared_run, tmp_path, monkeypatch):
    """Fed whole, in chunks, alone and in a padded batch; an older runtime is refused."""
    source = shared_run / "onnx/model.onnx"
    model = quantize(source, tmp_path / "a", "int8-caches")
    assert quantize(source, tmp_path / "b", "int8-caches").read_bytes() == model.read_bytes()
    shutil.copyfile(source.with_name("genai_config.json"), model.with_name("genai_config.json"))
    session, float32 = OnnxSession(model, threads=1), OnnxSession(source, threads=1)
    ids = np.random.default_rng(0).integers(0, 256, (2, 40))
    assert divergence(float32, session, ids).kl < 1e-2
    caches = {n: v.dtype for n, v in zip(session.state_names, session.snapshot().values, strict=True)}
    assert {n.rpartition(".")[2]: d for n, d in caches.items()}["key"] == np.int8
    session.reset()
    whole = session.forward(ids[:1])
    session.reset()
    parts = [session.forward(ids[:1, a:b]) for a, b in ((0, 7), (7, 8), (8, 40))]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=0.2)
    prompts = [list(ids[0, :9]), list(ids[1, :4])]
    alone = []
    for prompt in prompts:
        session.reset()
        alone.append(list(session.generate(prompt, 12)))
    assert session.generate_batch(prompts, 12) == alone
    snapshot = session.snapshot()
    with pytest.raises(ExportError, match="of another model"):
        float32.restore(snapshot)
    monkeypatch.setattr(onnx_export, "runtime_version", lambda: (1, 27))
    with pytest.raises(ExportError, match=r"int8 caches(.|\n)*onnxruntime 1\.28"):
        OnnxSession(model)
    assert OnnxSession(source).length == 0
