"""The whole configuration of a conversion: one strict model, from options and a TOML file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator

from .errors import ConfigError
from .passes.files import read_toml
from .runtime.config import (
    LOCAL_WINDOW,
    AlignConfig,
    CalibConfig,
    DistillConfig,
    ExportConfig,
    InitName,
    InitPart,
    LocalWindow,
    ScoreConfig,
    StrictModel,
    check_parts,
)


class Config(StrictModel):
    """What to do with a teacher; every field can stand in a TOML file under the same name."""

    policy: str | None = Field(
        None, description="which sites stay softmax; default: the run's plan.toml, else uniform:25%"
    )
    init: InitName = Field("closed-form", description="initial values of the mixers")
    init_without: list[InitPart] = Field(
        [],
        description="parts of closed-form or taylor that stay as naive has them, of decay, write-gate, value-scale, "
        "output-gate and, of closed-form alone, local-window, whose scale is then 0, and ridge: the output projection "
        "is then the teacher's",
    )
    local_window: LocalWindow = Field(
        LOCAL_WINDOW,
        description="tokens that softmax attention beside the state of each converted site sees, 0 for none, no more "
        "than the site's own window, and the first token besides, where the teacher sees it; what it remembers has a "
        "fixed size all the same. Sites with soft caps, alibi or sinks have none",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of the order of sequences and of random inits")
    calib: CalibConfig = CalibConfig()
    score: ScoreConfig = ScoreConfig()
    align: AlignConfig = AlignConfig()
    distill: DistillConfig = DistillConfig()
    export: ExportConfig = ExportConfig()

    @field_validator("init_without")
    @classmethod
    def _has_these_parts(cls, parts: list[InitPart], info: ValidationInfo) -> list[InitPart]:
        if "init" in info.data:  # else it was refused
            check_parts(info.data["init"], parts)
        return parts

    def initial_values(self) -> dict[str, object]:
        """What a run folder compares of them; what is newer only where it is set, so that older folders stay valid."""
        values: dict[str, object] = {"init": self.init, "seed": self.seed}
        values |= {"init_without": sorted(self.init_without)} if self.init_without else {}
        return values | ({"local_window": self.local_window} if self.local_window else {})


DEFAULT_POLICY = "uniform:25%"


def _known_keys() -> list[str]:
    keys = []
    for name, info in Config.model_fields.items():
        keys.append(name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, StrictModel):
            keys += [f"{name}.{k}" for k in info.annotation.model_fields]
    return keys


def _meaning(key: str) -> str:
    """What may stand under a key."""
    model: type[BaseModel] = Config
    name, _, rest = key.partition(".")
    section = Config.model_fields[name].annotation
    if isinstance(section, type) and issubclass(section, StrictModel):
        if not rest:
            return f"a table [{name}] with keys {', '.join(section.model_fields)}"
        model, name = section, rest.partition(".")[0]
    return f"{key}: {model.model_fields[name].description}"


def _place(data: Any, location: tuple[int | str, ...]) -> str:
    """The dotted key of an error: pydantic's location also names the type that was tried, where there is a choice."""
    found: list[str] = []
    for part in location:
        if not (part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)):
            break
        found.append(str(part))
        data = data[part]
    return ".".join(found)


def build_config(data: dict[str, Any], where: str) -> Config:
    """A checked configuration. Raises ConfigError that names the key, the value seen and the nearest known key."""
    try:
        return Config.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        key = _place(data, first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, _known_keys(), 1)
            hint = f"did you mean {near[0]}?" if near else f"keys are {', '.join(_known_keys())}"
            raise ConfigError(where, f"unknown key {key}", hint) from None
        if first["type"] == "value_error":  # of keys that do not go together
            what = f"{key}: {first['ctx']['error']}".removeprefix(": ")
            raise ConfigError(
                where, what, _meaning(key) if key else "docs/reference.md says what every key is"
            ) from None
        raise ConfigError(where, f"{key} = {first.get('input')!r}: {first['msg']}", _meaning(key)) from None


def _gives_length(data: dict[str, Any], overrides: dict[str, Any]) -> bool:
    """Whether the length of the distillation is said anew."""
    table = data.get("distill")
    given = [table.get(k) if isinstance(table, dict) else None for k in ("steps", "tokens")]
    return any(v is not None for v in [*given, overrides.get("distill.steps"), overrides.get("distill.tokens")])


def _gives_profile(data: dict[str, Any], overrides: dict[str, Any]) -> bool:
    """Whether the profile of the export is said anew."""
    table = data.get("export")
    return overrides.get("export.profile") is not None or (isinstance(table, dict) and "profile" in table)


def load_config(path: Path | None, overrides: dict[str, Any], base: dict[str, Any] | None = None) -> Config:
    """Configuration from a TOML file (optional) with overrides such as {"align.steps": 100} on top.

    base: values of another run, under the file's; tables are merged key by key.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = read_toml(path)
        except FileNotFoundError:
            hint = "a file whose keys docs/reference.md lists; none is needed"
            raise ConfigError(str(path), "no such file", hint) from None
        except (OSError, ValueError) as e:
            raise ConfigError(str(path), f"cannot be read as TOML: {e}", "a file with lines such as seed = 1") from None
    for key, value in (base or {}).items():
        if key == "distill" and isinstance(value, dict) and _gives_length(data, overrides):
            value = value | {"steps": 0, "tokens": None}  # steps and tokens are two ways to say one thing
        if key == "export" and isinstance(value, dict) and _gives_profile(data, overrides):
            value = {k: v for k, v in value.items() if k != "opset"}  # another profile may need another one
        if isinstance(value, dict) and isinstance(data.get(key, {}), dict):
            data[key] = value | data.get(key, {})
        else:
            data.setdefault(key, value)
    for key, value in overrides.items():
        if value is None:
            continue
        node, *rest = key.split(".")
        if rest:
            section = data.setdefault(node, {})
            if not isinstance(section, dict):
                raise ConfigError(str(path), f"{node} is no table", f"[{node}]")
            section[rest[0]] = value
        else:
            data[node] = value
    return build_config(data, str(path) if path else "options")
