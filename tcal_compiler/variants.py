"""Smaller variants of a run's ONNX student, each measured against the float32 one before it may stay."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .api import ASSETS, write_report
from .errors import ConfigError, ParityError, RunFolderError
from .passes.types import Check
from .progress import Parts, Progress
from .recorded import recorded_checks, teacher_info
from .runtime import data
from .runtime.manifest import hash_json
from .runtime.onnx_export import DATA_FILE, INT8_CACHES, LOWERINGS, MODEL_FILE, check_runtime
from .runtime.quantize import BLOCKS, MOST_KL, WEIGHT_TYPES, Divergence, WeightType, divergence, quantize
from .runtime.run_folder import RunFolder
from .runtime.session import OnnxSession
from .runtime.tokenizer import ByteTokenizer, TokenizerLike, read_tokenizer

TEXT = ASSETS / "text" / "heldout.txt"
CALIBRATION = ASSETS / "text" / "calibration.txt"  # what the scales of int8 caches are measured on
SEQUENCES, LENGTH = 8, 128
# Parts of a variant, with their shares of the time for SmolLM2-135M in int8
WEIGHTS, DIVERGENCE = "weights", "divergence from the float32 student"
VARIANT = {WEIGHTS: 1.0, DIVERGENCE: 2.5}


def model_file(dtype: str | None = None) -> Path:
    """Where a run folder keeps an ONNX student, the float32 one or a variant; relative to the run folder."""
    return Path("onnx" if dtype is None else f"onnx-{dtype}") / MODEL_FILE


def run_tokenizer(run: RunFolder) -> TokenizerLike:
    """The tokenizer that lies beside the ONNX student."""
    run.require("export")
    info = teacher_info(run)
    if info.tokenizer == "bytes":
        return ByteTokenizer()
    folder = (run.path / model_file()).parent
    return read_tokenizer(folder, eos_token_id=info.eos_token_id, bos_token_id=info.bos_token_id)


def profile_of(run: RunFolder) -> str:
    """The profile of a run folder's float32 ONNX student."""
    profile = run.record("export").evidence.get("profile")
    if not isinstance(profile, str) or profile not in LOWERINGS:
        raise RunFolderError(
            str(run.path), f"its export says profile {profile!r}, which is unknown", "tcal export again"
        )
    return profile


def require_profile(run: RunFolder, profile: str) -> None:
    """Raises RunFolderError when the ONNX student is of another profile."""
    if (held := profile_of(run)) != profile:
        hint = f"tcal export TEACHER -o {shlex.quote(str(run.path))} --profile {profile}"
        raise RunFolderError(str(run.path), f"its ONNX student is of profile {held}; this needs {profile}", hint)


def require_variant(run: RunFolder, dtype: str) -> None:
    """Raises ConfigError for an unknown dtype, and RunFolderError for a variant that is not there or was changed."""
    if dtype not in WEIGHT_TYPES:
        hint = f"{', '.join(WEIGHT_TYPES)}; the float32 student is the one without --dtype"
        raise ConfigError("--dtype", f"{dtype!r} is unknown", hint)
    stage, again = f"export-{dtype}", f"tcal export {shlex.quote(str(run.path))} --dtype {dtype}"
    if stage not in run.manifest.stages:
        held = ", ".join(["float32", *(d for d in WEIGHT_TYPES if f"export-{d}" in run.manifest.stages)])
        raise RunFolderError(str(run.path), f"holds no {dtype} student; it holds: {held}", again)
    if earlier := run.manifest.made_before(stage):
        raise RunFolderError(str(run.path), f"its {dtype} student is of before {earlier} was made anew", again)
    for name, problem in run.changed(stage).items():
        raise RunFolderError(str(run.path / name), problem, again)


def export_variant(
    path: str | Path,
    dtype: WeightType,
    *,
    max_kl: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Check:
    """Writes run/onnx-DTYPE, a student with smaller weights (WEIGHT_TYPES), and returns the check that guards it.

    int8 weights come in blocks of 128, or of 32 where only these keep the bound.

    max_kl: largest mean KL(float32 student || variant), in nats per token on the held-out text that ships; default
    MOST_KL[dtype]. force: keep a variant beyond the bound.

    Raises:
        ConfigError: an unknown dtype, or a bound that is no positive number.
        RunFolderError: no exported student, or one that was changed.
        ExportError: nothing that this type makes smaller, or an ONNX Runtime that is too old for it.
        ParityError: a variant beyond the bound, unless forced; the run folder stays as it was.
    """
    bound = _checked(dtype, max_kl)
    progress = progress or Progress(quiet=True)
    with RunFolder.open_existing(path, write=True) as run:
        run.require("export")
        require_profile(run, "ort")
        check_runtime("ort")
        settings = {"dtype": dtype, "max_kl": bound, "force": force}
        with run.stage(f"export-{dtype}", config=settings, inputs=_inputs(run)) as stage:
            if stage.done:
                return recorded_checks(run, f"export-{dtype}")[0]
            parts = Parts(progress, f"export of {dtype}", VARIANT)
            for block in BLOCKS if dtype in ("int8", "int8-caches") else BLOCKS[:1]:
                parts.begin(WEIGHTS)
                model = _written(run, stage.dir, dtype, block)
                parts.begin(DIVERGENCE)
                found = measure(run, model, parts.update)
                check = _guard(run, dtype, found, model, bound)
                if check.passed:
                    break
            if not check.passed and not force:
                what = f"KL to the float32 student is {check.measured:.3g} nats per token, allowed {bound:.3g}"
                raise ParityError(f"export --dtype {dtype}", what, "more bits, a larger --max-kl, or --force")
            stage.evidence = {"checks": [asdict(check)], **asdict(found), "forced": not check.passed}
        write_report(run, progress)
    return check


def _written(run: RunFolder, folder: Path, dtype: WeightType, block: int) -> Path:
    """The variant with all files of the float32 student but its weights; its model.onnx."""
    target, ids = (folder / model_file(dtype)).parent, None
    if dtype == "int8-caches":
        check_runtime("ort", INT8_CACHES)
        ids = _text_ids(run, CALIBRATION, OnnxSession(run.path / model_file()).context_length)
    model = quantize(run.path / model_file(), target, dtype, block=block, ids=ids)
    for file in sorted((run.path / model_file()).parent.iterdir()):
        if file.name not in (MODEL_FILE, DATA_FILE):
            shutil.copyfile(file, target / file.name)
    return model


def _inputs(run: RunFolder) -> dict[str, str]:
    return {"export": run.stage_hash("export"), "text": data.text_sha256(TEXT)}


def _checked(dtype: str, max_kl: float | None) -> float:
    if dtype not in WEIGHT_TYPES:
        raise ConfigError("--dtype", f"{dtype!r} is unknown", ", ".join(WEIGHT_TYPES))
    bound = MOST_KL[dtype] if max_kl is None else max_kl
    if not (math.isfinite(bound) and bound > 0):
        raise ConfigError("--max-kl", f"{bound} is no positive number", f"{MOST_KL[dtype]} for {dtype}")
    return bound


def measure(run: RunFolder, model: Path, progress: Callable[[int, int], None] | None = None) -> Divergence:
    """A variant against the run's float32 student, on the first sequences of the held-out text."""
    reference, other = OnnxSession(run.path / model_file()), OnnxSession(model)
    return divergence(reference, other, _text_ids(run, TEXT, reference.context_length), progress=progress)


def _text_ids(run: RunFolder, text: Path, context: int | None) -> NDArray[np.int64]:
    """The first sequences of a text that ships."""
    rows = data.text_rows(text, run_tokenizer(run), sequences=SEQUENCES, length=min(LENGTH, context or LENGTH))
    return np.asarray(rows.numpy())


def _guard(run: RunFolder, dtype: str, found: Divergence, model: Path, bound: float) -> Check:
    def size(folder: Path) -> int:
        return sum(f.stat().st_size for f in folder.iterdir() if f.name in (MODEL_FILE, DATA_FILE))

    before, after = size((run.path / model_file()).parent), size(model.parent)
    detail = (
        f"{found.tokens} tokens; perplexity {found.perplexity:.4g}, float32 {found.reference_perplexity:.4g}; "
        f"{after / 1e6:.1f} MB, float32 {before / 1e6:.1f} MB"
    )
    return Check(f"{dtype} student: KL to the float32 student, nats per token", found.kl, bound, detail)


def variant_checks(run: RunFolder) -> list[Check]:
    """Repeats the guard of every variant in a run folder; one that was forced keeps its own value as the bound."""
    checks = []
    for dtype in WEIGHT_TYPES:
        record = run.manifest.stages.get(f"export-{dtype}")
        if record is None:
            continue
        made, *_ = recorded_checks(run, f"export-{dtype}")
        model = run.path / model_file(dtype)
        bound = max(made.allowed, 1.01 * made.measured if record.evidence.get("forced") else 0.0)
        stale = float(record.inputs_hash != hash_json(_inputs(run)))
        checks.append(Check(f"{dtype} student: the float32 one was made anew since", stale, 0.0))
        checks.append(_guard(run, dtype, measure(run, model), model, bound))
    return checks
