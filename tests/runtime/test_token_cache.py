"""The tokenised cache: the same rows, made once; made again when anything that decides them differs, never trusted."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tcal_compiler.errors import RunFolderError
from tcal_compiler.runtime.hashed_tensors import load_hashed, save_hashed
from tcal_compiler.runtime.sources import CalibrationText
from tcal_compiler.runtime.token_cache import cached_rows
from tcal_compiler.runtime.tokenizer import ByteTokenizer, HfTokenizer


class Counting(ByteTokenizer):
    """A tokenizer with a fingerprint that counts the texts that it encodes."""

    eos_token_id = 0

    def __init__(self, mark: str | None = "one") -> None:
        self.mark, self.calls = mark, 0

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self.calls += not special
        return super().encode(text)

    def fingerprint(self) -> str | None:
        return self.mark


@pytest.fixture
def made(tmp_path):
    """A text, a run folder and the cache file of its rows."""
    (tmp_path / "a.jsonl").write_text('{"text": "abcdefgh"}\n{"text": "ijklm"}\n{"text": "nopqrstuvwxyz"}\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.scratch").mkdir()
    text = CalibrationText.of(str(tmp_path / "a.jsonl"), default=tmp_path)
    rows(tmp_path, Counting())
    (file,) = (tmp_path / "run/.scratch/tokens").iterdir()
    return tmp_path, text, file


def rows(folder: Path, tokenizer: Counting, *, length: int = 8, weight: str = ""):
    """Rows through the cache, held against those without, and what was said."""
    text = CalibrationText.of(str(folder / "a.jsonl") + weight, default=folder)
    said: list[str] = []
    found = cached_rows(text, tokenizer, length=length, run=folder / "run", say=said.append)
    for mine, plain in zip(found, text.rows(Counting(), length=length), strict=True):
        assert mine.dtype == plain.dtype and torch.equal(mine, plain)
    return said


def test_made_once_and_then_read(made):
    folder, _, _ = made
    again = Counting()
    assert rows(folder, again) == [] and again.calls == 0


def test_whatever_decides_the_rows_makes_them_anew(made):
    folder, _, file = made
    for change in ({"length": 6}, {"weight": ":2"}, {"tokenizer": Counting("two")}):
        tokenizer = change.pop("tokenizer", Counting())
        assert rows(folder, tokenizer, **change) == [] and tokenizer.calls == 3
        assert not file.exists() and len(list(file.parent.iterdir())) == 1
        rows(folder, Counting())
    (folder / "a.jsonl").write_text('{"text": "another text of the same name"}\n')
    other = Counting()
    assert rows(folder, other) == [] and other.calls == 1
    without = Counting(None)
    rows(folder, without)
    rows(folder, without)
    assert without.calls == 2


def test_every_flipped_byte_is_found(made):
    folder, _, file = made
    raw = file.read_bytes()
    for at in range(0, len(raw), 7):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        tokenizer = Counting()
        said = rows(folder, tokenizer)
        assert tokenizer.calls == 3 and len(said) == 1 and "tokenised again" in said[0], at
        assert rows(folder, tokenizer) == [] and tokenizer.calls == 3


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def forged(what: str, folder: Path, file: Path) -> None:
    """Files whose own sha256 is right, and files of other kinds, in the cache's place."""
    tensors, key = load_hashed(file, hint="")
    ids, counts = tensors["ids"], tensors["counts"]
    made = {
        "an id too large": ({"ids": ids + 10_000, "counts": counts}, key),
        "a negative id": ({"ids": ids - 10_000, "counts": counts}, key),
        "another length": ({"ids": ids[:, 1:], "counts": counts[:, 1:]}, key),
        "another number of rows": ({"ids": ids, "counts": counts[1:]}, key),
        "no rows": ({"ids": ids[:0], "counts": counts[:0]}, key),
        "floats": ({"ids": ids.float(), "counts": counts}, key),
        "another key": ({"ids": ids, "counts": counts}, key[::-1]),
        "a tensor is missing": ({"ids": ids}, key),
    }
    if what in made:
        save_hashed(file, *made[what])
    elif what == "no sha256":
        save_file(tensors, str(file))
    elif what == "a pickle":
        file.write_bytes(pickle.dumps(Bomb(folder / "ran")))
    elif what == "a link":
        file.rename(folder / "elsewhere")
        file.symlink_to(folder / "elsewhere")
    elif what == "a folder":
        file.unlink()
        (file / "inside").mkdir(parents=True)
    elif what == "the folder is a link":
        file.parent.rename(folder / "elsewhere")
        file.parent.symlink_to(folder / "elsewhere")


FORGED = ["an id too large", "a negative id", "another length", "another number of rows", "no rows", "floats"]
FORGED += ["another key", "a tensor is missing", "no sha256", "a pickle", "a link", "a folder", "the folder is a link"]


@pytest.mark.parametrize("what", FORGED)
def test_what_cannot_be_the_rows_is_not_used(made, what):
    folder, _, file = made
    forged(what, folder, file)
    outside = folder / "elsewhere"
    before = outside.read_bytes() if outside.is_file() else None
    tokenizer = Counting()
    rows(folder, tokenizer)
    assert tokenizer.calls == 3 and not (folder / "ran").exists()
    assert before is None or outside.read_bytes() == before
    assert file.is_file() and not file.is_symlink() and not file.parent.is_symlink()
    with safe_open(str(file), framework="pt") as f:
        assert set(f.keys()) == {"ids", "counts"}


def test_a_file_where_the_folder_has_to_be_is_refused(made):
    folder, _, file = made
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("in the way")
    with pytest.raises(RunFolderError, match="cannot be written"):
        rows(folder, Counting())


def test_fingerprint_of_a_transformers_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def build(*, word: str = "b", split: bool = True, eos: int | None = None) -> HfTokenizer:
        raw = Tokenizer(models.WordLevel({"a": 0, word: 1, "?": 2}, unk_token="?"))
        if split:
            raw.pre_tokenizer = pre_tokenizers.Whitespace()
        return HfTokenizer(PreTrainedTokenizerFast(tokenizer_object=raw), eos_token_id=eos)

    mark = build().fingerprint()
    assert mark is not None and mark == build().fingerprint()
    assert len({mark, *(build(**c).fingerprint() for c in ({"word": "c"}, {"split": False}, {"eos": 2}))}) == 4
    python = type("Python", (), {"get_vocab": dict, "eos_token_id": 1, "bos_token_id": 0})
    assert HfTokenizer(python()).fingerprint() is None
