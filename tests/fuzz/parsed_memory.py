"""Memory that text takes once it is parsed: `python tests/fuzz/parsed_memory.py [FOLDER OR FILE ...]`.

For the worst JSON known, of a million characters a kind: what json.loads takes and the bound told before. For text of
17 MB: reading it, and its tokens. For a tokenizer of many numbers, and for given folders of tokenizers: their
tokenizer.json through json.loads, and all that reading one takes. For given manifests and exported programs: what is
told before. Linux only.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SENTENCE = "The old man said that he would come, and he did not. "


def line(what: str, size: int, call: Callable[[], object], bound: str = "") -> None:
    """Prints a row: bytes of text, MiB taken, how many times the text, and the bound where there is one."""
    from test_json_text import added

    took = added(call)
    print(f"| {what} | {size} | {took / 2**20:.1f} | {took / size:.1f} | {bound} |", flush=True)


def told(what: str, text: bytes) -> None:
    """Prints a row of text that is not parsed."""
    from tcal_compiler.passes.json_text import parsed_bytes

    print(f"| {what} | {len(text)} | | | {parsed_bytes(text) / len(text):.1f} |", flush=True)


def tokenizer(file: Path) -> None:
    """Prints two rows of a tokenizer.json."""
    from tcal_compiler.passes.json_text import parsed_bytes
    from tcal_compiler.runtime.tokenizer import read_tokenizer

    size, name, bound = file.stat().st_size, file.parent.name, parsed_bytes(file.read_bytes())
    line(f"{name}: json.loads", size, lambda: json.loads(file.read_bytes()), f"{bound / size:.1f}")
    line(f"{name}: read_tokenizer", size, lambda: read_tokenizer(file.parent))


def main() -> None:
    """Prints the table."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/fuzz"), str(ROOT)]
    from fuzz_targets import small_tokenizer
    from test_json_text import WORST
    from transformers import AutoTokenizer

    from tcal_compiler.passes.json_text import parsed_bytes
    from tcal_compiler.runtime.data import encode_documents, read_text
    from tcal_compiler.runtime.tokenizer import ByteTokenizer

    assert AutoTokenizer  # loaded before memory is measured
    print("| text | bytes | MiB | times | bound, times |\n|---|---|---|---|---|")
    for kind, text in WORST.items():
        raw = text.encode()
        line(f"JSON, {kind}", len(raw), lambda raw=raw: json.loads(raw), f"{parsed_bytes(raw) / len(raw):.1f}")
    with tempfile.TemporaryDirectory() as folder:
        rows = {"a.txt": SENTENCE * 320_000, "a.jsonl": (json.dumps({"text": SENTENCE * 8}) + "\n") * 40_000}
        for name, text in rows.items():
            file = Path(folder) / name
            file.write_text(text)
            line(f"{name}, read", len(text), lambda file=file: read_text(file))
            tokens = lambda file=file: encode_documents(read_text(file), ByteTokenizer(), None)  # noqa: E731
            line(f"{name}, read and its bytes as tokens", len(text), tokens)
        small_tokenizer(Path(folder) / "numbers")
        file = Path(folder) / "numbers" / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()), separators=(",", ":")))
        file.write_text(file.read_text().replace('"model":{', '"model":{"x":[' + "999," * 1_000_000 + "0],", 1))
        tokenizer(file)
    for given in map(Path, sys.argv[1:]):
        if given.is_dir():
            tokenizer(given / "tokenizer.json")
            content = json.loads((given / "tokenizer.json").read_bytes())
            dense = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
            told(f"{given.name}, without a space", dense.encode())
        elif given.suffix == ".json":
            told(given.name, given.read_bytes())
        else:
            with zipfile.ZipFile(given) as archive:
                for name in archive.namelist():
                    if name.endswith(".json"):
                        told(f"{given.name}, {name}", archive.read(name))


if __name__ == "__main__":
    main()
