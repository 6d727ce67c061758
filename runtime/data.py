"""Text to token sequences, and proof that a text was not calibrated on."""

from __future__ import annotations

import hashlib
import io
import re
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from tcal_compiler.errors import DataError
from tcal_compiler.passes.json_text import TEXTS, read_json

from .tokenizer import TokenizerLike, encode_each, prompt_start

Step = Callable[[int, int], None]  # progress of what is done, and all that is to do
Bar = Callable[[str], Step]

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")
_WINDOW = 200  # characters of a hashed window, white space normalised
_SAMPLE = 256  # hashes kept of a text
_ANCHOR_EVERY = 8  # one word in so many starts a window
_MOST_TEXT = 32_000_000  # characters looked at for hashes
_ROWS = 1  # of a parquet file at a time: every row may be the same long word of its dictionary
_PIECE = 1 << 7  # compressed bytes taken at a time: at most 4 MiB of text
_MOST_RATIO, _SMALL = 100, 8 << 20  # bytes of text for one of a file, and what is allowed whatever the file's size
_SHOWN = 256  # documents between two calls of a progress
_OVERLAP = 0.5  # share of equal windows from which a text counts as calibrated on


def read_text(path: str | Path) -> list[str]:
    """Documents of a text file: the whole of a .txt, or the "text" of each line of a .jsonl or .jsonl.zst, or of each
    row of a .parquet.

    Raises:
        DataError: missing, of another suffix, not UTF-8, a malformed line or row (with its number), or without text.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise DataError(str(path), f"has none of the suffixes {', '.join(SUFFIXES)}", "rename or convert the file")
    raw = _read_bytes(path)
    docs = list(_parquet_rows(raw, path)) if path.name.endswith(".parquet") else _decode(raw, path)
    docs = [d for d in docs if d.strip()]
    if not docs:
        raise DataError(str(path), f"holds no text ({len(raw)} bytes)", "a file with text")
    return docs


def _decode(raw: bytes, path: Path) -> list[str]:
    """Documents of a .txt, .jsonl or .jsonl.zst file."""
    text = _as_text(raw, path)
    return [text] if path.name.endswith(".txt") else list(_json_lines(text, path))


def _as_text(raw: bytes, path: Path) -> str:
    if path.name.endswith(".zst"):
        raw = _decompress(raw, path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        what = f"is not UTF-8: byte 0x{raw[e.start]:02x} at offset {e.start}, line {line}"
        raise DataError(str(path), what, "iconv -t utf-8") from e


def _read_bytes(path: Path) -> bytes:
    """Raises DataError for what is no plain file, which might not end, or fills more than half of the free memory."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise DataError(str(path), "cannot be read: it is no plain file", "a file of text")
        if size > psutil.virtual_memory().available // 2:
            raise DataError(str(path), f"is {size} bytes, more than half of the free memory", "a part of the text")
        return path.read_bytes()
    except FileNotFoundError as e:
        raise DataError(str(path), "no such file", "check the path") from e
    except OSError as e:
        raise DataError(str(path), f"cannot be read: {e.strerror or e}", "a file that you may read") from e


def _decompress(raw: bytes, path: Path) -> bytes:
    """All frames of a zstd file, up to `_room`: a few bytes may say that they stand for gigabytes.

    The streaming reader would take a file that is cut off for one that ends early.
    """
    try:
        import zstandard
    except ModuleNotFoundError as e:
        raise DataError(str(path), "reading .zst needs the zstandard package", "pip install zstandard") from e
    parts: list[bytes] = []
    at, limit = 0, _room(raw)
    while at < len(raw):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while at < len(raw) and not frame.eof:
            try:
                parts.append(frame.decompress(raw[at : at + _PIECE]))
            except zstandard.ZstdError as e:
                raise DataError(str(path), f"is not zstd or is damaged: {e}", "copy the file again") from e
            at, limit = at + _PIECE, limit - len(parts[-1])
            if limit < 0:
                raise _too_much(raw, path)
        if not frame.eof:
            raise DataError(str(path), "is truncated: its last frame is cut off", "copy the file again")
        at = min(at, len(raw)) - len(frame.unused_data)
    return b"".join(parts)


def _room(raw: bytes) -> int:
    """Bytes that a compressed file may become: text shrinks to a third or a tenth, never to a hundredth."""
    return min(psutil.virtual_memory().available // 4, max(_SMALL, _MOST_RATIO * len(raw)))


def _too_much(raw: bytes, path: Path) -> DataError:
    what = f"is {len(raw)} bytes that become more than {_room(raw)}"
    return DataError(str(path), what, "a part of the text, or the text itself without compression")


def _parquet_rows(raw: bytes, path: Path) -> Iterable[str]:
    """The column "text", a row at a time, up to `_room`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as e:
        raise DataError(str(path), "reading .parquet needs the pyarrow package", "pip install pyarrow") from e
    limit, number = _room(raw), 0
    try:
        file = parquet.ParquetFile(io.BytesIO(raw), pre_buffer=False)
        kinds = {f.name: f.type for f in file.schema_arrow}
        if "text" not in kinds:
            what = f'has no column "text"; columns: {", ".join(list(kinds)[:6])}'
            raise DataError(str(path), what, "rename the column that holds the text")
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        if sum(g.total_byte_size for g in groups) > limit:  # of one column, damage would end the process
            raise _too_much(raw, path)
        for batch in file.iter_batches(batch_size=_ROWS, columns=["text"], use_threads=False):
            for value in batch.column(0).to_pylist():
                number += 1
                if not isinstance(value, str):
                    what = f'has no string under "text"; the column is {kinds["text"]}'
                    raise DataError(f"{path}, row {number}", what, "a column of strings without nulls")
                limit -= len(value)
                if limit < 0:
                    raise _too_much(raw, path)
                yield value
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        what = f"is no parquet file or is damaged: {str(e).splitlines()[0] if str(e) else e!r}"
        raise DataError(str(path), what, "copy the file again") from e


def read_rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl or .jsonl.zst file, each behind its place ("PATH, line N").

    Raises:
        DataError: missing, of another suffix, not UTF-8, a malformed line (with its number), or without a line.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.zst")):
        raise DataError(str(path), "has none of the suffixes .jsonl, .jsonl.zst", "rename or convert the file")
    raw = _read_bytes(path)
    rows = list(_json_objects(_as_text(raw, path), path, "one object on every line"))
    if not rows:
        raise DataError(str(path), f"holds no line ({len(raw)} bytes)", "a file with examples")
    return rows


def _json_objects(text: str, path: Path, hint: str) -> Iterable[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = read_json(line, times=TEXTS)
        except (ValueError, RecursionError) as e:
            raise DataError(where, f"cannot be read as JSON: {e}", hint) from e
        if not isinstance(row, dict):
            raise DataError(where, f"is no object; seen: {type(row).__name__}", hint)
        yield where, row


def _json_lines(text: str, path: Path) -> Iterable[str]:
    hint = '{"text": "..."} on every line'
    for where, row in _json_objects(text, path, hint):
        value = row.get("text")
        if not isinstance(value, str):
            raise DataError(where, f'has no string under "text"; seen: keys {sorted(row)[:6]}', hint)
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as e:
            raise DataError(where, f'half a surrogate pair at character {e.start} of "text"') from e
        yield value


def encode_documents(
    docs: Sequence[str],
    tokenizer: TokenizerLike,
    eos: int | None,
    *,
    most: int | None = None,
    progress: Step | None = None,
) -> Tensor:
    """Token ids int64 [N] of all documents, joined by eos where there is one.

    most: documents behind the one that brings so many tokens are left out. progress: is called with how many there are
    of that many tokens, or without `most` of documents.

    Raises:
        DataError: the documents hold no token.
    """
    return _encode(docs, tokenizer, eos, most, progress)[0]


def _encode(
    docs: Sequence[str], tokenizer: TokenizerLike, eos: int | None, most: int | None, progress: Step | None
) -> tuple[Tensor, Tensor]:
    """Token ids [N], and the number of each one's document [N]; an eos belongs to the document that it ends."""
    ids = array("q")
    ends: list[int] = []
    whole = len(docs) if most is None else most
    for i, found in enumerate(encode_each(tokenizer, docs)):
        if i and eos is not None:
            ids.append(eos)
        if i:
            ends.append(len(ids))
        ids.extend(found)
        if progress and (i + 1) % _SHOWN == 0:
            progress(i + 1 if most is None else min(len(ids), most), whole)
        if most is not None and len(ids) >= most:
            break
    if not ids:
        raise DataError("text", f"{len(docs)} documents hold no token", "another text or tokenizer")
    if progress:
        progress(whole, whole)
    document = torch.bucketize(torch.arange(len(ids)), torch.tensor(ends, dtype=torch.int64), right=True)
    return torch.frombuffer(ids, dtype=torch.int64).clone(), document


def encode_rows(
    docs: Sequence[str],
    tokenizer: TokenizerLike,
    eos: int | None,
    *,
    length: int,
    padding: int = 0,
    progress: Step | None = None,
) -> tuple[Tensor, Tensor]:
    """All documents as rows, and which predictions a loss may count.

    Returns ids int64 [N, length], consecutive as `pack` cuts them behind prompt_start, the last row filled up with
    `padding`; and counts bool [N, length - 1]: the prediction at t, of token t + 1, counts when both tokens are of one
    document, not padding. What a row starts with is of its first token's document.

    Raises:
        DataError: the documents hold no token.
    """
    ids, document = _encode(docs, tokenizer, eos, None, progress)
    start = prompt_start(tokenizer)
    own = _own(length, start)
    missing = -len(ids) % own
    ids = _behind(start, torch.nn.functional.pad(ids, (0, missing), value=padding).view(-1, own))
    document = torch.nn.functional.pad(document, (0, missing), value=-1).view(-1, own)
    document = torch.cat([document[:, :1].expand(-1, len(start)), document], 1)
    return ids, (document[:, :-1] == document[:, 1:]) & (document[:, 1:] >= 0)


def _own(length: int, start: Sequence[int]) -> int:
    """Tokens of the text in a row of so many."""
    if length <= len(start):
        raise DataError(
            "length", f"{length} tokens, of which the prompt's start takes {len(start)}", "longer sequences"
        )
    return length - len(start)


def _behind(start: Sequence[int], rows: Tensor) -> Tensor:
    return torch.cat([torch.tensor([start] * len(rows), dtype=rows.dtype).view(len(rows), -1), rows], 1)


def text_rows(path: str | Path, tokenizer: TokenizerLike, *, sequences: int, length: int) -> Tensor:
    """The first sequences of a text file, int64 [sequences, length], each behind the tokenizer's prompt_start.

    Raises DataError as `read_text`, `encode_documents` and `pack` do.
    """
    tokens = encode_documents(read_text(path), tokenizer, tokenizer.eos_token_id, most=sequences * length)
    return pack(tokens, sequences=sequences, length=length, what=str(path), start=prompt_start(tokenizer))


def count_rows(tokens: Tensor, *, length: int, start: Sequence[int] = ()) -> int:
    """How many sequences `pack` can make of the tokens."""
    return tokens.numel() // _own(length, start)


def pack(tokens: Tensor, *, sequences: int, length: int, what: str, start: Sequence[int] = ()) -> Tensor:
    """Sequences [sequences, length] of the first tokens, consecutive and without overlap, each behind `start`.

    Args:
        tokens: int64 [N].
        what: what the text is for, such as "calibration text"; used in the error.
        start: tokenizer.prompt_start, which is in every prompt too.

    Raises:
        DataError: N < sequences * (length - len(start)).
    """
    own = _own(length, start)
    have, need = tokens.numel(), sequences * own
    if have < need:
        fit = have // own
        shorter = f"a length of at most {have + len(start)}, or " if have + len(start) > 1 else ""
        hint = f"at most {fit} sequences, or a longer text" if fit else f"{shorter}a longer text"
        raise DataError(
            what,
            f"has {have} tokens, but {sequences} sequences of {length} tokens need {need}; {fit} such sequences fit",
            hint,
        )
    return _behind(start, tokens[:need].reshape(sequences, own))


def text_sha256(path: str | Path) -> str:
    """sha256 (hex) of the file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    return hashlib.sha256(_read_bytes(Path(path))).hexdigest()


def paragraph_hashes(path: str | Path) -> list[str]:
    """document_hashes of a file's documents. Raises DataError: see read_text."""
    return document_hashes(read_text(path))


def document_hashes(docs: Iterable[str]) -> list[str]:
    """At most 256 hashes of 200-character windows, sorted: a sample that says how much two texts share.

    Windows begin at the start of each document and at words whose checksum is a multiple of 8, and the smallest
    hashes are kept (a bottom-k sketch). So two texts choose the same windows wherever they hold the same words,
    which windows at even distances would do only for files that are equal from the start. White space is normalised.
    A part of a text is found when it is at least some hundredths of it: below that the sample may hold none of it.
    """
    found: set[str] = set()
    budget = _MOST_TEXT
    for doc in docs:
        text = " ".join(doc[: max(budget, 0)].split())
        budget -= len(doc)
        starts = [m.start() for m in re.finditer(r"\S+", text) if zlib.crc32(m[0].encode()) % _ANCHOR_EVERY == 0]
        windows = [text[s : s + _WINDOW] for s in starts if s + _WINDOW <= len(text)]
        found.update(_hash(w) for w in [text[:_WINDOW], *windows] if w)
    return sorted(found)[:_SAMPLE]


def _hash(window: str) -> str:
    return hashlib.sha256(window.encode()).hexdigest()[:16]


def check_not_calibrated(
    path: str | Path,
    calibrated_sha256: Mapping[str, str],
    calibrated_hashes: Mapping[str, Collection[str]] | None = None,
    *,
    docs: Iterable[str] | None = None,
) -> None:
    """Refuse to measure on a text that was calibrated on.

    Args:
        docs: the documents of the file, where it does not hold them in a way that read_text knows.
        calibrated_sha256: text_sha256 of each calibration file, by name.
        calibrated_hashes: paragraph_hashes of each, by name; finds copies that were renamed, cut, converted or packed.

    Raises:
        DataError: the same bytes, or at least half of the sampled windows are the same, in one text or in all together.
    """
    hint = "a text that was not calibrated on"
    digest = text_sha256(path)
    for name, other in calibrated_sha256.items():
        if digest == other:
            raise DataError(str(path), f"is the file that was calibrated on ({name}, sha256 {digest[:12]})", hint)
    mine = set(document_hashes(read_text(path) if docs is None else docs)) if calibrated_hashes else set()
    share, names, found = 0.0, list[str](), set[str]()
    for name, hashes in (calibrated_hashes or {}).items():
        theirs = set(hashes)
        # Above the largest hash of a full sketch, absence says nothing.
        known = {h for h in mine if len(theirs) < _SAMPLE or h <= max(theirs)}
        same = len(known & theirs)
        if known and same >= _OVERLAP * len(known):
            what = f"{same} of {len(known)} sampled passages were calibrated on ({name})"
            raise DataError(str(path), what, hint)
        if fresh := len((known & theirs) - found):
            share, names, found = share + fresh / len(known), [*names, name], found | theirs
    if share >= _OVERLAP:
        what = f"about {100 * share:.0f}% of its sampled passages were calibrated on ({', '.join(names)} together)"
        raise DataError(str(path), what, hint)
