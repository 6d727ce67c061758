"""tcal.json, the manifest of a run folder: strict models, and the hashes that they hold."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from tcal_compiler.errors import RunFolderError
from tcal_compiler.passes.json_text import read_json

from .migrate import migrate

MANIFEST_NAME = "tcal.json"
SCHEMA_VERSION = 2  # what each version holds: migrate.py
STAGE_NAME = r"^[a-z][a-z0-9_-]*$"
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime")
_COPIES = 2  # of its JSON: while it is checked, as the checker's own objects and as Python's
_MOST_ENTRIES = 5000  # a run of fifteen stages has some hundreds
_DEPTH, _ANY_JSON = 3, {(0, "config"), (0, "plan"), (2, "evidence")}  # by depth


def check_relative(name: str) -> str:
    """name, when it is a plain relative POSIX path below a run folder that is not one of the folder's own files.

    Raises:
        ValueError: absolute, with "..", with a backslash, hidden at the top, or the manifest itself.
    """
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or "\\" in name or "\0" in name or ".." in parts or parts[0][0] == ".":
        raise ValueError(f"{name!r} is not a plain relative file name")
    if parts[0] == MANIFEST_NAME:
        raise ValueError(f"{MANIFEST_NAME} is the manifest itself")
    return name


RelativeName = Annotated[str, AfterValidator(check_relative)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
StageName = Annotated[str, Field(pattern=STAGE_NAME)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, ser_json_inf_nan="strings")


class TeacherRecord(_Strict):
    source: str
    kind: str = ""
    fingerprint: str
    vocab_size: int | None = None


class StageRecord(_Strict):
    """A complete stage.

    files: sha256 by name relative to the run folder. made_from: stages that it read, with Manifest.stage_hash as it was
    then. seconds: wall time.
    """

    config_hash: Sha256
    inputs_hash: Sha256
    files: dict[RelativeName, Sha256]
    made_from: dict[StageName, Sha256] = {}
    evidence: dict[str, JsonValue]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    finished_at: str


class Pending(_Strict):
    """Files of a committed stage that may still lie in `folder`, and old files that it no longer has."""

    stage: StageName
    folder: Annotated[str, Field(pattern=r"^\.tmp-[a-z][a-z0-9_-]*-[0-9]+$")]
    remove: list[RelativeName]


class Manifest(_Strict):
    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    tcal_version: str
    versions: dict[str, str]
    teacher: TeacherRecord
    config: dict[str, JsonValue] = {}
    plan: dict[str, JsonValue] = {}
    stages: dict[StageName, StageRecord] = {}
    pending: Pending | None = None

    def stage_hash(self, name: str) -> str:
        """sha256 (hex) of what a complete stage was made from and made."""
        record = self.stages[name]
        return hash_json([record.config_hash, record.inputs_hash, record.files])

    def stages_in(self, inputs: JsonValue, *, but: str) -> dict[str, str]:
        """What a stage's inputs say of complete stages other than itself."""
        found = inputs if isinstance(inputs, dict) else {}
        return {n: str(h) for n, h in found.items() if n in self.stages and n != but}

    def made_before(self, name: str) -> str:
        """The earlier stage that was made anew after a complete stage, or after one that it read; "" when none was."""
        todo, seen = [name], set[str]()
        while todo:
            stage = todo.pop()
            seen.add(stage)
            for earlier, then in self.stages[stage].made_from.items():
                if earlier not in self.stages or self.stage_hash(earlier) != then:
                    return earlier
                todo += {earlier} - seen
        return ""


def package_version() -> str:
    """Version of this package, or 0+unknown when it runs from a checkout that is not installed."""
    try:
        return importlib.metadata.version("tcal-compile")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def tool_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def as_json(value: Any) -> Any:
    """value as plain JSON data: pydantic models dumped, tuples as lists, keys as strings, NaN and infinities as text.

    Raises:
        TypeError: something that JSON cannot hold.
    """
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    constants = {"NaN": "NaN", "Infinity": "Infinity", "-Infinity": "-Infinity"}
    return json.loads(json.dumps(value), parse_constant=constants.__getitem__)


def hash_json(value: Any) -> str:
    """sha256 (hex) of a value's canonical JSON: equal for equal values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(as_json(value), sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes, streamed."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _typed_entries(value: Any, depth: int = 0) -> int:
    """Of which each could be an error of its own, some kilobytes: all but what may be any JSON."""
    if depth > _DEPTH or not isinstance(value, dict | list):
        return 0
    items = value.items() if isinstance(value, dict) else enumerate(value)
    below = (_typed_entries(v, depth + 1) for key, v in items if (depth, key) not in _ANY_JSON)
    return len(value) + sum(below)


def parse_manifest(text: bytes, where: str) -> Manifest:
    """The manifest in text, in the present schema version whatever earlier one it was written in.

    Raises:
        RunFolderError: not JSON, of a newer schema, or not as the schema says.
    """
    hint = "restore the file, or use another output folder"
    try:
        data = read_json(text, copies=_COPIES)
    except (ValueError, RecursionError) as e:
        raise RunFolderError(where, f"the manifest is damaged: cannot be read as JSON ({e})", hint) from e
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        what = f"schema version {version} is newer than {SCHEMA_VERSION}, the newest that this program reads"
        raise RunFolderError(where, what, "a newer tcal-compile")
    if (entries := _typed_entries(data)) > _MOST_ENTRIES:
        raise RunFolderError(where, f"the manifest is damaged: its stages have {entries} entries", hint)
    del data
    try:
        return migrate(Manifest.model_validate_json(text))
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(p) for p in first["loc"])
        what = f"the manifest is damaged: {e.error_count()} errors; at {place or 'top'}: {first['msg']}"
        raise RunFolderError(where, what, hint) from e
