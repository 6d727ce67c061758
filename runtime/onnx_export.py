"""A stateful graph becomes model.onnx with genai_config.json and the tokenizer's files beside it.

File layout and names are those that onnxruntime-genai reads; our own session.py reads the same ones. The bytes depend
on the student and the versions of torch and onnx only: paths and stack traces of the exporting machine are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tcal_compiler.errors import ExportError
from tcal_compiler.kernels.cached_attention import onnx_rule as attention_rule
from tcal_compiler.kernels.gated_delta_rule.onnx_rule import LOWERINGS, NEWER, translation_table
from tcal_compiler.kernels.gates import onnx_rule as gates_rule
from tcal_compiler.kernels.local_attention import onnx_rule as local_rule
from tcal_compiler.passes.graph import aten, iter_targets, placeholders, taint, value
from tcal_compiler.passes.lower_complex import without_complex
from tcal_compiler.passes.make_stateful import export_stateful, runs_behind
from tcal_compiler.passes.stateful_graph import LayerState, StatefulGraph
from tcal_compiler.passes.types import Check

from . import onnx_experts
from .config import ExportConfig
from .onnx_half import halve
from .onnx_layout import merge_layouts
from .onnx_norms import fuse_norms
from .onnx_rotary import fuse_rotary
from .tokenizer import TokenizerLike

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
CONFIG_FILE = "genai_config.json"
FINGERPRINT = "tcal_weights"  # key of the model's metadata: sha256 of the student's weights
SINGLE_FILE_LIMIT = 1_800_000_000  # bytes of weights; a protobuf file must stay below 2 GiB
_NEWEST_TORCH_OPSET = 24  # torch.onnx writes broken files for 26 to 28
_IR_VERSIONS = {27: 13}  # of ONNX files, by opset, where torch.onnx does not write the opset itself
INT8_CACHES = (1, 28)  # the oldest ONNX Runtime that was seen to run attention on int8 caches
_LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class OnnxArtifact:
    """folder holds model.onnx, genai_config.json and the tokenizer's files; path is model.onnx itself."""

    path: Path
    profile: str
    opset: int
    layers: tuple[LayerState, ...]
    context_length: int
    checks: tuple[Check, ...] = ()

    @property
    def folder(self) -> Path:
        return self.path.parent


def check_supported(config: ExportConfig) -> None:
    """Raises ExportError when the profile, the opset or what is installed here cannot make and check the model."""
    import onnx

    low, high = LOWERINGS[config.profile].opsets
    if not low <= config.opset <= high:
        what = f"profile {config.profile} goes with opsets {low} to {high}, not {config.opset}"
        raise ExportError("ONNX export", what, f"--opset {low}")
    if config.opset > (newest := onnx.defs.onnx_opset_version()):
        what = f"onnx {onnx.__version__} knows opsets up to {newest}, not {config.opset}"
        raise ExportError("ONNX export", what, f"--opset {low}, or a newer onnx")
    check_runtime(config.profile)


def check_runtime(profile: str, least: tuple[int, int] | None = None) -> None:
    """Raises ExportError when the ONNX Runtime here is too old for a model of this profile.

    least: what the model needs beyond its profile, for int8 caches.
    """
    import onnxruntime as ort

    least = max(LOWERINGS[profile].runtime, least or (0, 0))
    if runtime_version() < least:
        kind = f"profile {profile}" if least == LOWERINGS[profile].runtime else "int8 caches"
        what = f"onnxruntime {ort.__version__} cannot run a student of {kind}"
        raise ExportError("ONNX export", what, f"onnxruntime {'.'.join(map(str, least))} or newer")


def version_of(text: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(p) for p in text.split(".")[:2])


def runtime_version() -> tuple[int, ...]:
    """Of the ONNX Runtime here."""
    import onnxruntime as ort

    return version_of(ort.__version__)


def export_onnx(
    stateful: StatefulGraph,
    folder: Path,
    *,
    config: ExportConfig,
    info: dict[str, Any] | None = None,
    tokenizer: TokenizerLike | None = None,
) -> OnnxArtifact:
    """Writes the deployable folder.

    Args:
        info: bos_token_id, eos_token_id and context_length where known. The context is at most config.max_length, and
            at most the teacher's unless every layer is converted and positions have no table.
        tokenizer: its files are written beside the model.

    Raises:
        ExportError: what `check_supported` refuses (before any file is touched), a graph that torch.onnx cannot
            express, or a folder that cannot be written.
        UnsupportedModelError: complex numbers outside a rotary embedding, before any file is touched.
    """
    info = info or {}
    check_supported(config)
    model = build_model(stateful, config)
    context = context_length(config, info)
    if context < config.max_length and not any(layer.kind == "softmax" for layer in stateful.layers):
        context = config.max_length if runs_behind(stateful, config.max_length - 1) else context
    path = folder / MODEL_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _save(model, path, stateful)
        shared = shares_buffers(stateful.layers, config.profile)
        text = json.dumps(genai_config(stateful, info=info, context_length=context, shares_buffers=shared), indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)
    except OSError as e:
        raise ExportError(str(folder), f"cannot be written: {e.strerror or e}", "free space, or another folder") from e
    return OnnxArtifact(path, config.profile, config.opset, stateful.layers, context, check_model(path, config.profile))


def context_length(config: ExportConfig, info: dict[str, Any]) -> int:
    """The longest sequence of a student with kept layers: max_length, or the teacher's own context where that is
    shorter."""
    return min(config.max_length, info.get("context_length") or config.max_length)


def build_model(stateful: StatefulGraph, config: ExportConfig) -> Any:
    """The stateful graph as an onnx_ir.Model, with the fallback function of the profile."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    profile, opset = config.profile, config.opset
    lowering = LOWERINGS[profile]
    program = export_stateful(replace(stateful, gm=without_complex(stateful.gm)))
    if not (lowering.fused and all(_is_fused(layer) for layer in stateful.layers if layer.kind == "softmax")):
        program = attention_rule.decompose_plain(program, fused=lowering.fused)
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                (),
                None,
                dynamo=True,
                opset_version=min(opset, _NEWEST_TORCH_OPSET),
                custom_translation_table=_translation_table(profile) | onnx_experts.translation_table(program),
                input_names=list(stateful.input_names),
                output_names=list(stateful.output_names),
                dynamic_shapes=_axis_names(stateful),
                optimize=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as e:
        reason = " ".join(str(e.__cause__ or e).split())[:400]
        raise ExportError("ONNX export", f"torch.onnx cannot express this student: {reason}") from e
    assert exported is not None
    model = exported.model
    fuse_norms(model)
    if lowering.fused:
        fuse_rotary(model)
    merge_layouts(model)
    if lowering.half:
        halve(model, float32_layers=config.float32_layers or 0)
    RemoveUnusedNodesPass()(model)  # ONNX Runtime warns of constants that fused parts left behind
    _strip(model)
    _name_cache_axes(model, stateful)
    model.metadata_props[FINGERPRINT] = _weights_sha256(stateful)
    _add_conv_passthrough(model, stateful)
    if opset > _NEWEST_TORCH_OPSET:
        _raise_opset(model, opset)
    make_function = lowering.function
    if make_function is not None and any(layer.kind == "gdn" for layer in stateful.layers):
        function = ir.serde.deserialize_function(make_function(opset))
        model.functions[function.identifier()] = function
    return model


def _raise_opset(model: Any, opset: int) -> None:
    """Names a newer opset; no operator that torch.onnx writes means anything else in it (see _NEWEST_TORCH_OPSET)."""
    for node in model.graph.all_nodes():
        if node.domain == NEWER:
            node.domain = ""
    model.opset_imports.pop(NEWER, None)
    model.opset_imports[""], model.ir_version = opset, _IR_VERSIONS[opset]


def _translation_table(profile: str) -> dict[Any, Any]:
    others = (rule.translation_table() for rule in (attention_rule, gates_rule, local_rule))
    return translation_table(profile) | {op: rule for table in others for op, rule in table.items()}


def _is_fused(layer: LayerState) -> bool:
    return attention_rule.is_fused(layer.key_dim, layer.value_dim)


def shares_buffers(layers: tuple[LayerState, ...], profile: str) -> bool:
    """Whether past and present caches may be one buffer of the longest context, written in place."""
    caches = [layer for layer in layers if layer.grows]
    return LOWERINGS[profile].fused and bool(caches) and all(map(_is_fused, caches))


def _weights_sha256(stateful: StatefulGraph) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(stateful.gm.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(
            tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data if tensor.numel() else b""
        )
    return digest.hexdigest()


def _name_cache_axes(model: Any, stateful: StatefulGraph) -> None:
    """Caches come out with as many slots as they went in with, or with one for each token fed, if that is more."""
    import onnx_ir as ir

    caches = {f"present.{layer.index}.{part}" for layer in stateful.layers if layer.grows for part in layer.parts}
    for v in model.graph.outputs:
        if v.name in caches:
            v.shape = ir.Shape((*v.shape[:2], "present_sequence", v.shape[3]))


def _add_conv_passthrough(model: Any, stateful: StatefulGraph) -> None:
    """A conv_state that goes in and out unused where a recurrent_state has none beside it: onnxruntime-genai wants one
    beside each, all of one shape and type; [B, 1, 1] where there is no window."""
    import onnx_ir as ir

    local = {layer.index for layer in stateful.layers if layer.kind == "local"}
    windows = [v for v in model.graph.inputs if v.name.endswith(".conv_state")]
    shape, kind = ir.Shape(("batch", 1, 1)), ir.TensorType(ir.DataType.FLOAT)
    if windows:
        shape, kind = windows[0].shape, windows[0].type
    for layer in stateful.layers:
        if layer.kind != "gdn" or layer.index in local:
            continue
        past = ir.Value(name=f"past_key_values.{layer.index}.conv_state", shape=shape, type=kind)
        node = ir.node("Identity", [past], name=f"conv_state_{layer.index}")
        present = node.outputs[0]
        present.name, present.shape, present.type = f"present.{layer.index}.conv_state", shape, kind
        model.graph.inputs.append(past)
        model.graph.append(node)
        model.graph.outputs.append(present)


def _axis_names(stateful: StatefulGraph) -> tuple[dict[int, str], ...]:
    axes = [{0: "batch", 1: "sequence"}, {0: "batch", 1: "total_sequence"}]
    for layer in stateful.layers:
        axes += [{0: "batch"} | ({2: "past_sequence"} if layer.grows else {}) for _ in layer.parts]
    return tuple(axes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns about packages and axis names that do not matter here."""
    loggers = [logging.getLogger(n) for n in _LOGGERS]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _strip(model: Any) -> None:
    """Removes what depends on the exporting machine: stack traces with paths, notes of the exporter, symbol names."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None
    border = {id(v) for v in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for v in node.outputs:
            v.metadata_props.clear()
            if id(v) not in border:
                v.shape = None
                v.type = None
    for v in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        v.metadata_props.clear()
        v.doc_string = None


def _save(model: Any, path: Path, stateful: StatefulGraph) -> None:
    import onnx_ir as ir

    size = sum(p.numel() * p.element_size() for p in stateful.gm.parameters())
    path.with_name(DATA_FILE).unlink(missing_ok=True)
    ir.save(model, path, external_data=DATA_FILE if size > SINGLE_FILE_LIMIT else None)


def check_model(path: Path, profile: str) -> tuple[Check, ...]:
    """onnx.checker on a model file, and for the profile standard the operators outside of its domain.

    Raises ExportError when the file is no valid ONNX model.
    """
    import onnx

    standard = LOWERINGS[profile].domain == ""
    try:
        onnx.checker.check_model(str(path), full_check=standard)  # shapes of other domains cannot be inferred
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        what = f"is no valid ONNX model: {' '.join(str(e).split())[:400]}"
        raise ExportError(str(path), what, "export again; tcal doctor checks this machine") from e
    checks = [Check("onnx.checker finds errors", 0.0, 0.0, f"onnx {onnx.__version__}")]
    if standard:
        model = onnx.load(str(path), load_external_data=False)
        others = [n.op_type for n in model.graph.node if n.domain] + [f.name for f in model.functions]
        checks.append(Check("operators outside the standard domain", float(len(others)), 0.0, " ".join(others)))
    return tuple(checks)


def genai_config(
    stateful: StatefulGraph, *, info: dict[str, Any], context_length: int, shares_buffers: bool
) -> dict[str, Any]:
    """The configuration that onnxruntime-genai reads; sizes are the graph's own."""
    first = min(stateful.layers, key=lambda layer: layer.kind != "softmax")
    eos = info.get("eos_token_id")
    tokens = taint(stateful.gm.graph.nodes, placeholders(stateful.gm)[:1])
    widths = [value(n).shape[-1] for n in iter_targets(stateful.gm, aten.embedding.default) if n.args[1] in tokens]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": first.key_dim,
        "hidden_size": int(widths[0]) if widths else first.num_heads * first.key_dim,
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "num_hidden_layers": stateful.depth,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "decoder",
        "bos_token_id": info.get("bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": eos,
        "vocab_size": stateful.vocab_size,
        "context_length": context_length,
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": context_length, "num_beams": 1}
    search["past_present_share_buffer"] = shares_buffers
    known = {k: v for k, v in model.items() if v is not None}
    return {"model": known, "search": search}
