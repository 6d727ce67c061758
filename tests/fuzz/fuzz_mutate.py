"""Seeded mutators: bytes, JSON, and containers whose lengths and checksums are made right again."""

from __future__ import annotations

import copy
import io
import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import PurePosixPath
from random import Random
from typing import Any

TOKENS = [b"\0" * 8, b"\xff" * 8, b"../../outside", b"/outside", b"[[", b"]]", b"{", b'"', b"'''", b"\n", b"=", b"nan"]
TOKENS += [b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80", b"\xc3\x28", b"9" * 40, b"-1", b"1e999", b"[site]", b"\r"]
OBJECT = pickle.dumps(PurePosixPath("x"))  # unpickling it is seen
DEEP = "@deep@"
VALUES: list[Any] = [None, True, False, -1, 0, 1, 2**31, 2**63, -(2**70), 1.5, 1e308, float("nan"), float("inf")]
VALUES += ["", "../../outside", "/outside", "a" * 5000, "\0", "\ud800", "NaN", "0", [], {}, [[]], {"": None}, [1, "2"]]
VALUES += ["tcal.json", ".lock", "x/../../y", "C:\\x", "~", "__import__('os')", "torch.ops.aten.add.Tensor"]


def mutate_bytes(rng: Random, data: bytes, *, head: int | None = None) -> bytes:
    """One to four edits, all of them in the first `head` bytes where that is given."""
    for _ in range(rng.randint(1, 4)):
        end = max(1, min(len(data), head or len(data)))
        at, size = rng.randrange(end), rng.choice([1, 2, 4, 8, 64, 1024])
        kind = rng.randrange(8)
        if kind == 0 and data:
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif kind == 2:
            token = rng.choice(TOKENS)
            data = data[:at] + token + data[at + len(token) :]
        elif kind == 3:
            data = data[:at] + data[at + size :]
        elif kind == 4:
            data = data[:at] + data[at : at + size] * rng.choice([2, 3, 50]) + data[at + size :]
        elif kind == 5:
            data = data[:at] + rng.randbytes(size) + data[at + size :]
        elif kind == 6:
            data = (
                data[:at]
                + rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1]).to_bytes(8, "little")
                + data[at + 8 :]
            )
        elif rng.random() < 0.3:
            data = data[:at]
    return data


def _places(value: Any, found: list[tuple[Any, Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found.append((value, key))
        _places(child, found)


def mutate_json(rng: Random, value: Any) -> Any:
    """A copy with one to three nodes replaced, removed, renamed, swapped, doubled or nested deeply."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        _places(value, places)
        if not places:
            return rng.choice(VALUES)
        owner, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind <= 3:
            owner[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 4:
            del owner[key]
        elif kind == 5 and isinstance(owner, dict):
            name = rng.choice([v for v in VALUES if isinstance(v, str)])
            owner[name] = owner.pop(key)
        elif kind == 6:
            other, other_key = rng.choice(places)
            owner[key] = copy.deepcopy(other[other_key]) if other_key in other or isinstance(other, list) else None
        else:
            owner[key] = DEEP
    return value


def dump_json(value: Any) -> bytes:
    """Text of value; half surrogates stay escapes, and DEEP becomes brackets deeper than any stack."""
    return json.dumps(value).encode().replace(f'"{DEEP}"'.encode(), b"[" * 20_000 + b"]" * 20_000)


def mutate_json_text(rng: Random, text: bytes) -> bytes:
    if rng.random() < 0.25:
        return mutate_bytes(rng, text)
    return dump_json(mutate_json(rng, json.loads(text)))


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """The header as JSON with its length made right, or any bytes."""
    size = int.from_bytes(data[:8], "little")
    kind = rng.random()
    if kind < 0.3:
        return mutate_bytes(rng, data)
    if kind < 0.5:
        return mutate_bytes(rng, data, head=8 + size)
    header = dump_json(mutate_json(rng, json.loads(data[8 : 8 + size])))
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def other_names(name: str) -> list[str]:
    """Names that a reader may take for an entry's own, or for one of another kind."""
    folder, _, last = name.rpartition("/")
    alike = [name + "x", name[:-1] + "x", name.upper(), f"{folder}/{last.upper()}"]
    return ["../../outside", "/outside", "x", *alike, *(f"{folder}/{kind}_obj_0" for kind in ("opaque", "custom"))]


def mutate_zip(rng: Random, data: bytes) -> bytes:
    """An archive with one entry edited, renamed, dropped or doubled and right checksums, or any bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        likely = [n for n in names if n.endswith(".json")] or names
        chosen = rng.choice(likely if rng.random() < 0.8 else names)
        kind = rng.random()
        for name in names:
            content = old.read(name)
            if name != chosen:
                new.writestr(name, content)
            elif kind < 0.8:
                is_json = name.endswith(".json")
                new.writestr(name, mutate_json_text(rng, content) if is_json else mutate_bytes(rng, content))
            elif kind < 0.9:
                new.writestr(rng.choice(other_names(name)), rng.choice([content, OBJECT]))
            elif kind < 0.95:
                new.writestr(name, content + content)
    return out.getvalue()


def mutate_one(rng: Random, files: dict[str, bytes], chosen: Sequence[str]) -> dict[str, bytes]:
    """A folder's files with one of the chosen ones mutated by its kind."""
    name = rng.choice(list(chosen))
    mutate = {"safetensors": mutate_safetensors, "json": mutate_json_text}.get(name.rpartition(".")[2], mutate_bytes)
    return files | {name: mutate(rng, files[name])}
