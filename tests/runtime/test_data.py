"""Text files, packing, and the refusal of texts that were calibrated on."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tcal_compiler import cli
from tcal_compiler.errors import DataError
from tcal_compiler.runtime.data import (
    check_not_calibrated,
    count_rows,
    encode_documents,
    encode_rows,
    pack,
    paragraph_hashes,
    read_text,
    text_sha256,
)
from tcal_compiler.runtime.tokenizer import ByteTokenizer, prompt_start, read_tokenizer

DOCS = ["One text.\nTwo lines.", "Zwölf Boxkämpfer", 'a "quoted" one']


def words(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(count))


def write_jsonl(path: Path, docs: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": d, "id": i}) for i, d in enumerate(docs)) + "\n\n")
    return path


def test_the_three_formats(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt").write_bytes("\ufeffZwölf\r\n".encode())
    assert read_text(tmp_path / "a.txt") == ["Zwölf\r\n"]
    plain = write_jsonl(tmp_path / "a.jsonl", [*DOCS, "  "])
    assert read_text(plain) == DOCS
    packed = tmp_path / "a.jsonl.zst"
    raw, compress = plain.read_bytes(), zstandard.ZstdCompressor().compress
    packed.write_bytes(compress(raw[:40]) + compress(raw[40:]))  # two frames
    assert read_text(packed) == DOCS


def test_a_compressed_file_cut_at_any_point_is_refused(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(json.dumps({"text": words(60, 1)}).encode())
    file = tmp_path / "a.jsonl.zst"
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"truncated|no text"):
            read_text(file)
    file.write_bytes(whole[:-6] + bytes(2) + whole[-4:])
    with pytest.raises(DataError, match="damaged"):
        read_text(file)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "holds no text .0 bytes"),
        ("a.txt", b" \n\t", "holds no text"),
        ("a.txt", b"good\nb\xff", "not UTF-8: byte 0xff at offset 6, line 2"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "x"', r"line 3: cannot be read as JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', r"line 2: has no string under \"text\"; seen: keys \['body'\]"),
        ("a.jsonl", b'["x"]', "line 1: .*seen: list"),
        ("a.jsonl", b'{"text": 3}', "line 1: has no string"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: half a surrogate pair"),
        ("a.jsonl.zst", b"plain", "not zstd"),
        ("a.csv", b"x", "suffixes .txt, .jsonl, .jsonl.zst"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text(tmp_path / name)


def test_a_small_file_that_becomes_gigabytes(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(9000))
    packed = zstandard.ZstdCompressor().compress(lines)
    (tmp_path / "many.jsonl.zst").write_bytes(packed * 3)
    assert len(packed) > 4096 and len(read_text(tmp_path / "many.jsonl.zst")) == 27000
    (tmp_path / "bomb.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(bytes(1 << 26)))
    with pytest.raises(DataError, match=f"2067 bytes that become more than {8 << 20}"):
        read_text(tmp_path / "bomb.jsonl.zst")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    with pytest.raises(DataError, match=f"bytes that become more than {1 << 18}"):
        read_text(tmp_path / "many.jsonl.zst")
    (tmp_path / "long.txt").write_bytes(b"a" * (1 << 20))
    with pytest.raises(DataError, match="more than half of the free memory"):
        read_text(tmp_path / "long.txt")


def test_missing_files_and_packages(tmp_path, monkeypatch):
    for call in (read_text, text_sha256):
        with pytest.raises(DataError, match="no such file"):
            call(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path / "folder.txt")
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match="needs the zstandard package"):
        read_text(tmp_path / "a.jsonl.zst")


def test_documents_are_joined_by_eos_where_there_is_one():
    tokenizer = ByteTokenizer()
    assert encode_documents(["ab", "c"], tokenizer, 7).tolist() == [97, 98, 7, 99]
    ids = encode_documents(["ab", "c"], tokenizer, None)
    assert ids.tolist() == [97, 98, 99] and ids.dtype == torch.int64
    with pytest.raises(DataError, match="no token"):
        encode_documents([], tokenizer, 7)


def test_pack_is_consecutive_or_says_what_would_fit():
    tokens = torch.arange(25)
    assert torch.equal(pack(tokens, sequences=3, length=8, what="text"), tokens[:24].view(3, 8))
    message = "calibration text: has 25 tokens, but 4 sequences of 8 tokens need 32; 3 such sequences fit"
    with pytest.raises(DataError, match=message) as e:
        pack(tokens, sequences=4, length=8, what="calibration text")
    assert "at most 3 sequences" in e.value.hint
    with pytest.raises(DataError, match="0 such sequences fit") as e:
        pack(tokens, sequences=1, length=26, what="calibration text")
    assert "at most 25" in e.value.hint


def test_the_same_text_is_found_in_every_disguise(tmp_path):
    docs = [words(400, seed) for seed in range(40)]
    used = write_jsonl(tmp_path / "used.jsonl", docs)
    shas, hashes = {"used": text_sha256(used)}, {"used": paragraph_hashes(used)}
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(used.read_bytes())
    with pytest.raises(DataError, match=r"is the file that was calibrated on .used"):
        check_not_calibrated(copy, shas)
    plain = tmp_path / "plain.txt"
    for text in (
        "\n\n".join(docs),  # another format
        "new first words " + "\n".join(docs).replace(" ", "  "),  # other white space, shifted
        "\n".join(docs[17:30]),  # a part
        "\n".join(docs[:24] + [words(400, 1000 + i) for i in range(12)]),  # two thirds of it
    ):
        plain.write_text(text)
        check_not_calibrated(plain, shas)  # the bytes differ
        with pytest.raises(DataError, match=r"sampled passages were calibrated on .used"):
            check_not_calibrated(plain, shas, hashes)


def test_another_text_is_accepted(tmp_path):
    used, other = tmp_path / "used.txt", tmp_path / "other.txt"
    shared = words(600, 5)
    used.write_text(words(5000, 1) + " " + shared)
    other.write_text(words(5000, 2) + " " + shared)  # a tenth in common, as of a licence text
    for a, b in ((used, other), (other, used)):
        check_not_calibrated(a, {"b": text_sha256(b)}, {"b": paragraph_hashes(b)})
    other.write_text("short")
    check_not_calibrated(other, {"b": text_sha256(used)}, {"b": paragraph_hashes(used)})
    sample = paragraph_hashes(used)
    assert len(sample) == len(set(sample)) == 256 and sample == sorted(sample)


def test_texts_encoded_together_are_texts_encoded_alone():
    tokenizer = read_tokenizer(Path(cli.__file__).parent / "assets" / "teacher")
    docs = [f"Document {n}, \u00e9\u4e2d. " * (n % 7) + "end" for n in range(150)]
    expected = [i for doc in docs for i in [*tokenizer.encode(doc), 0]][:-1]
    assert encode_documents(docs, tokenizer, 0).tolist() == expected


class Begins(ByteTokenizer):
    """Bytes, and token 7 before every prompt."""

    bos_token_id = 7

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [7] * special + super().encode(text)


def test_every_row_begins_as_prompts_do():
    words = Begins()
    assert prompt_start(words) == (7,) and prompt_start(ByteTokenizer()) == ()
    docs = ["abcde", "fgh"]
    tokens = encode_documents(docs, words, 0)
    assert tokens.tolist() == [*b"abcde", 0, *b"fgh"]  # none inside
    rows = pack(tokens, sequences=3, length=4, what="text", start=(7,))
    assert rows.tolist() == [[7, *b"abc"], [7, *b"de", 0], [7, *b"fgh"]]
    assert count_rows(tokens, length=4, start=(7,)) == 3 and count_rows(tokens, length=4) == 2
    ids, counts = encode_rows(docs, words, 0, length=5)
    assert ids.tolist() == [[7, *b"abcd"], [7, *b"e", 0, *b"fg"], [7, *b"h", 0, 0, 0]]
    assert counts.tolist() == [[True] * 4, [True, True, False, True], [True, False, False, False]]
    with pytest.raises(DataError, match="1 tokens, of which the prompt's start takes 1"):
        pack(tokens, sequences=1, length=1, what="text", start=(7,))
