"""Views of a tensor, and how what is written to one gets into the tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

_END = 2**63 - 1
"""How a slice says that it goes to the end."""

CASTS = frozenset({
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
    aten.detach_.default,
})  # fmt: skip
"""Ops that give back their argument, or a copy of it in another dtype."""

Call = tuple[Any, tuple[Any, ...]]
Back = Callable[[Node, Node], Node | Call]


@dataclass(frozen=True)
class View:
    """What a node shows of another one's storage."""

    of: Node
    target: Any
    """The op that shows it, and its arguments behind the tensor; ``None`` where the view is the
    tensor itself."""
    args: tuple[Any, ...]
    back: Back | None
    """Of what the tensor held and what the view shall show, what the tensor holds then: a node, or
    a call that makes it. ``None`` where nothing can be written through the view."""


def view_of(node: Node) -> View | None:
    """What a node is a view of; ``None`` where it is none, or one of a kind that is not known."""
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, Node) or node.kwargs:
        return None
    if _is_argument(node):
        return View(source, None, (), _of_alias(source, ()))
    if node.target is operator.getitem:
        return _piece(source, node.args[1])
    if node.target not in _BACK:
        return None
    rest = tuple(node.args[1:])
    return View(source, node.target, rest, _BACK[node.target](source, rest))


def only_casts(node: Node) -> bool:
    """Whether one of ``CASTS`` stays on the device, so that it copies for another dtype alone."""
    source = node.args[0]
    if not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.device == after.device and before.layout == after.layout


def _is_argument(node: Node) -> bool:
    """Whether an op gives back its argument."""
    if node.target not in CASTS or len(node.args) > 2 or not only_casts(node):
        return False
    dtypes = {each.meta["val"].dtype for each in (node, node.args[0]) if isinstance(each, Node)}
    return len(dtypes) == 1


def _piece(several: Node, place: Any) -> View | None:
    """One of what ``split`` or ``unbind`` returns, as the slice that it is."""
    source, *rest = several.args or (None,)
    if not isinstance(source, Node) or several.kwargs:
        return None
    if several.target is aten.unbind.int:
        args: tuple[Any, ...] = (*(*rest, 0)[:1], place)
        return View(source, aten.select.int, args, _of_select(source, args))
    if several.target not in (aten.split.Tensor, aten.split_with_sizes.default):
        return None
    sizes, axis = (*rest, 0)[:2]
    if isinstance(sizes, int):
        bounds: tuple[Any, Any] = place * sizes, (place + 1) * sizes
    elif isinstance(sizes, Sequence) and all(isinstance(size, int) for size in sizes):
        bounds = sum(sizes[:place]), sum(sizes[: place + 1])
    else:
        return None
    args = (axis, *bounds)
    return View(source, aten.slice.Tensor, args, _of_slice(source, args))


def _of_slice(source: Node, args: tuple[Any, ...]) -> Back:
    return lambda held, value: (aten.slice_scatter.default, (held, value, *args))


def _of_select(source: Node, args: tuple[Any, ...]) -> Back:
    return lambda held, value: (aten.select_scatter.default, (held, value, *args))


def _of_transpose(source: Node, args: tuple[Any, ...]) -> Back:
    return lambda held, value: (aten.transpose.int, (value, *args))


def _of_permute(source: Node, args: tuple[Any, ...]) -> Back:
    (axes,) = args
    order = [axis % len(axes) for axis in axes]
    back = [order.index(axis) for axis in range(len(order))]
    return lambda held, value: (aten.permute.default, (value, back))


def _of_unsqueeze(source: Node, args: tuple[Any, ...]) -> Back:
    return lambda held, value: (aten.squeeze.dim, (value, *args))


def _of_squeeze(source: Node, args: tuple[Any, ...]) -> Back | None:
    size = source.meta["val"].shape[args[0]] if source.meta["val"].dim() else 0
    if not isinstance(size, int):
        return None
    if size != 1:
        return lambda held, value: value
    return lambda held, value: (aten.unsqueeze.default, (value, *args))


def _of_view(source: Node, args: tuple[Any, ...]) -> Back:
    return lambda held, value: (aten.view_as.default, (value, held))


def _of_alias(source: Node, args: tuple[Any, ...]) -> Back:
    return lambda held, value: value


def _of_expand(source: Node, args: tuple[Any, ...]) -> None:
    return None


_BACK: dict[Any, Callable[[Node, tuple[Any, ...]], Back | None]] = {
    aten.slice.Tensor: _of_slice,
    aten.select.int: _of_select,
    aten.transpose.int: _of_transpose,
    aten.permute.default: _of_permute,
    aten.unsqueeze.default: _of_unsqueeze,
    aten.squeeze.dim: _of_squeeze,
    aten.view.default: _of_view,
    aten.detach.default: _of_alias,
    aten.alias.default: _of_alias,
    aten.expand.default: _of_expand,
}
"""Ops whose result is a view of their first argument for all inputs."""


def filled(target: Any, args: tuple[Any, ...]) -> tuple[list[Node], int] | None:
    """slice_scatter(slice_scatter(x, a, d, 0, n), b, d, n) => cat([a, b], d)

    The arguments of ``cat`` where a call of ``slice_scatter`` fills the last part of a tensor all
    of which is written to; ``None`` for others.
    """
    parts: dict[int, tuple[int, Node]] = {}
    axes: set[int] = set()
    held: Any = None
    while target is aten.slice_scatter.default:
        call: list[Any] = [*args, *(0, None, None, 1)[len(args) - 2 :]]
        held, value, axis, start, end, step = call
        axes.add(axis % held.meta["val"].dim())
        start, end = start or 0, _END if end is None else end
        if not isinstance(start, int) or not isinstance(end, int) or step != 1 or len(axes) > 1:
            return None
        if not 0 <= start < end:  # counted from the end, or of nothing
            return None
        if any(start < last and first < end for first, (last, _) in parts.items()):
            return None
        parts[start] = end, value
        joined = _joined(parts, held.meta["val"].shape[axis])
        if joined is not None:
            return joined, axis
        target, args = held.target, held.args
    return None


def _joined(parts: dict[int, tuple[int, Node]], size: Any) -> list[Node] | None:
    """The parts by their order, if they follow each other from the beginning to the end."""
    reached, values = 0, []
    while reached in parts:
        reached, value = parts[reached]
        values.append(value)
    whole = reached == _END or (isinstance(size, int) and reached >= size)
    return values if whole and len(values) == len(parts) else None


def expansion(before: tuple[Any, ...], after: tuple[Any, ...]) -> list[int] | None:
    """The sizes by which ``expand`` makes one shape of the other, as far as they are numbers."""
    kept: list[Any] = [*[None] * (len(after) - len(before)), *before]
    sizes = [-1 if str(own) == str(size) else size for own, size in zip(kept, after, strict=True)]
    return sizes if all(isinstance(size, int) for size in sizes) else None
