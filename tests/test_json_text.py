"""What JSON and TOML take in memory, against the bounds that are told before they are parsed."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Callable, Iterable

import pytest
from fuzz_watch import Memory

from tcal_compiler.errors import RunFolderError
from tcal_compiler.passes.files import read_toml
from tcal_compiler.passes.json_text import FLOOR, TABLES, TEXTS, parsed_bytes, read_json, too_much
from tcal_compiler.runtime.manifest import parse_manifest

SIZE = 2_000_000  # characters
PROCESS = 2 << 20  # bytes that a forked test process touches by itself; up to 1.4 MB were seen


def array(item: str) -> str:
    return "[" + (item + ",") * (SIZE // (len(item) + 1)) + "0]"


def table(items: Iterable[str], open_close: str = "{}") -> str:
    return open_close[0] + ",".join(items) + open_close[1]


WORST = {
    "empty lists": array("[]"),
    "lists in lists": array("[" * 200 + "]" * 200),
    "lists of one": array("[0]"),
    "empty objects": array("{}"),
    "objects in objects": array('{"":' * 200 + "0" + "}" * 200),
    "objects of one key": array('{"":0}'),
    "objects of keys of their own": table((f'{{"{i:x}":0}}' for i in range(SIZE // 11)), "[]"),
    "a table that just grew": table(f'"{i:x}":0' for i in range(87_384)),
    "keys of wide characters": table(f'"{i:x}\u4e2d":0' for i in range(43_692)),
    "floats": array("1e5"),
    "integers": array("999"),
    "long integers": array("1" * 4000),
    "short texts": array('"ab"'),
    "short wide texts": array('"\u4e2da"'),
    "one wide character in a text": '["' + "a" * SIZE + '\U0001f600"]',
    "one that is escaped": '["' + "a" * SIZE + '\\ud83d\\ude00"]',
    "escaped wide texts": array('"aaaaaaaaaaaaaaaaaaaaaaaaaa\\ud83d\\ude00"'),
}


def added(call: Callable[[], object]) -> int:
    """Bytes of memory that a call adds to a new process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        gc.disable()
        memory = Memory()
        try:
            kept = call()  # in memory while it is read
            os.write(write, str(memory.added()).encode())
            del kept
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as f:
        return int(f.read())


@pytest.mark.parametrize("kind", WORST)
def test_what_json_takes_is_bounded_before(kind):
    text = WORST[kind].encode()
    took = added(lambda: json.loads(text))
    assert SIZE // 2 < took <= parsed_bytes(text) + PROCESS
    assert added(lambda: parsed_bytes(text)) <= len(text) + PROCESS


def test_text_that_takes_more_is_refused_and_none_else():
    honest = {
        f"model.layers.{i // 800}.mlp.experts.{i % 800}.down_proj.weight": "model-00001.safetensors"
        for i in range(100_000)
    }
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": honest}, indent=2).encode()
    assert (
        not too_much(index, times=TABLES) and read_json(b"\xef\xbb\xbf" + index, times=TABLES)["weight_map"] == honest
    )
    curve = [{"step": i, "loss": 1.2345678 / (i + 1), "seconds": 0.1234} for i in range(20_000)]
    assert read_json(json.dumps({"curve": curve}))["curve"] == curve
    row = {"text": 'a "b", \u2019{[c]}, ' * 500_000}
    assert read_json(json.dumps(row), times=TEXTS) == row
    for kind in ("lists in lists", "empty objects", "a table that just grew"):
        with pytest.raises(ValueError, match="would take up to"):
            read_json("[" + WORST[kind] + "," + WORST[kind] + "]")
    with pytest.raises(ValueError, match=r"codec can't decode|Expecting"):
        read_json(json.dumps([1]).encode("utf-16"))


@pytest.mark.parametrize("kind", ["names", "texts", "lists"])
def test_a_manifest_that_is_wrong_in_many_places(kind):
    """Each place is an error of its own to the checker of types."""
    many = {f"{i:x}": i for i in range(60_000)}
    value = {"names": many, "texts": {"versions": many}, "lists": {"pending": {"remove": [1] * 300_000}}}[kind]

    def read() -> None:
        with pytest.raises(RunFolderError, match=r"have \d+ entries|would take"):
            parse_manifest(json.dumps(value).encode(), "here")

    assert added(read) < FLOOR


TOML = {
    "tables": lambda i: f"[{i:x}]\n",
    "keys of four parts": lambda i: f"{i:x}.a.a.a=1\n",
    "headers of many parts": lambda i: f"[{i:x}" + ".a" * 60 + "]\n",
    "tables in a line": lambda i: f"t{i:x}=[{'{a.a.a=1},' * 200}]\n",
    "lists": lambda i: f"t{i:x}=[{'[],' * 2000}]\n",
    "lists in lists": lambda i: f"t{i:x}={'[' * 60}{']' * 60}\n",
    "short keys": lambda i: f"{i:x}=1\n",
    "arrays of tables": lambda i: "[[a]]\n",
    "empty tables": lambda i: f"t{i:x}=[{'{},' * 2000}]\n",
}


@pytest.mark.parametrize("kind", TOML)
def test_what_toml_takes_is_bounded(kind, tmp_path):
    """The longest text of a kind that is read, and a longer one, which is not."""
    file, count = tmp_path / "plan.toml", 1

    def read() -> object:
        with contextlib.suppress(ValueError):
            return read_toml(file)

    while True:
        file.write_text("".join(map(TOML[kind], range(count))))
        assert added(read) < FLOOR
        count *= 2
        if file.stat().st_size > SIZE:
            break
    with pytest.raises(ValueError, match="could take"):
        read_toml(file)
