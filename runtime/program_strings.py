"""Text in an exported program that could become code when it is loaded.

torch.export.load hands symbolic expressions to sympy, which evaluates them as Python, and puts names into source that
it compiles. So an archive without any pickle could still run code. Only text of the shapes that torch itself writes is
let through.
"""

from __future__ import annotations

import ast
import math
import re
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from tcal_compiler.passes.json_text import TABLES, read_json, too_much

_NAME = re.compile(r"[\w.:+\-]*")  # names, paths of parameters, devices, versions
# A pytree: JSON in a string, no call, no escaped letter; without backtracking, which takes memory.
_SPEC = re.compile(r"([\w\s.:+\-,\[\]{}\"]++|\\++(?=\"))*+")
_GUARD = re.compile(r"[\w .,'()\[\]<>=!+\-*/%&|]*")  # no comment, and one line
_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_OPERATOR = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?")
_ON_SIZES = re.compile(
    r"""torch\._?sym_\w+ | math\.(trunc|ceil|floor|sqrt)
    | _operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift)""",
    re.VERBOSE,
)
_FILES = ("torch.ops.aten.from_file", "torch.ops.aten.save")  # operators that open a file by name
_FREE = {"metadata", "as_string", "as_strings"}  # notes for people, and arguments, which are quoted
_FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        """Symbol Dummy Integer Float Rational Add Mul Pow Mod Max Min Abs Eq Ne Lt Le Gt Ge Equality Unequality And Or
        Not StrictLessThan LessThan StrictGreaterThan GreaterThan Piecewise ExprCondPair floor ceiling sqrt log
        FloorDiv CeilDiv CleanDiv ModularIndexing PythonMod IntTrueDiv FloatTrueDiv FloatPow PowByNatural Where
        CeilToInt FloorToInt TruncToInt TruncToFloat RoundToInt RoundDecimal ToFloat Identity LShift RShift
        IsNonOverlappingAndDenseIndicator""",
    )
)
_NAMES = {"true", "false", "oo", "int_oo", "zoo", "True", "False"}
_LEAST = ("min", "max")
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift", "RShift", "RoundDecimal")  # by their last argument
_MOST_NODES, _MOST_TEXT = 10_000, 200_000
_MOST_TERMS, _MOST_BITS = 1000, 1 << 20  # of what sympy might multiply out
_LARGEST, _LARGEST_POWER = 1 << 64, 64
_NUMBERS = {"Symbol": 1, "Dummy": 1, "Integer": 1, "Float": 1, "Rational": 2}  # and how many values make one
_NUMBER = re.compile(r"-?(\d{1,40}(\.\d{0,40})?(e[+-]?\d{1,3})?)|([A-Za-z_]\w{0,99})?")
_PLAIN_GUARD = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.Not, ast.Compare, ast.cmpop, ast.Load),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.UnaryOp, ast.USub, ast.UAdd),
)
_NODES = (ast.Expression, ast.Constant, ast.UnaryOp, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult)


def unsafe_text(content: bytes) -> list[str]:
    """Places in a JSON entry of a program's archive, with their text, that torch would never write.

    Raises:
        ValueError: it is not JSON, or JSON that takes far more memory than a program's. RecursionError: it is nested
            too deeply.
    """
    found: list[str] = []
    _walk(read_json(content, times=TABLES), "", found)
    return found


def _walk(value: Any, key: str, found: list[str]) -> None:
    if isinstance(value, dict):
        for k, v in value.items():
            if not _NAME.fullmatch(k):
                found.append(f"key {k[:80]!r}")
            if k not in _FREE:
                _walk(v, k, found)
    elif isinstance(value, list):
        for v in value:
            _walk(v, key, found)
    elif isinstance(value, str) and not _harmless(key, value):
        found.append(f"{key} {value[:80]!r}")


def _harmless(key: str, text: str) -> bool:
    if key == "expr_str":
        return is_plain_expression(text)
    if key == "guards_code":
        return is_plain_guard(text)
    if key in ("in_spec", "out_spec"):
        plain = "__enum__" not in text and bool(_SPEC.fullmatch(text))
        return plain and not too_much(text.encode(), times=TABLES)
    if key in ("target", "as_operator"):
        return bool(_ON_SIZES.fullmatch(text)) or is_operator(text)
    if key == "forward_arg_names":
        return bool(_SYMBOL.fullmatch(text))
    return bool(_NAME.fullmatch(text))


def is_operator(text: str) -> bool:
    """Whether text names an operator, or none that is registered here; torch would call any function of torch.ops."""
    if not _OPERATOR.fullmatch(text) or text.startswith(_FILES):
        return False
    found: Any = torch
    for name in text.split(".")[1:]:
        found = getattr(found, name, None)
    return found is None or isinstance(found, OpOverload | HigherOrderOperator)


def _nodes(text: str) -> list[ast.AST]:
    """All nodes of an expression; none where it cannot be read, or is longer than any that torch writes."""
    if len(text) > _MOST_TEXT:
        return []
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return nodes if len(nodes) <= _MOST_NODES else []


def is_plain_guard(text: str) -> bool:
    """Whether text only compares sizes of inputs, such as L['ids'].size()[1] == L['position_ids'].size()[1].

    The least or greatest of some is written as min(...) or max(...).
    """
    nodes = _nodes(text) if _GUARD.fullmatch(text) else []
    names = {id(n.slice) for n in nodes if isinstance(n, ast.Subscript)}  # text stands nowhere else
    return bool(nodes) and all(_in_guard(n, id(n) in names) for n in nodes)


def _in_guard(node: ast.AST, is_name: bool) -> bool:
    if isinstance(node, ast.Call):
        least = isinstance(node.func, ast.Name) and node.func.id in _LEAST and len(node.args) > 1
        return not node.keywords and (least or (isinstance(node.func, ast.Attribute) and not node.args))
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant)
    if isinstance(node, ast.Attribute):
        return node.attr in ("size", "dim")
    if isinstance(node, ast.Name):
        return node.id == "L" or node.id in _LEAST
    if isinstance(node, ast.Constant):
        name = is_name and isinstance(node.value, str) and bool(_SYMBOL.fullmatch(node.value))
        return name or (isinstance(node.value, int) and node.value < _LARGEST)
    return isinstance(node, _PLAIN_GUARD)


def is_plain_expression(text: str) -> bool:
    """Whether text is made of numbers, symbols and sympy's arithmetic alone, as sympy's srepr writes it, and nothing
    that it would compute is large."""
    nodes = _nodes(text)
    if not nodes or not all(map(_in_expression, nodes)):
        return False
    try:
        _extent(nodes[0].body)  # type: ignore[attr-defined]
    except (ValueError, RecursionError):
        return False
    return True


def _in_expression(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or node.id in _NAMES or bool(re.fullmatch(r"[szuf]+\d+", node.id))
    if isinstance(node, ast.keyword):
        value = node.value
        small = isinstance(value, ast.Constant) and (not isinstance(value.value, int | float) or 0 <= value.value < 999)
        return node.arg is not None and (small or isinstance(value, ast.Name))
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return bool(_NUMBER.fullmatch(node.value))
        return isinstance(node.value, float) or (isinstance(node.value, int) and node.value < _LARGEST)
    return isinstance(node, (*_NODES, ast.Load))


def _extent(node: ast.AST) -> tuple[int, int]:
    """Upper bounds of the terms that an expression has when it is multiplied out, and of the bits of its numbers.

    Raises ValueError where they are large, or not known.
    """
    if isinstance(node, ast.UnaryOp):
        return _extent(node.operand)
    if isinstance(node, ast.Name):
        return 1, 1
    if isinstance(node, ast.Constant) and not isinstance(node.value, str):
        return 1, _bits(node)
    if isinstance(node, ast.BinOp):
        name, parts = "Mul" if isinstance(node.op, ast.Mult) else "Add", [node.left, node.right]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, parts = node.func.id, node.args
        if name in _NUMBERS:
            if len(parts) > _NUMBERS[name] or not all(isinstance(p, ast.Constant | ast.UnaryOp) for p in parts):
                raise ValueError(name)
            return 1, sum(map(_bits, parts))
    else:
        raise ValueError(type(node).__name__)
    power = _power(parts[-1]) if name in _POWERS and parts else 1
    extents = [_extent(p) for p in parts]
    terms, bits = [max(t, 1) for t, _ in extents], power * sum(b for _, b in extents)
    most = math.prod(terms) if name == "Mul" else sum(terms)
    if most**power > _MOST_TERMS or bits > _MOST_BITS:
        raise ValueError(name)
    return most**power, bits


def _bits(node: ast.AST) -> int:
    """Of a number that is written out, with its sign or without."""
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    if not isinstance(inner, ast.Constant):
        raise ValueError(type(inner).__name__)
    return 64 if isinstance(inner.value, int) else 4096


def _power(node: ast.AST) -> int:
    """How often an exponent multiplies: once where it is a symbol, which sympy leaves as it is."""
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if isinstance(node, ast.Name) or called in ("Symbol", "Dummy"):
        return 1
    number = node.args[0] if isinstance(node, ast.Call) and node.args and called in _NUMBERS else node
    number = number.operand if isinstance(number, ast.UnaryOp) else number
    value = float(number.value) if isinstance(number, ast.Constant) else math.inf  # type: ignore[arg-type]
    if not abs(value) <= _LARGEST_POWER:
        raise ValueError(value)
    return max(1, math.ceil(abs(value)))
