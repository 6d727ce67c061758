"""JSON that may not become many times its text in memory: what it will take is told before it is parsed."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

FLOOR = 32 << 20  # bytes that any text may take
TABLES = 40  # times their text, for vocabularies and programs: honest ones have up to 33, without a space
TEXTS = 12  # for rows of text: wide characters, several times
_WORST = 200  # no text takes so many times its bytes
_CHARACTERS = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_STRING = re.compile(_CHARACTERS, re.DOTALL)
_SOME = re.compile(rb'(?:[^"]*+' + _CHARACTERS + rb"){1,1000}+", re.DOTALL)  # at a time: each is an object meanwhile
_BEYOND_16_BITS = re.compile(rb"[\xf0-\xf7]")
_SURROGATE = re.compile(rb"\\u[dD][89abAB]")
# Bytes of CPython's objects with what allocators round up, and of tables just after they grew
_LIST, _OBJECT, _ELEMENT, _PAIR, _TEXT = 96, 192, 52, 150, 92


def _counts(text: bytes) -> tuple[Counter[str], int]:
    """Of lists, objects, pairs, commas and strings, and the characters of these together."""
    found, at, inside = Counter[str](), 0, 0
    while at < len(text):
        some = _SOME.match(text, at)
        end = some.end() if some else len(text)
        bare, strings = _STRING.subn(b'""', text[at:end])
        found.update({sign: bare.count(sign.encode()) for sign in "[{:,"} | {'"': strings})
        inside, at = inside + end - at - len(bare) + 2 * strings, end
    return found, inside


def parsed_bytes(text: bytes) -> int:
    """An upper bound of the memory that json.loads takes for UTF-8 text, its decoded text included."""
    decoded = 1 if text.isascii() else 4 if _BEYOND_16_BITS.search(text) else 2
    escaped = 1 if b"\\u" not in text else 4 if _SURROGATE.search(text) else 2
    found, inside = _counts(text)
    lists, objects = found["["], found["{"]
    characters = _TEXT * found['"'] + max(decoded, escaped) * inside
    if max(decoded, escaped) > 1:
        characters += characters // 2 + len(text)  # texts that grow while they are read
    structure = _LIST * lists + _OBJECT * objects + _ELEMENT * (found[","] + lists + objects) + _PAIR * found[":"]
    return decoded * len(text) + structure + characters + (len(text) - inside) // 2  # digits


def too_much(text: bytes, *, times: int = 2, copies: int = 1) -> str:
    """What is wrong with JSON of which so many copies would take more than 32 MiB and `times` its bytes, or ""."""
    most = max(FLOOR, times * len(text))
    if copies * _WORST * len(text) <= most or (needed := copies * parsed_bytes(text)) <= most:
        return ""
    return f"its {len(text)} bytes of JSON would take up to {needed} bytes of memory, more than {most}"


def read_json(text: bytes | str, *, times: int = 2, copies: int = 1) -> Any:
    """json.loads of UTF-8 text that takes no more than max(32 MiB, times * bytes of text) of memory.

    Args:
        times: 2, but for kinds of text whose honest content takes more.
        copies: of what is parsed, that the caller makes.

    Raises:
        ValueError: no JSON, no UTF-8, or it would take more. RecursionError: nested too deeply.
    """
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if wrong := too_much(raw, times=times, copies=copies):
        raise ValueError(wrong)
    return json.loads(raw.decode("utf-8-sig") if isinstance(text, bytes) else text)
