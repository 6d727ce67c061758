"""The student of a run folder on a module in memory: the newest one, and a manifest that is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.tiny_torch_teacher import factory
from tcal_compiler.errors import RunFolderError
from tcal_compiler.passes.rewrite_gdn import MIXERS
from tcal_compiler.run_models import student_of_run
from tcal_compiler.runtime.run_folder import RunFolder


def stage_again(run: Path, name: str, before: str, files: dict[str, dict[str, torch.Tensor]]) -> None:
    """As if a later command had made the stage, with these weights."""
    with RunFolder.open_existing(run, write=True) as folder:
        inputs = {before: folder.stage_hash(before)} if before else {}
        plan = folder.manifest.plan
        with folder.stage(name, config=plan if name == "plan" else "another", inputs=inputs or {"a": 1}) as stage:
            stage.plan = plan
            for file, weights in files.items():
                save_file(weights, stage.dir / file)


def _set(at: str, value: Any) -> Any:
    """An edit of a manifest: what stands behind the dotted path becomes the value."""
    *path, last = at.split(".")

    def edit(manifest: Any) -> None:
        for key in path:
            manifest = manifest[int(key) if key.isdigit() else key]
        manifest[last] = value

    return edit


SITES = "stages.plan.evidence.sites"
DAMAGE = {
    "a window that is text": _set("plan.local_window", "8"),
    "below nothing": _set("plan.local_window", -1),
    "a truth value": _set("plan.local_window", True),
    "half a token": _set("plan.local_window", 1.5),
    "no value": _set("plan.local_window", None),
    "huge": _set("plan.local_window", 10**12),
    "no such layer": _set("plan.keep", [9]),
    "a layer below nothing": _set("plan.keep", [-4]),
    "a layer that is text": _set("plan.keep", ["0"]),
    "a layer that is a truth value": _set("plan.keep", [False]),
    "a layer twice": _set("plan.keep", [0, 1]),
    "layers that are none": _set("plan.convert", None),
    "no policy": _set("plan.policy", 3),
    "no plan": lambda manifest: manifest.update(plan={}),
    "sites that are text": _set(SITES, "abc"),
    "no sites": lambda manifest: manifest["stages"]["plan"]["evidence"].pop("sites"),
    "a site that is a list": _set(SITES, [[0]]),
    "a site of layer text": _set(f"{SITES}.0.layer", "0"),
    "a site of layer list": _set(f"{SITES}.0.layer", []),
    "a site without a name": lambda manifest: manifest["stages"]["plan"]["evidence"]["sites"][0].pop("module"),
}


@pytest.mark.parametrize("edit", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_manifest(finished, edit):
    manifest = json.loads((finished / "tcal.json").read_text())
    edit(manifest)
    (finished / "tcal.json").write_text(json.dumps(manifest))
    with pytest.raises(RunFolderError, match=r"tcal\.json: the manifest is damaged.*\n  Try: "):
        student_of_run(factory(), finished)


def test_distilled_weights_where_there_are_some(finished):
    module, file = factory(), finished / "distilled.safetensors"
    aligned = student_of_run(module, finished)
    name, _ = next((n, p) for n, p in aligned.gm.named_parameters() if n.startswith(f"{MIXERS}."))
    weights = load_file(finished / "weights.safetensors")
    stage_again(finished, "distill", "align", {file.name: weights | {name: weights[name] + 1}})
    distilled = student_of_run(module, finished)
    assert torch.equal(distilled.gm.get_parameter(name), aligned.gm.get_parameter(name) + 1)


def test_weights_of_before_the_plan_was_made_anew(finished):
    stage_again(finished, "plan", "", {})
    with pytest.raises(RunFolderError, match="stage calibrate is of before plan was made anew"):
        student_of_run(factory(), finished)
