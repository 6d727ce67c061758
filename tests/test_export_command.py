"""What an export depends on: the student alone decides its bytes; what cannot be made is refused before it is begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
from command_line import SMALL, TINY, call, contents, done, refused

from tcal_compiler import api, conversion
from tcal_compiler.config import Config, load_config
from tcal_compiler.errors import ConfigError
from tcal_compiler.passes.types import Check
from tcal_compiler.runtime.config import ExportConfig

AGAIN = """
import sys
from pathlib import Path
from tcal_compiler.passes.capture import capture_program
from tcal_compiler.passes.make_stateful import make_stateful
from tcal_compiler.runtime.config import ExportConfig
from tcal_compiler.runtime.onnx_export import context_length, export_onnx
from tcal_compiler.runtime.program_file import load_program
from tcal_compiler.runtime.run_folder import RunFolder
from tcal_compiler.variants import run_tokenizer
source, target = map(Path, sys.argv[1:])
with RunFolder.open_existing(source) as run:
    info, tokenizer = run.manifest.stages["plan"].evidence["info"], run_tokenizer(run)
program, _ = load_program(source / "student.pt2", allow_pickle=False)
flat = capture_program(program, teacher=program.module(), implementation="student", shapes=((1, 8),))
stateful = make_stateful(flat, verify=False, max_length=context_length(ExportConfig(), info))
export_onnx(stateful, target / "onnx", config=ExportConfig(), info=info, tokenizer=tokenizer)
"""
OPTIONS = ("--tokenizer", "bytes", "--policy", "keep=0", "--align-steps", "6", *SMALL)


@pytest.mark.slow
def test_another_process_makes_the_same_bytes(shared_run, tmp_path):
    subprocess.run(
        [sys.executable, "-c", AGAIN, str(shared_run), str(tmp_path / "again")],
        check=True,
        timeout=300,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[1],
    )
    assert contents(tmp_path / "again/onnx") == contents(shared_run / "onnx")


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--opset", "24"), ("ort", 24)),
        (("--profile", "cuda"), ("cuda", 21)),
        (("--profile", "standard"), ("standard", 27)),
    ],
)
def test_profile_and_opset_reach_the_export(shared_run, tmp_path, monkeypatch, options, expected):
    seen = []
    monkeypatch.setattr(api, "convert", lambda *_, config, **__: seen.append(config.export) or shared_run)
    done("tcal", "export", TINY, "-o", tmp_path, *options)
    assert [(e.profile, e.opset) for e in seen] == [expected]


def test_another_profile_has_its_own_opset_and_not_the_earlier_one():
    earlier = Config().model_dump(mode="json")
    config = load_config(None, {"export.profile": "standard"}, earlier)
    assert (config.export.opset, load_config(None, {}, earlier).export.opset) == (27, 21)


def old_runtime(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(onnxruntime, "__version__", "1.24.4")


def runtime_before_opset_27(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(onnxruntime, "__version__", "1.31.1")


def old_onnx(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(onnx.defs, "onnx_opset_version", lambda: 23)


@pytest.mark.parametrize(
    "change, options, kind, said",
    [
        (None, ("--opset", "27"), "ExportError", "profile ort goes with opsets 21 to 24, not 27"),
        (None, ("--opset", "28"), "ConfigError", "export.opset = 28"),
        (None, ("--profile", "standard", "--opset", "24"), "ExportError", "opsets 27 to 27, not 24"),
        (runtime_before_opset_27, ("--profile", "standard"), "ExportError", "onnxruntime 1.31.1"),
        (None, ("--config", "profile.toml"), "ConfigError", "export.profile = 'vendor'"),
        (old_runtime, (), "ExportError", "onnxruntime 1.24.4"),
        (old_onnx, ("--opset", "24"), "ExportError", "knows opsets up to 23, not 24"),
    ],
)
def test_what_cannot_be_exported_is_told_first(finished, tmp_path, monkeypatch, change, options, kind, said):
    """Before the teacher is loaded, and with the files of an earlier export left alone."""
    monkeypatch.chdir(tmp_path)
    Path("profile.toml").write_text('[export]\nprofile = "vendor"\n')
    before = contents(finished)
    if change:
        change(monkeypatch)
    refused(call("tcal-compile", TINY, "-o", "new", *OPTIONS, *options), kind, said)
    refused(call("tcal", "export", TINY, "-o", finished, *OPTIONS, *options), kind, said)
    assert not Path("new").exists() and contents(finished) == before


def test_layers_stay_float32_where_the_bound_needs_it(finished, monkeypatch):
    """Caches stay float16, for CUDA's operator; what was chosen is in the manifest."""
    tried = []

    def parity(artifact, *_, **__):
        model = onnx.load(artifact.path)
        types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
        assert types["past_key_values.0.key"] == types["present.0.key"] == onnx.TensorProto.FLOAT16
        halves = sum(i.data_type == onnx.TensorProto.FLOAT16 for i in model.graph.initializer)
        tried.append(halves)
        return (Check("KL", float(len(tried) == 1), 0.5),)

    monkeypatch.setattr(conversion, "check_parity", parity)
    done("tcal", "export", TINY, "-o", finished, *OPTIONS, "--profile", "cuda")
    assert tried[0] > tried[1] > 0
    assert json.loads((finished / "tcal.json").read_text())["stages"]["export"]["evidence"]["float32_layers"] == 1


def test_how_many_layers_stay_float32():
    assert ExportConfig(profile="cuda").float32_layer_counts(30) == (0, 3, 6, 12)
    assert ExportConfig(profile="cuda").float32_layer_counts(2) == (0, 1)
    assert ExportConfig(profile="cuda", float32_layers=5).float32_layer_counts(30) == (5,)
    assert ExportConfig().float32_layer_counts(30) == (0,)
    with pytest.raises(ConfigError, match="float32 throughout"):
        load_config(None, {"export.float32_layers": 1})


def test_a_variant_is_made_of_profile_ort_alone(finished):
    manifest = finished / "tcal.json"
    text = manifest.read_text()
    assert text.count('"profile": "ort"') == 2  # in the configuration, and in what the export made
    manifest.write_text(text.replace('"profile": "ort"', '"profile": "cuda"'))
    before = contents(finished)
    refused(call("tcal", "export", finished, "--dtype", "int8", "--quiet"), "RunFolderError", "profile cuda")
    assert contents(finished) == before


def test_a_variant_needs_the_runtime_too(finished, monkeypatch):
    before = contents(finished)
    old_runtime(monkeypatch)
    refused(call("tcal", "export", finished, "--dtype", "int8", "--quiet"), "ExportError", "onnxruntime 1.24.4")
    assert contents(finished) == before
