"""Tokenizers behind one small interface: transformers files, the vocabulary inside a GGUF, or plain bytes."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from tcal_compiler.errors import DataError
from tcal_compiler.passes.files import unreadable

from .gguf_reader import plain_gguf_reader
from .tokenizer_limits import check_growth, no_panic

BYTES = "bytes"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_BLOCK = 64  # texts
_ADDS_BOS = b"\x1c\0\0\0\0\0\0\0tokenizer.ggml.add_bos_token\7\0\0\0"  # of a GGUF: length of a key, key, type
_SAMPLED, _ENOUGH = 2000, 20  # ids looked at; words among them that tell something
_PROBE = "A word, \u00e9\u4e2d"
_LEAST_COVERAGE = 0.9  # vocabularies are padded by a few per cent; a tokenizer that covers less is suspicious


class TokenizerLike(Protocol):
    """What the compiler needs of a tokenizer.

    Attributes:
        eos_token_id, bos_token_id: None where there is none.
        num_tokens: one more than the largest id that encode can give.
    """

    eos_token_id: int | None
    bos_token_id: int | None
    num_tokens: int

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of text. special adds what the tokenizer adds to a prompt, such as a BOS token."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into folder; a tokenizer without files writes nothing."""

    def fingerprint(self) -> str | None:
        """sha256 (hex) of everything that decides what encode gives; None where that cannot be told."""


class ByteTokenizer:
    """UTF-8 bytes as token ids 0..255: for a teacher whose vocabulary is the bytes. No special tokens."""

    eos_token_id: int | None = None
    bos_token_id: int | None = None
    num_tokens: int = 256

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        return None

    def fingerprint(self) -> str | None:
        return None  # encoding is as fast as reading what was encoded


class HfTokenizer:
    """A transformers tokenizer behind TokenizerLike. `hf` is the object itself."""

    def __init__(self, hf: Any, *, eos_token_id: int | None = None, bos_token_id: int | None = None) -> None:
        self.hf = hf
        self.num_tokens: int = max(hf.get_vocab().values(), default=-1) + 1
        self.eos_token_id: int | None = hf.eos_token_id if hf.eos_token_id is not None else eos_token_id
        self.bos_token_id: int | None = hf.bos_token_id if hf.bos_token_id is not None else bos_token_id

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        # verbose=False: transformers warns about texts longer than the context, which packing cuts anyway
        with no_panic():
            return list(self.hf(text, add_special_tokens=special, verbose=False)["input_ids"])

    def put_bos_first(self) -> None:
        """Puts bos_token_id before every prompt, here and in the saved files, where that is not done yet."""
        if self.bos_token_id is None or self.encode("x", special=True)[:1] == [self.bos_token_id]:
            return
        from tokenizers.processors import Sequence as Both
        from tokenizers.processors import TemplateProcessing

        bos = self.hf.convert_ids_to_tokens(self.bos_token_id)
        first = TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, self.bos_token_id)]
        )
        backend = self.hf.backend_tokenizer
        backend.post_processor = Both([p for p in (backend.post_processor, first) if p is not None])

    def decode(self, ids: Sequence[int]) -> str:
        with no_panic():
            return str(self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def save(self, folder: Path) -> None:
        try:
            with quiet_transformers():
                self.hf.save_pretrained(str(folder))
        except (ValueError, TypeError, AttributeError) as e:  # of chat templates it takes what it will not write
            what = f"cannot be written: {type(e).__name__}: {_short(e)}"
            raise DataError("tokenizer", what, "mend its tokenizer_config.json") from e

    def fingerprint(self) -> str | None:
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is None:  # the tokenizer is Python code
            return None
        parts = [backend.to_str(), type(self.hf).__name__, str(self.eos_token_id)]
        parts += [version(name) for name in ("tokenizers", "transformers")]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def prompt_start(tokenizer: TokenizerLike) -> tuple[int, ...]:
    """The token that the tokenizer puts before every prompt, if it does: a model of such a one needs it."""
    first = tokenizer.encode("x", special=True)[:1]
    return tuple(first) if first and first[0] == tokenizer.bos_token_id else ()


def encode_each(tokenizer: TokenizerLike, texts: Sequence[str]) -> Iterator[list[int]]:
    """encode of one text after the other; a transformers tokenizer takes _BLOCK of them at a time, on all cores."""
    if not isinstance(tokenizer, HfTokenizer):
        yield from (tokenizer.encode(text) for text in texts)
        return
    for i in range(0, len(texts), _BLOCK):
        with no_panic():
            found = tokenizer.hf(list(texts[i : i + _BLOCK]), add_special_tokens=False, verbose=False)["input_ids"]
        yield from found


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only and no progress bars from transformers inside the block; the user's settings come back after it."""
    from transformers.utils import logging as hf_logging

    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()


def find_tokenizer(source: Path | None, override: str | None) -> Path | None:
    """The folder that holds the tokenizer's files, or None.

    Args:
        source: the teacher's file or folder; its files are looked for there or beside it. None: nowhere to look.
        override: a folder or a tokenizer.json given by the user, or the word "bytes" (which has no folder).

    Raises:
        DataError: override names something that is missing or holds no tokenizer.
    """
    if override == BYTES:
        return None
    if override is not None:
        given = Path(override)
        if given.is_file() and given.name in _TOKENIZER_FILES:
            return given.parent.resolve()
        if not given.exists():
            raise DataError(str(given), "no such tokenizer file or folder", 'a folder with tokenizer.json, or "bytes"')
        if not given.is_dir() or not _holds_tokenizer(given):
            seen = sorted(p.name for p in given.iterdir())[:8] if given.is_dir() else [given.name]
            raise DataError(str(given), f"holds no tokenizer; seen: {seen}", "a folder with tokenizer.json")
        return given.resolve()
    if source is None:
        return None
    folder = source if source.is_dir() else source.parent
    return folder.resolve() if _holds_tokenizer(folder) else None


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def read_tokenizer(folder: Path, *, gguf_file: str | None = None, **ids: int | None) -> HfTokenizer:
    """The tokenizer in folder, or inside the GGUF file of that name there.

    Args:
        ids: eos_token_id and bos_token_id to use where the tokenizer's own files name none.

    Raises:
        DataError: the files are damaged, cannot encode and decode a word, or are of a kind that transformers cannot
            read without running remote code.
    """
    from transformers import AutoTokenizer

    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    where = folder if gguf_file is None else folder / gguf_file
    if wrong := unreadable(folder):
        raise DataError(str(folder), f"cannot read the tokenizer: {wrong}", "copy it again")
    try:
        if gguf_file is None:
            check_growth(folder)
        with quiet_transformers(), no_panic(), plain_gguf_reader() if gguf_file else contextlib.nullcontext():
            hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **extra)
        found = HfTokenizer(hf, **ids)
        if gguf_file is not None and _adds_bos(where):
            found.put_bos_first()
        found.decode(found.encode(_PROBE, special=True))
        words, whole = _own_words(found)
    except Exception as e:  # tokenizers raises bare Exception for damaged files
        raise DataError(
            str(where), f"cannot read the tokenizer: {type(e).__name__}: {_short(e)}", "copy it again"
        ) from e
    if gguf_file is not None and words >= _ENOUGH and 2 * whole < words:
        what = (
            f"transformers {version('transformers')} misreads its tokenizer: {whole} of {words} words of it are one id"
        )
        raise DataError(str(where), what, "a newer transformers, or --tokenizer with the folder of a tokenizer.json")
    return found


def _own_words(tokenizer: HfTokenizer) -> tuple[int, int]:
    """Of about _SAMPLED ids those that are words of four letters or more, and how many of them encode to one id."""
    every = max(1, tokenizer.num_tokens // _SAMPLED)
    texts = [tokenizer.decode([i]) for i in range(0, tokenizer.num_tokens, every)]
    words = [t for t in texts if len(t.strip()) >= 4 and t.isascii() and t.strip().isalpha()]
    return len(words), sum(len(tokenizer.encode(w)) == 1 for w in words)


def _adds_bos(gguf: Path) -> bool:
    """Whether the file says that a BOS token stands before every prompt."""
    with gguf.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_ADDS_BOS)
        behind = at + len(_ADDS_BOS)
        return at >= 0 and data[behind : behind + 1] == b"\1"


def check_tokenizer(tokenizer: TokenizerLike, vocab_size: int) -> None:
    """Refuse a tokenizer whose ids the teacher cannot look up; warn when it covers much less than the vocabulary.

    Raises:
        DataError: the largest id is not below vocab_size.
    """
    if tokenizer.num_tokens > vocab_size:
        raise DataError(
            "tokenizer",
            f"has token ids up to {tokenizer.num_tokens - 1}, but the teacher's vocabulary has {vocab_size} entries "
            f"(0 to {vocab_size - 1}): it is the tokenizer of another model",
            "--tokenizer with the folder of the teacher's own tokenizer",
        )
    if tokenizer.num_tokens < _LEAST_COVERAGE * vocab_size:
        warnings.warn(
            f"the tokenizer has {tokenizer.num_tokens} ids and the teacher's vocabulary {vocab_size}: "
            "is it the teacher's own tokenizer?",
            stacklevel=2,
        )


def _short(e: BaseException, limit: int = 300) -> str:
    text = " ".join(str(e).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
