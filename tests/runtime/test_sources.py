"""Calibration text from several weighted files, parquet among them, and the refusal to measure on any of them."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcal_compiler.errors import ConfigError, DataError
from tcal_compiler.runtime.data import check_not_calibrated, encode_documents, encode_rows, pack, read_text
from tcal_compiler.runtime.repeats import repeat_stretches
from tcal_compiler.runtime.sources import CalibrationText, TextSource, mix, parse_source
from tcal_compiler.runtime.tokenizer import ByteTokenizer

DEFAULT = Path("default.txt")


class Eos(ByteTokenizer):
    eos_token_id = 0


def words(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(count))


def jsonl(path: Path, docs: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    return path


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """Many documents, and one of other letters."""
    first = jsonl(tmp_path / "a.jsonl", [words(130, i) for i in range(60)])
    second = tmp_path / "b.txt"
    second.write_text(words(8000, -1).upper())
    return first, second


def text(*given: object) -> CalibrationText:
    return CalibrationText.of([str(g) for g in given], default=DEFAULT)


def test_paths_and_weights_are_read():
    assert CalibrationText.of(None, default=DEFAULT).sources == (TextSource(DEFAULT),)
    assert CalibrationText.of("x.txt:3", default=DEFAULT).sources == (TextSource(Path("x.txt"), 3.0),)
    assert parse_source("a:b/c.parquet:1e-1") == TextSource(Path("a:b/c.parquet"), 0.1)
    assert parse_source("C:\\c.jsonl.zst") == TextSource(Path("C:\\c.jsonl.zst"))
    assert parse_source("odd:1") == TextSource(Path("odd:1"))  # refused by its suffix when it is read
    for bad in ("0", "-1", "nan", "inf", "", "x", "1e308", "1e-9"):
        with pytest.raises(ConfigError, match="is no positive number"):
            parse_source(f"a.txt:{bad}")
    for texts, what in (([], "names no file"), (["a.txt", "./a.txt:2"], "names a file twice")):
        with pytest.raises(ConfigError, match=what) as e:
            CalibrationText.of(texts, default=DEFAULT)
        assert e.value.where == "calib.text"


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_every_stretch_of_rows_holds_the_files_in_proportion(weights):
    turns, taken = mix(weights), [0] * len(weights)
    for n in range(1, 200):
        taken[next(turns)] += 1
        for count, w in zip(taken, weights, strict=True):
            exact = n * w / math.fsum(weights)
            assert math.floor(exact - 1e-9) <= count <= math.ceil(exact + 1e-9)


def test_one_file_gives_what_it_gave(files):
    tokenizer, docs = Eos(), read_text(files[0])
    tokens = encode_documents(docs, tokenizer, 0)
    found = text(files[0]).sequences(tokenizer, count=20, length=32)
    assert torch.equal(found, pack(tokens, sequences=20, length=32, what=""))
    ids, counts = text(files[0]).rows(tokenizer, length=32)
    expected = encode_rows(docs, tokenizer, 0, length=32)
    assert torch.equal(ids, expected[0]) and torch.equal(counts, expected[1])


def is_upper(ids: torch.Tensor) -> list[bool]:
    return [bool(((row >= 65) & (row <= 90)).any()) for row in ids]


def test_rows_of_several_files_take_turns(files):
    tokenizer, both = Eos(), text(f"{files[0]}:0.75", f"{files[1]}:0.25")
    ids = both.sequences(tokenizer, count=16, length=32)
    assert sum(is_upper(ids)) == 4 and sum(is_upper(ids[12:])) == 1
    own = [t.sequences(tokenizer, count=12, length=32) for t in (text(files[0]), text(files[1]))]
    upper = torch.tensor(is_upper(ids))
    assert torch.equal(ids[~upper], own[0]) and torch.equal(ids[upper], own[1][:4])
    rows, counts = both.rows(tokenizer, length=32)
    assert torch.equal(rows[:16], ids) and len(rows) == len(counts)
    whole = [len(text(f).rows(tokenizer, length=32)[0]) for f in files]
    shares = torch.tensor(is_upper(rows)).sum().item()
    assert len(rows) - shares == whole[0] or shares == whole[1]  # one file is taken whole
    assert abs(shares - 0.25 * len(rows)) < 1
    assert both.identity() != text(f"{files[0]}:3", f"{files[1]}:2").identity()
    with pytest.raises(DataError, match=r"b\.txt: has .* tokens, but 1001 sequences of 64"):
        text(f"{files[0]}:1e-6", files[1]).sequences(tokenizer, count=1001, length=64)


def test_a_file_without_a_share_is_read_all_the_same(files, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        text(f"{files[0]}:1e6", f"{tmp_path / 'none.txt'}:1e-6").sequences(Eos(), count=1, length=32)


def test_no_more_documents_are_encoded_than_are_needed(files, monkeypatch):
    encoded, encode = [], ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, t, **kw: (encoded.append(t), encode(self, t, **kw))[1])
    text(files[0]).sequences(ByteTokenizer(), count=4, length=256)
    assert 1 < len(encoded) < 8


@pytest.mark.parametrize("which", [0, 1])
def test_no_file_that_was_calibrated_on_is_measured_on(files, tmp_path, which):
    both = text(*files)
    with pytest.raises(DataError, match=f"is the file that was calibrated on .{files[which].name}"):
        check_not_calibrated(files[which], both.sha256(), both.hashes())
    (tmp_path / "copy.txt").write_text("A new start. " + " ".join(read_text(files[which])))
    with pytest.raises(DataError, match=f"passages were calibrated on .{files[which].name}"):
        check_not_calibrated(tmp_path / "copy.txt", both.sha256(), both.hashes())


def test_a_text_put_together_from_several_files_is_found(tmp_path):
    parts = [words(3000, seed) for seed in range(3)]
    files = []
    for i, part in enumerate(parts):
        files.append(tmp_path / f"{i}.txt")
        files[i].write_text(part)
    together = text(*files)
    mixed = tmp_path / "mixed.txt"
    mixed.write_text(" ".join(p[:9000] for p in parts) + words(600, 99))  # no file makes half of it
    for name, hashes in together.hashes().items():
        check_not_calibrated(mixed, {}, {name: hashes})
    with pytest.raises(DataError, match=r"calibrated on \(0.txt, 1.txt, 2.txt together\)"):
        check_not_calibrated(mixed, together.sha256(), together.hashes())
    mixed.write_text(parts[0][:2000] + parts[1][:2000] + words(4000, 98))
    check_not_calibrated(mixed, together.sha256(), together.hashes())
    same = parts[0][:6000] + words(3000, 97)  # a third, that two files hold: it counts once
    mixed.write_text(same)
    files[1].write_text(parts[0])
    check_not_calibrated(mixed, together.sha256(), text(files[0], files[1]).hashes())


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(words(900, len(folder) + ord(folder)))
    both = text(tmp_path / "x/a.txt", tmp_path / "y/a.txt")
    assert len(both.sha256()) == len(both.hashes()) == 2
    for folder in ("x", "y"):
        with pytest.raises(DataError, match=f"{folder}/a.txt"):
            check_not_calibrated(tmp_path / folder / "a.txt", both.sha256())


# Parquet


def parquet(path: Path, rows: list[str | None], **columns: list) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"id": list(range(len(rows))), "text": rows, **columns}), path, row_group_size=100)
    return path


def test_parquet_is_read_like_jsonl(tmp_path):
    docs = ["Zwölf\nBoxkämpfer", " ", *[words(5, i) for i in range(700)]]
    plain = jsonl(tmp_path / "a.jsonl", docs)
    assert read_text(parquet(tmp_path / "a.parquet", docs)) == read_text(plain)
    with pytest.raises(DataError, match="sampled passages were calibrated on"):
        check_not_calibrated(tmp_path / "a.parquet", {}, text(plain).hashes())


def test_bad_parquet_files(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    for table, message in [
        ({"body": ["x"]}, 'has no column "text"; columns: body'),
        ({"text": ["x"] * 300 + [None]}, r'row 301: has no string under "text"; the column is string'),
        ({"text": [3]}, "row 1: has no string .*the column is int64"),
        ({"text": [b"\xff"]}, "row 1: has no string .*the column is binary"),
        ({"text": pa.array([], pa.string())}, "holds no text"),
    ]:
        pq.write_table(pa.table(table), file)
        with pytest.raises(DataError, match=message):
            read_text(file)
    file.write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match="no parquet file or is damaged"):
        read_text(file)
    pq.write_table(pa.table({"text": ["a" * (1 << 22)]}), file)
    assert file.stat().st_size < 1 << 20
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 22))
    with pytest.raises(DataError, match=f"bytes that become more than {1 << 20}"):
        read_text(file)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="needs the pyarrow package"):
        read_text(file)


def test_a_parquet_file_that_is_damaged_anywhere_is_text_or_a_typed_error(tmp_path):
    whole = parquet(tmp_path / "a.parquet", [words(6, i) for i in range(40)]).read_bytes()
    refused, file = 0, tmp_path / "b.parquet"
    for at in range(0, len(whole), 7):
        for bad in (whole[:at], whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]):
            file.write_bytes(bad)
            try:
                assert read_text(file)
            except DataError:
                refused += 1
    assert refused > len(whole) // 7


@pytest.mark.parametrize(("length", "behind"), [(128, 0), (128, 3), (8, 0), (2, 1), (2, 3)])
def test_repeated_stretches(length, behind):
    plain = torch.arange(20 * length).view(20, length)
    rows = repeat_stretches(plain, 0.25, behind=behind)
    assert torch.equal(rows, repeat_stretches(plain, 0.25, behind=behind))
    assert torch.equal(rows[:7], repeat_stretches(plain[:7], 0.25, behind=behind))
    copied = rows != plain
    for row, own, there in zip(rows, plain, copied, strict=True):
        assert set(row.tolist()) <= set(own.tolist())
        assert (row <= own).all() and not there[:behind].any()
    if length == 128:
        assert 0.15 < copied.float().mean() < 0.25  # overlaps take some
        assert (rows.diff()[copied[:, 1:]] == 1).float().mean() > 0.9  # in stretches
    assert torch.equal(repeat_stretches(plain, 0.0), plain)


def test_repeats_are_in_all_rows_alike(files):
    tokenizer, own = Eos(), text(*files)
    again = CalibrationText.of([str(f) for f in files], default=DEFAULT, repeats=0.25)
    assert own.identity() == again.identity()[:2] != again.identity()
    first, (rows, counts) = again.sequences(tokenizer, count=40, length=64), again.rows(tokenizer, length=64)
    assert torch.equal(first, rows[:40]) and not torch.equal(first, own.sequences(tokenizer, count=40, length=64))
    assert torch.equal(counts, own.rows(tokenizer, length=64)[1])


def test_a_row_that_is_filled_up_has_no_repeats(tmp_path):
    """Copies of padding would count as text."""
    (tmp_path / "a.txt").write_text("abcdefghijklmnop" * 5)
    own, again = (CalibrationText.of(str(tmp_path / "a.txt"), default=DEFAULT, repeats=r) for r in (0.0, 0.5))
    (plain, _), (rows, _) = (text.rows(ByteTokenizer(), length=64) for text in (own, again))
    assert plain[1].tolist() == [*b"abcdefghijklmnop", *[0] * 48]
    assert torch.equal(rows[1], plain[1]) and not torch.equal(rows[0], plain[0])


@pytest.mark.parametrize(
    ("sequences", "length", "hint"),
    [(60, 64, "--calib-sequences 17, or "), (8, 300, "--calib-length 100, or "), (3, 512, "--calib-length 145, or ")],
)
def test_what_is_suggested_for_a_short_text_fits(sequences, length, hint, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("a" * 1600)
    with pytest.raises(DataError) as e:
        text(file).sequences(ByteTokenizer(), count=sequences + 8, length=length, holdout=8)
    assert f"{sequences} to train on + 8 held out (calib.holdout)" in e.value.what
    assert e.value.hint.startswith(hint)
    assert e.value.hint.endswith(f", or {(sequences + 8) * length - 1600} more tokens of text")
    option, number = hint.split()[0], int(hint.split()[1].strip(","))
    rows, length = (number + 8, length) if option == "--calib-sequences" else (sequences + 8, number)
    assert text(file).sequences(ByteTokenizer(), count=rows, length=length, holdout=8).shape == (rows, length)
    file.write_text("a" * 30)
    with pytest.raises(DataError, match=r"Try: 370 more tokens of text$"):
        text(file).sequences(ByteTokenizer(), count=10, length=40, holdout=8)
    file.write_text("a" * 100)
    with pytest.raises(DataError, match=r"Try: --calib-sequences 2 --calib-length 10, or 2780 more"):
        text(file).sequences(ByteTokenizer(), count=72, length=40, holdout=8)
    assert text(file).sequences(ByteTokenizer(), count=10, length=10, holdout=8).shape == (10, 10)


def test_what_is_too_short_for_any_tokenizer_is_seen_before_there_is_one(tmp_path):
    file = tmp_path / "short.txt"
    for written, most in (("a" * 100, 100), ("\ufdfa", 41)):  # NFKC makes 18 characters, 33 bytes, of the last
        file.write_text(written, encoding="utf-8")
        text(file).check_enough(count=2, length=most // 2 + 2, holdout=1)
        with pytest.raises(DataError, match=f"has at most about {most} tokens, but 2 sequences"):
            text(file).check_enough(count=2, length=most // 2 + 3, holdout=1)
