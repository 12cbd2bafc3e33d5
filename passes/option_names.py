"""The names of a built-in pass's options, read in its source: nothing is imported.

A pass imports what it computes with, and so torch, which takes a second. What a recipe calls its
passes and their options can be told wrong before.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from .recipe_text import option_of, read
from .registry import check_pass_name, source_of


def check_names(text: str) -> None:
    """Refuse what a recipe's text calls a pass or an option, and nothing is called so.

    Raises ``BadInput`` as making the recipe would, which checks values as well, and options of
    passes from other packages.
    """
    for name, options in read(text):
        check_pass_name(name)
        place = source_of(name)
        known = [] if place is None or not options else option_names(*place)
        for written, _ in options if known else ():
            option_of(name, written, known)


def option_names(file: Path, class_name: str) -> list[str]:
    """The fields of a dataclass, in their order, by the source of it and of its bases."""
    return list(dict.fromkeys(_fields(file, class_name)))


def _fields(file: Path, class_name: str) -> Iterator[str]:
    """The last base's first, as dataclasses have them. Bases that are not ours have none."""
    for node in _statements(file):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for base in reversed(node.bases):
                yield from _fields(file, base.id) if isinstance(base, ast.Name) else ()
            yield from _own_fields(node)
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = {alias.name for alias in node.names}
            home = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            if class_name in names:
                yield from _fields(home.with_suffix(".py"), class_name)


def _own_fields(node: ast.ClassDef) -> Iterator[str]:
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return
    for part in node.body:
        if not (isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)):
            continue
        if not ast.unparse(part.annotation).startswith("ClassVar"):
            yield part.target.id


@functools.cache
def _statements(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text()).body if file.is_file() else []
