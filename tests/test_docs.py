"""The documentation against the code: links, the generated reference, commands and Python that it shows."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from command_line import done

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "tcal_compiler/assets/README.md"])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "examples/write_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def broken_links(page: Path) -> list[str]:
    bad = []
    for target in LINK.findall(re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text(), flags=re.M | re.DOTALL)):
        if re.match(r"https?://[\w.-]+(/\S*)?$", target):
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            bad.append(target)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_the_link_check_finds_what_is_broken(tmp_path):
    page, good = tmp_path / "page.md", "# A title, no?\n[a](#a-title-no) [c](page.md#a-title-no) `[f](g)`\n"
    page.write_text(good + "[b](#b) [d](gone.md) [e](htp://x)")
    assert broken_links(page) == ["#b", "gone.md", "htp://x"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:examples|tests|docs|kernels|passes|runtime|tcal_compiler)/[\w./]+)`", page.read_text())
    assert [n for n in named if not (ROOT / n).exists()] == []


def test_the_reference_is_up_to_date():
    text = (ROOT / "docs/reference.md").read_text()
    assert text == reference().reference(), "run: python examples/write_reference.py"


def sections() -> dict[str, set[str]]:
    """Command -> its options in the reference."""
    parts = re.split(r"^## ", (ROOT / "docs/reference.md").read_text(), flags=re.M)[1:]
    found = {p.splitlines()[0]: set(re.findall(r"(?<=[`\s])--?[a-z][\w-]*", p)) for p in parts}
    like_compile = [p.splitlines()[0] for p in parts if "Takes what [tcal-compile]" in p]
    return found | dict.fromkeys(like_compile, found["tcal-compile"])


@pytest.mark.parametrize("command", ["tcal-compile", "tcal align", "tcal eval", "tcal generate", "tcal compare"])
def test_the_reference_has_the_options_that_help_shows(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    shown = set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", done(*command.split(), "--help")))
    shown -= {"--help", "--install-completion", "--show-completion"}
    assert {o for o in shown if o.startswith("--")} == {o for o in sections()[command] if o.startswith("--")}


def commands(page: Path) -> list[list[str]]:
    lines = re.findall(r"^(?:    )?(tcal(?:-compile)? [^\n`]+)$", page.read_text(), re.M)
    lines += re.findall(r"`(tcal(?:-compile)? [^`\n]+)`", page.read_text())
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/guide.md"], ids=lambda p: p.name)
def test_commands_that_are_shown_exist_with_their_options(page):
    found, known = commands(page), sections()
    assert len(found) > 5
    for words in found:
        name = words[0] if words[0] == "tcal-compile" else " ".join(words[:2])
        assert name in known, words
        assert {w for w in words if re.match(r"--?[a-z]", w)} <= known[name] | {"--debug"}, words


SLOW = "<!-- slow -->\n"  # before a block that make test leaves out; a reader does not see it
WITH_PYTHON = [p for p in PAGES if "```python" in p.read_text()]


def run_blocks(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch, *, slow: bool) -> dict[str, object]:
    """The page's Python, block after block in one namespace, in a folder that looks like a clone."""
    names: dict[str, object] = {"__name__": "__main__"}
    for name in ("tcal_compiler", "examples"):
        (place / name).symlink_to(ROOT / name)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    found = re.findall(rf"^({SLOW})?```python\n(.*?)^```", page.read_text(), re.M | re.DOTALL)
    assert len(found) == page.read_text().count("```python")
    for mark, code in found:
        if slow or not mark:
            exec(compile(code, page.name, "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize("page", [p for p in WITH_PYTHON if p.name != "README.md"], ids=lambda p: p.name)
def test_python_that_is_shown_runs(page, tmp_path, shared_run, monkeypatch):
    (tmp_path / "run").symlink_to(shared_run)
    assert run_blocks(page, tmp_path, monkeypatch, slow=False)


def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    import tcal_compiler

    convert = tcal_compiler.convert
    monkeypatch.setattr(tcal_compiler, "convert", lambda *a, **k: convert(*a, until="plan", **k), raising=False)
    run_blocks(ROOT / "README.md", tmp_path, monkeypatch, slow=False)
    assert (tmp_path / "teacher.pt2").stat().st_size > 100_000 and (tmp_path / "tiny-run/plan.toml").is_file()


@pytest.mark.slow
def test_python_in_the_readme_runs_to_the_end(tmp_path, monkeypatch, capsys):
    names = run_blocks(ROOT / "README.md", tmp_path, monkeypatch, slow=True)
    shapes = re.findall(r"torch\.Size\(\[2, (\d+), 256\]\)", capsys.readouterr().out)
    assert shapes == ["9", "50", "200"] and (names["run"] / "onnx/model.onnx").is_file()


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == project["version"] and citation["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_every_dependency_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    rows = re.findall(r"^\| ([\w-]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.M)
    listed = [r for r in rows if r != "package"]
    assert sorted(listed) == sorted({re.split(r"[<>=[]", d)[0] for d in named})


def test_every_attention_core_of_a_family_is_a_site_or_refused():
    """And no cell of docs/families.md is empty, or without anything to tell where nothing was refused."""
    for row in json.loads((ROOT / "docs/families.json").read_text()):
        name, refused = f"{row['family']} ({row['implementation']})", row["refused"]
        assert all(str(cell).strip() for cell in row.values()), name
        reasons = re.findall(r"(?:^|; )(\d+): ", refused)
        if refused.startswith("transformers: "):
            assert {row[k] for k in ("cores", "sites", "same", "onnx")} == {"-"}, name
        else:
            assert int(row["sites"]) + sum(map(int, reasons)) == int(row["cores"]) > 0, name
        assert bool(reasons) or refused == "none" or refused.startswith("transformers: "), name
        if refused == "none":
            assert "-" not in row.values(), name
