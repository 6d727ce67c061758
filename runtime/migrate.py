"""Manifests of earlier schema versions, brought to the present version whenever one is read.

| version | shape |
|---|---|
| 1 | records of stages hold no made_from, or, from later programs of this version, one |
| 2 | made_from of every record says which stages it was made from; a stage made from none has an empty one |

A folder is only written in the present version, by the first command that writes into it; older programs then refuse
it. What a version 1 folder does not say is told from its times: a stage was made from an earlier one as it is now when
that one was complete before it ended, because one writer at a time makes a stage after what it reads. Where times say
that it was not, or cannot be trusted, the stage counts as made before: the same tcal-compile command then compares
hashes of what it is made from, and either keeps it with what it was made from, or makes it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .manifest import Manifest, StageRecord

UNKNOWN = "0" * 64  # the hash of no stage
_READ = {"calibrate": ("plan",), "align": ("calibrate",), "distill": ("align",), "eval": ("export",)}


def _read_in_1(name: str, stages: dict[str, StageRecord]) -> tuple[str, ...]:
    """Stages that a stage of a version 1 folder read."""
    if name == "report":
        return tuple(n for n in stages if n != name)
    if name.startswith("export-"):
        return ("export",)
    if name == "export":  # before there was a stage distill
        return ("distill",) if "distill" in stages else ("align",)
    return _READ.get(name, ())


def _from_1(manifest: Manifest) -> Manifest:
    stages = {}
    for name, record in manifest.stages.items():
        read = {n: manifest.stages.get(n) for n in _read_in_1(name, manifest.stages)}
        then = {
            n: manifest.stage_hash(n) if r is not None and r.finished_at <= record.finished_at else UNKNOWN
            for n, r in read.items()
        }
        stages[name] = record.model_copy(update={"made_from": record.made_from or then})
    return manifest.model_copy(update={"schema_version": 2, "stages": stages})


def _with_local_window(manifest: Manifest) -> Manifest:
    """A configuration that does not say it, as those of before there was local_window, says what the plan does: none
    where that does not say it either, which is no longer the default."""
    if not manifest.config or "local_window" in manifest.config:
        return manifest
    return manifest.model_copy(
        update={"config": {**manifest.config, "local_window": manifest.plan.get("local_window", 0)}}
    )


def _with_near_error(manifest: Manifest) -> Manifest:
    """A configuration of before there was align.near_error says that every site took all of each step."""
    given = manifest.config.get("align")
    if not isinstance(given, dict) or "near_error" in given:
        return manifest
    return manifest.model_copy(update={"config": {**manifest.config, "align": {**given, "near_error": 0.0}}})


def migrate(manifest: Manifest) -> Manifest:
    """The manifest in the present schema version; the same object when it is of that already and says everything."""
    manifest = _from_1(manifest) if manifest.schema_version == 1 else manifest
    return _with_near_error(_with_local_window(manifest))
