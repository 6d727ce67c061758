"""Whether a manifest's plan is the one that stage plan made, and says what the rest of the manifest says."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tcal_compiler.errors import RunFolderError

from .manifest import Manifest, hash_json

_SHOWN = 300  # characters of a plan


class _Site(BaseModel):
    """What stage plan recorded of an attention core; records of before there were windows or score kinds lack some."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    layer: int
    window: int | None = None
    scores: str = "plain"
    local_window: int = 0


def check_plan(manifest: Manifest, where: str) -> None:
    """The plan was the configuration of stage plan, whose hash its record has. The attention beside the state of a site
    has min(local_window, the site's own window) tokens where scores are plain, else none.

    Raises:
        RunFolderError: another plan than the one that was made, or one whose local_window is not that of the sites.
    """
    if "plan" not in manifest.stages:
        return
    record, window = manifest.stages["plan"], manifest.plan.get("local_window", 0)
    found = ""
    if record.config_hash != hash_json(manifest.plan):
        plan = json.dumps(manifest.plan)
        found = f"its plan is not the one that stage plan made: {plan[:_SHOWN]}{'...' * (len(plan) > _SHOWN)}"
    elif isinstance(window, int):
        found = _other_window(record.evidence.get("sites"), window)
    if found:
        hint = "restore the file, or use another output folder"
        raise RunFolderError(where, f"the manifest is damaged: {found}", hint)


def _other_window(sites: object, window: int) -> str:
    """The first site that has another window than the plan's; "" where none has, or sites are not what they should be,
    which is found when they are used."""
    try:
        read = TypeAdapter(list[_Site]).validate_python(sites)
    except ValidationError:
        return ""
    for s in read:
        allowed = min(window, s.window or window) if s.scores == "plain" else 0
        if s.local_window != allowed:
            return f"its plan has local_window {window}, attention {s.layer} {s.local_window} and not {allowed}"
    return ""
