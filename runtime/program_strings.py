"""Text in an exported program that could become code when it is loaded.

torch.export.load hands symbolic expressions to sympy, which evaluates them as Python, and puts names into source that
it compiles. So an archive without any pickle could still run code. Only text of the shapes that torch itself writes is
let through.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from tcal_compiler.passes.json_text import TABLES, read_json, too_much

_NAME = re.compile(r"[\w.:+\-]*")  # names, paths of parameters, devices, versions
_SPEC = re.compile(r"[\w\s.:+\-,\[\]{}\"\\]*")  # a pytree: JSON inside a string, without anything that can be called
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
_MOST_NODES = 10_000
_OPERATORS = (ast.boolop, ast.operator, ast.unaryop, ast.cmpop)
_NODES = (ast.Expression, ast.Constant, ast.Tuple, ast.UnaryOp, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult)


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


def is_plain_guard(text: str) -> bool:
    """Whether text only compares sizes of inputs, such as L['ids'].size()[1] == L['position_ids'].size()[1].

    The least or greatest of some is written as min(...) or max(...).
    """
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    plain = (ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Subscript, ast.Load, *_OPERATORS)
    for node in nodes:
        if isinstance(node, ast.Call):
            known = isinstance(node.func, ast.Name) and node.func.id in _LEAST
            ok = not node.keywords and (known or (isinstance(node.func, ast.Attribute) and not node.args))
        elif isinstance(node, ast.Attribute):
            ok = node.attr in ("size", "dim")
        elif isinstance(node, ast.Name):
            ok = node.id == "L" or node.id in _LEAST
        elif isinstance(node, ast.Constant):
            ok = isinstance(node.value, int) or (isinstance(node.value, str) and bool(_SYMBOL.fullmatch(node.value)))
        else:
            ok = isinstance(node, plain) and not isinstance(node, ast.Pow)
        if not ok:
            return False
    return len(nodes) <= _MOST_NODES


def is_plain_expression(text: str) -> bool:
    """Whether text is made of numbers, symbols and sympy's arithmetic alone, as sympy's srepr writes it."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if len(nodes) > _MOST_NODES:
        return False
    for node in nodes:
        if isinstance(node, ast.Call):
            ok = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        elif isinstance(node, ast.Name):
            ok = node.id in _FUNCTIONS or node.id in _NAMES or bool(re.fullmatch(r"[szuf]+\d+", node.id))
        elif isinstance(node, ast.keyword):
            ok = node.arg is not None and isinstance(node.value, ast.Constant | ast.Name)
        elif isinstance(node, ast.Constant):
            ok = not isinstance(node.value, str) or bool(re.fullmatch(r"\w*|[\d.e+\-]+", node.value))
        else:
            ok = isinstance(node, (*_NODES, ast.Load))
        if not ok:
            return False
    return True
