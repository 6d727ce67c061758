"""Rules about the source itself: sizes, import direction, trivial packages, no traces of a machine, the name trap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "passes", "runtime", "tcal_compiler")  # each may import the ones before it
MOST_LINES, MOST_FUNCTION_LINES = 400, 60
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".cfg", ".json", ".ini", ""}
# An absolute path of the machine that a file was written on; written so that it does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~)])/(?:work|root|home|tmp|mnt|opt)/[\w.]")


def source_files(*folders: str) -> list[Path]:
    """Python files below the given root folders; links are not followed."""
    return sorted(p for folder in folders for p in walk(ROOT / folder) if p.suffix == ".py")


def walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name in ("__pycache__", "assets"):
            continue
        if path.is_dir():
            yield from walk(path)
        else:
            yield path


ALL = source_files(*LAYERS, "tests", "examples")


def test_files_and_functions_are_short():
    long = []
    for path in ALL:
        text = path.read_text()
        if (count := text.count("\n")) > MOST_LINES:
            long.append(f"{path.relative_to(ROOT)}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > MOST_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {count} lines")
    assert not long


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import in a file, for relative imports too."""
    package = ["tcal_compiler", *path.relative_to(ROOT).parts[:-1]]
    if package[1] == "tcal_compiler":
        package = package[1:]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield node.lineno, name
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)


def layer_of(name: str) -> int | None:
    """Index in LAYERS of an imported name, None for anything outside and for what every layer may import."""
    parts = name.split(".")
    if parts[0] != "tcal_compiler" or parts[1:2] == ["errors"] or len(parts) == 1:
        return None
    return LAYERS.index(parts[1]) if parts[1] in LAYERS else len(LAYERS) - 1


@pytest.mark.parametrize("layer", LAYERS[:-1])
def test_imports_go_one_way(layer):
    wrong = []
    for path in source_files(layer):
        for line, name in imported(path):
            # `from tcal_compiler import errors` also reads as tcal_compiler.errors, which everyone may import
            if (level := layer_of(name)) is not None and level > LAYERS.index(layer):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def test_nothing_is_imported_by_its_short_name():
    short = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in ALL
        for line, name in imported(path)
        if name.split(".")[0] in LAYERS[:-1]
    ]
    assert not short


def test_the_reader_of_imports_sees_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "passes/x.py"
    file.parent.mkdir()
    file.write_text("from . import base\nfrom ..runtime import config\nfrom tcal_compiler import errors, api\n")
    levels = {name: layer_of(name) for _, name in imported(file)}
    assert levels["tcal_compiler.passes.base"] == 1 and levels["tcal_compiler.runtime.config"] == 2
    assert levels["tcal_compiler.errors"] is None and levels["tcal_compiler.api"] == 3


@pytest.mark.parametrize("folder", LAYERS[:-1])
def test_packages_are_linked_and_trivial(folder):
    body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    link = ROOT / "tcal_compiler" / folder
    assert link.is_symlink() and link.readlink() == Path("..") / folder


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [p.parent.relative_to(ROOT).parts for p in source_files(*LAYERS) if p.name == "__init__.py"]
    names = [".".join(parts if parts[0] == "tcal_compiler" else ("tcal_compiler", *parts)) for parts in found]
    assert sorted(names) == sorted(listed)


def test_no_file_names_a_place_on_one_machine():
    folders = [*LAYERS, "tests", "examples", "docs", ".ci"]
    files = [p for f in folders if (ROOT / f).is_dir() for p in walk(ROOT / f)]
    files += [p for p in ROOT.iterdir() if p.is_file() and not p.is_symlink() and p.name != ".git"]
    found = []
    for path in files:
        if path.suffix in TEXT_SUFFIXES and (path.suffix or path.name in ("Makefile", "LICENSE", "run")):
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
                if MACHINE_PATH.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number} {line.strip()[:80]}")
    assert not found


TRAP = """
import sys
sys.path.insert(0, "")  # as python -c and python -m do
import importlib.util, tempfile
assert importlib.util.find_spec("kernels").origin == EXPECTED, "the trap is not set"
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1,
)
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
import torch
assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 32)
assert not any(name.startswith("kernels.") for name in sys.modules), "something of ours was imported by its short name"
"""


def test_transformers_works_from_the_repository_root():
    expected = str(ROOT / "kernels" / "__init__.py")
    result = subprocess.run(
        [sys.executable, "-c", TRAP.replace("EXPECTED", repr(expected))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_importing_the_package_is_light():
    heavy = ("transformers", "onnx", "onnxruntime", "gguf", "triton", "matplotlib")
    code = f"import sys, tcal_compiler, tcal_compiler.errors; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
