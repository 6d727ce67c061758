"""Exported programs whose text or entries would run as code: refused, and nothing runs."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyModel, program_of
from torch.export import pt2_archive

from tcal_compiler.errors import TeacherError, UnsupportedModelError
from tcal_compiler.runtime.capture_teacher import capture_teacher
from tcal_compiler.runtime.program_file import load_program, save_program
from tcal_compiler.runtime.program_strings import is_plain_expression, is_plain_guard, unsafe_text
from tcal_compiler.runtime.teacher import load_teacher

EDIT = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("program") / "tiny.pt2"
    save_program(program_of(TinyModel(layers=1)), path)
    return path


def edited(program: Path, out: Path, edit: EDIT) -> Path:
    """The program with its model's JSON changed and right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if "/models/" in info.filename:
                body = json.loads(content)
                edit(body)
                content = json.dumps(body).encode()
            new.writestr(info.filename, content)
    out.write_bytes(buffer.getvalue())
    return out


def first_expression(body: dict[str, Any], text: str) -> None:
    values = body["graph_module"]["graph"]["tensor_values"]
    sizes = next(v["sizes"] for v in values.values() if any("as_expr" in s for s in v["sizes"]))
    next(s for s in sizes if "as_expr" in s)["as_expr"]["expr_str"] = text


def argument_name(body: dict[str, Any], text: str) -> None:
    next(e for e in body["graph_module"]["module_call_graph"] if e["signature"])["signature"]["forward_arg_names"] = [
        text
    ]


def target(body: dict[str, Any], text: str) -> None:
    body["graph_module"]["graph"]["nodes"][0]["target"] = text


def operator(body: dict[str, Any], text: str) -> None:
    body["graph_module"]["graph"]["nodes"][0]["inputs"].append({"name": "", "arg": {"as_operator": text}, "kind": 1})


def keyword(body: dict[str, Any], text: str) -> None:
    """The only input, as a keyword of any text: JSON inside a string inside a string, its letters escaped."""
    key = "".join(f"\\\\u{ord(c):04x}" for c in text)
    leaf = '{"type": null, "context": null, "children_spec": []}'
    args, named = (
        f'{{"type": "builtins.{kind}", "context": "{context}", "children_spec": [{inner}]}}'
        for kind, context, inner in (("tuple", "null", ""), ("dict", f'[\\"{key}\\"]', leaf))
    )
    signature = next(e for e in body["graph_module"]["module_call_graph"] if e["signature"])["signature"]
    spec = f'[1, {{"type": "builtins.tuple", "context": "null", "children_spec": [{args}, {named}]}}]'
    signature |= {"in_spec": spec, "forward_arg_names": []}


def guard(body: dict[str, Any], text: str) -> None:
    body["guards_code"] = [text]


def parameter(body: dict[str, Any], text: str) -> None:
    next(s for s in body["graph_module"]["signature"]["input_specs"] if "parameter" in s)["parameter"][
        "parameter_name"
    ] = text


def test_text_that_torch_runs_is_refused(program, tmp_path):
    proof = tmp_path / "ran"
    text = f"__import__('pathlib').Path({str(proof)!r}).touch()"
    bad = edited(program, tmp_path / "bad.pt2", lambda body: first_expression(body, text))
    with pytest.raises(TeacherError, match="could run as code"):
        load_program(bad, allow_pickle=False)
    assert not proof.exists()
    with contextlib.suppress(Exception):  # what it makes of the result does not matter
        torch.export.load(bad)
    assert proof.exists(), "torch itself no longer runs this text: the check may go"


def test_a_keyword_that_torch_runs_is_refused(program, tmp_path):
    """It stands three times in the text that torch makes: as a parameter, in quotes, and as a value."""
    proof = tmp_path / "ran"
    code = f"x=__import__('pathlib').Path({str(proof)!r}).touch()):\n    0\n"
    text = f"{code}    \"\"\"\n    0\n    '''#"
    bad = edited(program, tmp_path / "bad.pt2", lambda body: keyword(body, text))
    with pytest.raises(TeacherError, match="could run as code"):
        load_program(bad, allow_pickle=False)
    assert not proof.exists()
    with contextlib.suppress(Exception):
        torch.export.load(bad).module()
    assert proof.exists(), "torch itself no longer runs this text: the check may go"


@pytest.mark.parametrize(
    "place, text",
    [
        (argument_name, "input_ids=print(1)"),
        (target, "torch.hub.os.system"),
        (target, "torch.ops.aten.from_file.default"),
        (target, "torch.ops.aten.save"),
        (target, "torch.ops.load_library.__call__"),
        (target, "torch.ops.aten.add"),
        (target, "_operator.call"),
        (operator, "torch.hub.os.system"),
        (parameter, 'x"),print("'),
        (first_expression, "Symbol('s0).__class__')"),
        (first_expression, "(" * 500),
        (first_expression, "Pow(Integer(10), Integer(10000000000))"),
        (guard, "min('a' * 10000000000, 'b') == 'a'"),
    ],
)
def test_other_text_that_torch_never_writes(program, tmp_path, place, text):
    with pytest.raises(TeacherError, match="could run as code"):
        load_program(edited(program, tmp_path / "bad.pt2", lambda body: place(body, text)), allow_pickle=False)


@pytest.mark.parametrize("rename", [str, str.upper], ids=["same", "case"])
@pytest.mark.parametrize("first", [True, False])
def test_two_entries_of_one_name(program, tmp_path, rename, first):
    """torch might read the one that was not checked."""
    with zipfile.ZipFile(program) as old:
        name = next(n for n in old.namelist() if "/models/" in n)
        contents = [(n, old.read(n)) for n in old.namelist()]
    doubled = (rename(name), b"{}")
    with zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n, content in [doubled, *contents] if first else [*contents, doubled]:
            new.writestr(n, content)
    with pytest.raises(TeacherError, match="entries of the same name"):
        load_program(tmp_path / "bad.pt2", allow_pickle=False)


class Touch:
    """Pickled, this makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def touching(entries: dict[str, bytes], proof: Path) -> bytes:
    body = json.loads(entries["archive/models/model.json"])
    first_expression(body, f"__import__('pathlib').Path({str(proof)!r}).touch()")
    return json.dumps(body).encode()


def second_model(entries: dict[str, bytes], proof: Path, name: str) -> None:
    """Beside the first one, with all that belongs to it."""
    for entry, content in list(entries.items()):
        if entry.rpartition("/")[2].startswith("model"):
            entries[entry.replace("/model.", "/other.").replace("/model_", "/other_")] = content
    del entries["archive/models/other.json"]
    entries[f"archive/models/{name}"] = touching(entries, proof)


def sample_inputs(entries: dict[str, bytes], proof: Path, name: str) -> None:
    buffer = io.BytesIO()
    torch.save(Touch(proof), buffer)
    del entries["archive/data/sample_inputs/model.pt"]
    entries[f"archive/data/sample_inputs/{name}"] = buffer.getvalue()


def constant(entries: dict[str, bytes], proof: Path, name: str) -> None:
    """An object that its table does not call pickled."""
    weights = json.loads(entries["archive/data/weights/model_weights_config.json"])["config"]
    meta = next(w["tensor_meta"] for w in weights.values())
    row = {"path_name": name, "is_param": False, "use_pickle": False, "tensor_meta": meta}
    entries["archive/data/constants/model_constants_config.json"] = json.dumps({"config": {"x": row}}).encode()
    entries[f"archive/data/constants/{name}"] = pickle.dumps(Touch(proof)).ljust(1 << 20, b"\0")


def compiled(entries: dict[str, bytes], proof: Path, name: str) -> None:
    entries[f"archive/data/aotinductor/model/{name}"] = b"\x7fELF"


@pytest.mark.parametrize(
    "edit, name",
    [
        (second_model, "other.JSON"),
        (second_model, "other.evil"),
        (sample_inputs, "model.PT"),
        (constant, "opaque_obj_0"),
        (compiled, "model.so"),
    ],
)
def test_entries_that_torch_runs_are_refused(program, tmp_path, edit, name):
    proof, bad = tmp_path / "ran", tmp_path / "bad.pt2"
    with zipfile.ZipFile(program) as old:
        entries = {n: old.read(n) for n in old.namelist()}
    edit(entries, proof, name)
    with zipfile.ZipFile(bad, "w") as new:
        for n, content in entries.items():
            new.writestr(n, content)
    with pytest.raises(TeacherError, match=r"does not write|pickled objects"):
        load_program(bad, allow_pickle=False)
    assert not proof.exists()
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.load(bad)
    unknown = edit is constant and not hasattr(pt2_archive.constants, "OPAQUE_OBJ_FILENAME_PREFIX")  # torch 2.11
    assert proof.exists() or edit is compiled or unknown, "torch itself no longer runs this: the check may go"


def test_an_archive_that_torch_reads_otherwise_than_python(program, tmp_path):
    """Python looks for the table of contents before its end mark, torch where the end mark says."""
    proof, bad = tmp_path / "ran", tmp_path / "bad.pt2"
    with zipfile.ZipFile(program) as old:
        entries = {n: old.read(n) for n in old.namelist()}
    parts = []
    for model in (touching(entries, proof), entries["archive/models/model.json"]):
        with zipfile.ZipFile(bad, "w") as new:
            for n, content in entries.items():
                new.writestr(n, model if n == "archive/models/model.json" else content)
        raw = bad.read_bytes()
        end = raw.rindex(b"PK\5\6")
        start = struct.unpack("<L", raw[end + 16 : end + 20])[0]
        parts.append((raw[:start], raw[start:end], raw[end:]))
    (evil, evil_table, end), (good, table, _) = parts
    shown, at = bytearray(), 0  # Python adds to every offset what lies before the table and is not accounted for
    while at < len(table):
        size = 46 + sum(struct.unpack("<HHH", table[at + 28 : at + 34]))
        offset = struct.unpack("<L", table[at + 42 : at + 46])[0] + len(evil) - len(good)
        shown += table[at : at + 42] + struct.pack("<L", offset) + table[at + 46 : at + size]
        at += size
    bad.write_bytes(evil + evil_table + good + shown + end)
    with zipfile.ZipFile(bad) as seen:
        assert seen.testzip() is None and seen.read("archive/models/model.json") == entries["archive/models/model.json"]
    with pytest.raises(TeacherError, match="reads otherwise"):
        load_program(bad, allow_pickle=False)
    assert not proof.exists()
    with contextlib.suppress(Exception):
        torch.export.load(bad)
    assert proof.exists(), "torch itself reads it as Python does: the check may go"


def test_what_torch_writes_passes(program, tmp_path):
    load_program(edited(program, tmp_path / "same.pt2", lambda body: None), allow_pickle=False)
    for text in (
        "Symbol('s70', positive=True, integer=True)",
        "Mul(Integer(2), Pow(Symbol('s1'), Integer(-1)))",
        "FloorDiv(s0 + 3, 8)",
    ):
        assert is_plain_expression(text), text
    for text in ("s0.real", "open('x')", "[s0]", "Symbol(__name__)", "eval('1')", "lambda: 1", "Add(*s0)", "x" * 99):
        assert not is_plain_expression(text), text
    assert is_plain_expression("Pow(Integer(2), Symbol('s0', integer=True))")
    assert is_plain_expression("FloatPow(ToFloat(s0), Float('-1.0', precision=53))")
    for text in (
        "Pow(10, Pow(10, 10))",
        "Pow(Pow(Pow(Integer(10), 64), 64), 64)",
        "LShift(Integer(1), Integer(100000000000))",
        "RoundDecimal(Integer(5), Integer(-1000000000))",
        "Integer(Float('1e100000000'))",
        "Rational('1e100000000')",
        "Float('1.0', 1000000000)",
        "Float('1.0', precision=1000000000)",
        "Mul(" + ", ".join(f"Add(s{i}, 1)" for i in range(30)) + ")",
        "'a' * 10000000000",
        "(1, 2) * 10000000000",
        "9" * 40,
    ):
        assert not is_plain_expression(text), text
    assert unsafe_text(b'{"a b": 1, "metadata": {"x": "(anything)"}}') == ["key 'a b'"]


@pytest.mark.parametrize(
    "text", ["1 // 0 == 1", "L['other'].size()[0] == 1", "L['input_ids'].size()[0].size()[0] == 1"]
)
def test_a_guard_that_fails_otherwise_than_guards_do(program, tmp_path, text):
    teacher = load_teacher(str(edited(program, tmp_path / "bad.pt2", lambda body: guard(body, text))))
    with pytest.raises(UnsupportedModelError, match="fails on"):
        capture_teacher(teacher)


def test_guards_compare_sizes_only():
    for text in (
        "L['ids'].size()[1] == L['position_ids'].size()[1]",
        "2 * L['x'].size()[0] <= 8 and L['x'].dim() == 2",
        "min(64*L['ids'].size()[1], 192*L['ids'].size()[1]) == (64*L['ids'].size()[1])",  # torch 2.11
        "max(1, L['ids'].size()[1]) < 2 * max(3, L['ids'].size()[1], 4)",
    ):
        assert is_plain_guard(text), text
    for text in (
        "__import__('os').system('x')",
        "L['ids'].__class__",
        "L['a b']",
        "L['x'].size(0)",
        "[i for i in L]",
        "9 ** 9",
        "print == 1",
        "print(L['x'].size()[0])",
        "min(L['x'].size()[0], key=print)",
        "min(print, 1)",
        "min(*[1], 2)",
        "L['x'].min(1)",
        "min.__call__",
        "L['x'].size()[0] << 10000000000",
        "min(L['x'].size()[0]) == 1",
        "L['x'].size()[0] == " + "9" * 40,
        "1 == 1 # L['x']",
        "(1 ==\n1)",
        "min(" * 80 + "1" + ", 2)" * 80 + " == 1" + " or 1 == 1" * 5000,
    ):
        assert not is_plain_guard(text), text
