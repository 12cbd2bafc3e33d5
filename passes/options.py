"""The options of a pass, which are its fields: their types, and what its source says of each."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from ..ir.core.errors import BadInput


def check_types(pass_: Any) -> None:
    """Raise ``BadInput`` where a pass made in Python has an option of another type than its field:
    ``Quantize(bits="4")``. A recipe's texts are converted before."""
    hints = typing.get_type_hints(type(pass_))
    for field in dataclasses.fields(pass_):
        value, hint = getattr(pass_, field.name), hints[field.name]
        if not any(_fits(value, kind) for kind in _kinds(hint)):
            raise BadInput(
                f"{pass_.name}: {field.name}={value!r} ({type(value).__name__}) is wrong: it takes "
                f"{type_text(hint)}"
            )


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union; another type alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return any(value == known and type(value) is type(known) for known in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(isinstance(part, str) for part in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def type_text(hint: Any) -> str:
    """``int``, ``als|adam``, ``[globs]``; that an option may be left empty is not said."""
    return "|".join(_kind_text(kind) for kind in _kinds(hint) if kind is not type(None))


def _kind_text(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(str(known) for known in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "[globs]"
    return str(getattr(kind, "__name__", kind))


FEW = 4
"""Choices of an option that are told with its name; of others what it is for tells them."""


def option_text(field: dataclasses.Field[Any], hint: Any) -> str:
    """An option as a recipe writes it, at its default: ``bits=4``; the choices where there are few,
    that one first, ``solver=als|adam``; the type where there is none, ``rank=int``."""
    takes = type_text(hint)
    if field.default in (dataclasses.MISSING, None, ()):
        return f"{field.name}={takes}"
    default = str(field.default)
    choices = sorted(takes.split("|"), key=lambda choice: choice != default)
    if 1 < len(choices) <= FEW:
        return f"{field.name}={'|'.join(choices)}"
    return f"{field.name}={default.lower() if isinstance(field.default, bool) else default}"


def purposes(kind: type) -> dict[str, str]:
    """What the options of a pass are for: the docstring below each field, a subclass's first."""
    texts: dict[str, str] = {}
    for base in kind.__mro__:
        if dataclasses.is_dataclass(base):
            texts = {**dict(_documented(base)), **texts}
    return texts


def _documented(kind: type) -> Iterator[tuple[str, str]]:
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):  # made at run time, or shipped without its source
        return
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for field, text in itertools.pairwise(body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            yield field.target.id, " ".join(str(text.value.value).split())
