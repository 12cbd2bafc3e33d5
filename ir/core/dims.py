"""Symbolic dimensions as numbers: ``"past + seq"`` where ``past`` is 0 and ``seq`` is 5 is 5."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from .types import Dim, Type
from .view import View

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b, ast.Div: lambda a, b: a / b, ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max, "min": min, "floor": math.floor, "ceil": math.ceil, "ceiling": math.ceil,
}  # fmt: skip


def dim_value(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    """The number that a dimension is; ``None`` where its text holds a name without a size."""
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    tree = _parsed(dim)
    if tree is None:
        return None
    try:
        number = _value(tree, sizes)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    return int(number) if number == math.floor(number) else None


def names_in(dim: Dim) -> list[str]:
    """The names that a dimension is computed of, in their order; text that is not arithmetic is one
    itself, as ``p2o.DynamicDimension.0`` is."""
    if isinstance(dim, int):
        return []
    tree = _parsed(dim)
    parts = [] if tree is None else list(ast.walk(tree))
    if not parts or any(isinstance(part, ast.Attribute) for part in parts):
        return [dim]
    called = {part.func for part in parts if isinstance(part, ast.Call)}
    names = [part for part in parts if isinstance(part, ast.Name) and part not in called]
    return [name.id for name in sorted(names, key=lambda name: (name.lineno, name.col_offset))]


def shape_value(type_: Type, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape in numbers; ``None`` where a dimension is not known."""
    if type_.shape is None:
        return None
    numbers = [dim_value(dim, sizes) for dim in type_.shape]
    known = [number for number in numbers if number is not None]
    return tuple(known) if len(known) == len(numbers) else None


def sizes_of(view: View, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes of the graph's symbolic dimensions where its inputs, by name, have these shapes."""
    sizes: dict[str, int] = {}
    for name, value in zip(view.input_names(), view.inputs(), strict=True):
        dims = view.type(value).shape or ()
        for dim, size in zip(dims, shapes.get(name, ()), strict=False):
            if isinstance(dim, str):
                sizes.setdefault(dim, size)
    return sizes


@cache
def _parsed(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return None


def _value(tree: ast.expr, sizes: Mapping[str, int]) -> Any:
    """Raises ``KeyError`` for an unknown name, ``ValueError`` for anything but arithmetic."""
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.BinOp):
        return _BINARY[type(tree.op)](_value(tree.left, sizes), _value(tree.right, sizes))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_value(tree.operand, sizes)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        function = _FUNCTIONS[tree.func.id.lower()]
        return function(*(_value(argument, sizes) for argument in tree.args))
    raise ValueError(f"{ast.dump(tree)} is not arithmetic")
