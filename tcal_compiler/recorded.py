"""What a run's manifest records, read back: checked, because the file may come from anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .config import build_config
from .errors import RunFolderError
from .inputs import check_names
from .passes.types import Check, Plan, SiteScan
from .runtime.config import LocalWindow
from .runtime.manifest import MANIFEST_NAME, Manifest
from .runtime.run_files import read_manifest
from .runtime.run_folder import RunFolder
from .runtime.teacher import declared_sizes


class _Record(BaseModel):
    """A part of the manifest: only what is read of it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class TeacherInfo(_Record):
    """What plan recorded of the teacher."""

    tokenizer: str | None = None
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    context_length: int | None = None
    sizes: dict[str, int] | None = None


class _PlanEvidence(_Record):
    info: TeacherInfo
    tokenizer_dir: str | None = None


class _Calibrated(_Record):
    text: dict[str, str]
    hashes: dict[str, list[str]]


class _Calib(_Record):
    length: Annotated[int, Field(ge=2)]


class _Config(_Record):
    calib: _Calib


class _PlanRecord(_Record):
    keep: list[int]
    convert: list[int]
    policy: str
    local_window: LocalWindow = 0


class _SiteRecord(_Record):
    """A site's summary: what is more than its place is compared, not used."""

    model_config = ConfigDict(extra="allow")

    layer: int
    module: str


class _Sites(_Record):
    sites: list[_SiteRecord]


class _CheckRecord(_Record):
    name: str
    measured: float
    allowed: float
    detail: str = ""

    def check(self) -> Check:
        return Check(self.name, self.measured, self.allowed, self.detail)


class _Checks(_Record):
    checks: list[_CheckRecord] = []


DAMAGE = (ValidationError, KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError)


@contextmanager
def reading(run: Path) -> Iterator[None]:
    """The manifest is read inside the block: a record of another shape becomes a RunFolderError."""
    try:
        yield
    except DAMAGE as e:
        first = e.errors()[0] if isinstance(e, ValidationError) else None
        what = f"at {'.'.join(map(str, first['loc']))}: {first['msg']}" if first else f"{type(e).__name__}: {e}"
        raise RunFolderError(
            str(run / MANIFEST_NAME),
            f"the manifest is damaged: it records what this program does not write ({what})",
            "restore the file, or use another output folder",
        ) from e


def _read(run: RunFolder, kind: type[Any], value: Any) -> Any:
    with reading(run.path):
        return TypeAdapter(kind).validate_python(value)


def plan_of(run: RunFolder, scan: SiteScan) -> Plan:
    """The recorded plan. Raises RunFolderError when it is none for the sites of the scan."""
    run.record("plan")
    found = _read(run, _PlanRecord, run.manifest.plan)
    with reading(run.path):
        if sorted(found.keep + found.convert) != [s.index for s in scan.sites]:
            raise ValueError(f"layers {found.keep} and {found.convert} are not the teacher's sites, each once")
    return Plan(tuple(found.keep), tuple(found.convert), found.policy)


def local_window_of(run: RunFolder) -> int:
    """Tokens of the attention beside the states of converted sites; 0 without a plan."""
    found = _read(run, _PlanRecord, run.manifest.plan) if run.manifest.plan else None
    return found.local_window if found else 0


def recorded_sites(run: RunFolder) -> list[dict[str, Any]]:
    """The summaries of the teacher's sites, each with its layer and module."""
    return [s.model_dump() for s in _read(run, _Sites, run.record("plan").evidence).sites]


def settings_before(path: Path) -> tuple[dict[str, Any], str | None]:
    """Configuration and tokenizer that a run folder was made with, for what is not given again; empty without one.

    The policy is left out: the run's own plan.toml counts. Raises RunFolderError when the manifest is damaged.
    """
    check_names(None, out=path)
    if not os.path.lexists(path / MANIFEST_NAME):
        return {}, None
    manifest = read_manifest(path)
    settings = {**manifest.config, "policy": None}
    build_config(settings, str(path / MANIFEST_NAME))
    if "plan" not in manifest.stages:
        return settings, None
    with reading(path):
        plan = _PlanEvidence.model_validate(manifest.stages["plan"].evidence)
    return settings, "bytes" if plan.info.tokenizer == "bytes" else plan.tokenizer_dir


def calibrated_texts(run: RunFolder) -> tuple[dict[str, str], dict[str, list[str]]]:
    """sha256, and hashes of passages, of each text that was calibrated on, by name."""
    found = _read(run, _Calibrated, run.record("calibrate").evidence)
    return found.text, found.hashes


def calibration_length(run: RunFolder) -> int:
    """Tokens of a calibration sequence."""
    return _read(run, _Config, run.manifest.config).calib.length


def teacher_info(run: RunFolder) -> TeacherInfo:
    """The teacher's tokenizer kind, special tokens and context."""
    return _read(run, _PlanEvidence, run.record("plan").evidence).info


def training_checks(run: RunFolder) -> list[Check]:
    """What alignment and distillation checked."""
    parts = [_read(run, _Checks, run.record(stage).evidence).checks for stage in ("align", "distill")]
    return [c.check() for part in parts for c in part]


def recorded_checks(run: RunFolder, stage: str) -> list[Check]:
    """What a stage checked, at least one thing."""
    found = _read(run, _Checks, run.record(stage).evidence)
    with reading(run.path):
        if not found.checks:
            raise ValueError(f"stage {stage} checked nothing")
    return [c.check() for c in found.checks]


def check_sizes(path: Path, spec: str, hint: str) -> None:
    """Before a teacher is loaded: its configuration has the sizes that a run folder's teacher had.

    Of a form without configuration, and of a folder without a plan or of before sizes were recorded, nothing is known.

    Raises RunFolderError when it has others, TeacherError when it is damaged.
    """
    if not (path / MANIFEST_NAME).is_file():
        return
    manifest = read_manifest(path)
    if "plan" not in manifest.stages:
        return
    with reading(path):
        recorded = _PlanEvidence.model_validate(manifest.stages["plan"].evidence).info.sizes or {}
    found = declared_sizes(spec) if recorded else {}
    for name in sorted(recorded.keys() & found.keys()):
        if recorded[name] != found[name]:
            what = f"belongs to another teacher: {manifest.teacher.source} ({name} {recorded[name]}), "
            raise RunFolderError(str(path), f"{what}not {spec} ({name} {found[name]})", hint)


def recorded_teacher(path: Path, manifest: Manifest) -> str:
    """The source of a run folder's teacher. Raises RunFolderError for a function: running one has to be asked for."""
    source = manifest.teacher.source
    if source != "embedded" and not Path(source).is_absolute():
        what = f"its teacher is made by the function {source}, which would be run"
        raise RunFolderError(str(path), what, f"--teacher {source}, if it is yours")
    return source
