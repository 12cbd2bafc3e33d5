"""Which patch each token of an image is, where they enter a text in another order than the tower's,
and which patches, where several are one token.

LLaVA-NeXT puts the patches of an image's crops together as one raster and writes a newline behind
each of its rows; Qwen2-VL makes one token of a square of patches, and those of Qwen2.5-VL are in
the order of windows. Read off the graph: what only moves features is done to their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..core.types import Dim
from ..core.view import Node, Operand, Value, View, is_value
from ..vocab import traits

Numbers = NDArray[np.int32]
NO_PATCH = -1
Members = tuple[tuple[int, ...], ...]
_RESHAPING = ("reshape", "squeeze", "unsqueeze", "cast", "identity")
_NORMS = ("layer_norm", "rms_norm")


def token_layout(
    view: View, path: Sequence[Node], features: Value, pictures: int, patches: int
) -> tuple[int, ...]:
    """For each token of one image its patch, numbered through the pictures; ``NO_PATCH`` for what
    is none. Empty where the graph does not tell.

    ``path`` are the nodes from the tower to ``features``, ``[images, tokens, width]``.
    """
    whole = [node for node in path if _sizes(view, view.results(node)[0])[:2] == (pictures, patches)
             and view.type(view.results(node)[0]).rank == 3]  # fmt: skip
    if not whole:
        return ()
    value = view.results(whole[-1])[0]
    numbers = np.arange(pictures * patches, dtype=np.int32).reshape(pictures, patches, 1)
    known: dict[Value, Numbers] = {value: np.broadcast_to(numbers, _sizes(view, value))}
    for node in path[path.index(whole[-1]) + 1 :]:
        if features in known:
            break
        moved = _moved(view, node, known)
        if moved is None:
            return ()
        known[view.result(node)] = moved
    if features not in known or known[features].ndim != 3 or len(known[features]) != 1:
        return ()
    return tuple(known[features][0, :, 0].tolist())


def merged_patches(
    view: View, path: Sequence[Node], whole: Value, features: Value, *, cls_token: bool
) -> Members:
    """For each token of one picture the patches of the tower that it is made of, ascending. Empty
    where the graph does not tell, and where tokens share patches, leave some out, or are not made
    of as many.

    ``whole`` ``[images, patches, width]`` is what the tower gives, ``path`` are the nodes from
    there to ``features``, ``[images, tokens, width]``. A linear mixes what lies in a row.
    """
    sizes = _sizes(view, whole)
    if len(sizes) != 3:
        return ()
    groups: list[frozenset[int]] = [frozenset({i - cls_token}) for i in range(sizes[1])]
    numbers = np.arange(sizes[1], dtype=np.int32).reshape(1, -1, 1)
    known: dict[Value, Numbers] = {whole: np.broadcast_to(numbers, sizes)}
    for node in path:
        if features in known:
            break
        kept = _kept_rows(view, node, known)
        moved = _mixed(view, node, known, groups) if kept is None else kept
        if moved is None:
            return ()
        known[view.results(node)[0]] = moved
    rows = known[features][0] if features in known else None
    if rows is None or rows.ndim != 2 or (rows != rows[:, :1]).any():
        return ()
    members = [sorted(groups[number]) for number in rows[:, 0]]
    every = sorted(patch for token in members for patch in token)
    equal = len(set(map(len, members))) == 1 and every == [*range(sizes[1] - cls_token)]
    return tuple(map(tuple, members)) if equal else ()


def _kept_rows(view: View, node: Node, known: dict[Value, Numbers]) -> Numbers | None:
    """The numbers of what moves features, or changes them each by itself or within its row."""
    op, first = view.op(node), view.operands(node)[0]
    if op in _NORMS or traits(op).activation:
        return known.get(first) if is_value(first) else None
    return None if op == "concat" else _moved(view, node, known)


def _mixed(
    view: View, node: Node, known: dict[Value, Numbers], groups: list[frozenset[int]]
) -> Numbers | None:
    """The numbers behind a linear, each of a new group: what lay in its row."""
    sizes, first = _sizes(view, view.results(node)[0]), view.operands(node)[0]
    if not traits(view.op(node)).is_linear or not sizes or not is_value(first):
        return None
    if first not in known:
        return None
    rows = known[first].reshape(-1, known[first].shape[-1])
    start = len(groups)
    groups += [frozenset().union(*(groups[n] for n in np.unique(row))) for row in rows]
    made = np.arange(start, len(groups), dtype=np.int32).reshape(*sizes[:-1], 1)
    return np.broadcast_to(made, sizes)


def squares(members: Members, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of tokens, where each is a square of a ``grid`` of patches, row by row."""
    side = math.isqrt(len(members[0]))
    rows, columns = grid[0] // side, grid[1] // side
    numbers = np.arange(grid[0] * grid[1]).reshape(grid)[: rows * side, : columns * side]
    apart = numbers.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side * side)
    return (rows, columns) if [*map(tuple, apart.tolist())] == [*members] else None


def _moved(view: View, node: Node, known: dict[Value, Numbers]) -> Numbers | None:
    """The numbers of a node's result; ``None`` where it does more than move them."""
    op, attrs, first = view.op(node), view.attrs(node), view.operands(node)[0]
    sizes = _sizes(view, view.results(node)[0])
    if not sizes:
        return None
    if op == "concat":
        parts = [_known_or_none(view, value, known) for value in view.operands(node)]
        return np.concatenate(parts, attrs["dim"]) if all(p is not None for p in parts) else None  # type: ignore[arg-type]
    if not is_value(first) or first not in known:
        return None
    numbers = known[first]
    if op in _RESHAPING:
        return numbers.reshape(sizes) if math.prod(sizes) == numbers.size else None
    if op == "transpose":
        return numbers.transpose(attrs["perm"])
    if op == "expand":
        return np.broadcast_to(numbers, sizes)
    if op != "slice":
        return None
    start, end = (view.number(operand) for operand in view.operands(node)[1:3])
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    cut = [slice(None)] * numbers.ndim
    cut[attrs["dim"]] = slice(start, end, attrs["step"])
    return numbers[tuple(cut)]


def _known_or_none(view: View, value: Operand, known: dict[Value, Numbers]) -> Numbers | None:
    """The numbers of one of the values that are put together: of no patch, where it is another."""
    if not is_value(value):
        return None
    if value in known:
        return known[value]
    sizes = _sizes(view, value)
    return np.full(sizes, NO_PATCH, dtype=np.int32) if sizes else None


def _sizes(view: View, value: Value) -> tuple[int, ...]:
    """The sizes of a value for one image; empty where they are not known."""
    sizes = [_of_one(dim) for dim in view.type(value).shape or ()]
    return tuple(size for size in sizes if size is not None) if None not in sizes else ()


def _of_one(dim: Dim) -> int | None:
    """``5*images`` is 5, of one image."""
    if isinstance(dim, int):
        return dim
    factors = [factor.strip() for factor in dim.split("*")]
    if not all(factor.isdigit() or factor.isidentifier() for factor in factors):
        return None
    return math.prod(int(factor) for factor in factors if factor.isdigit())
