"""Memory that text takes once it is parsed: `python tests/fuzz/parsed_memory.py [FOLDER OF A TOKENIZER ...]`.

For the worst JSON known, of a million characters a kind: what json.loads takes and the bound told before. For text of
16 MB: reading it, and its tokens. For tokenizers: their tokenizer.json through json.loads, and all that reading one
takes. Linux only.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SENTENCE = "The old man said that he would come, and he did not. "


def line(what: str, size: int, call: Callable[[], object], bound: str = "") -> None:
    """Prints a row: bytes of text, MiB taken, how many times the text, and the bound where there is one."""
    from test_json_text import added

    took = added(call)
    print(f"| {what} | {size} | {took / 2**20:.1f} | {took / size:.1f} | {bound} |", flush=True)


def main() -> None:
    """Prints the table."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from test_json_text import WORST
    from transformers import AutoTokenizer

    from tcal_compiler.passes.json_text import parsed_bytes
    from tcal_compiler.runtime.data import encode_documents, read_text
    from tcal_compiler.runtime.tokenizer import ByteTokenizer, read_tokenizer

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
    for given in sys.argv[1:]:
        file = Path(given) / "tokenizer.json"
        size = file.stat().st_size
        line(f"{given}: json.loads", size, lambda file=file: json.loads(file.read_bytes()))
        line(f"{given}: read_tokenizer", size, lambda given=given: read_tokenizer(Path(given)))


if __name__ == "__main__":
    main()
