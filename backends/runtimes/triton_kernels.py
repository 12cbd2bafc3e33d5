"""Which nodes our kernels take, and why they do not take the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.core.types import DTYPE_NAMES
from ...ir.core.view import Node, Operand, Value, View, is_value
from ...ir.vocab import declared, spec
from ...kernels.registry import HALF_AND_SINGLE, Kernel, kernel_of

NEEDED_COMPUTE = (8, 0)
"""The least compute capability: bfloat16 and asynchronous copies begin there."""


@dataclass(frozen=True)
class Bound:
    """A call of a kernel that stands for a node."""

    kernel: Callable[..., Any]
    operands: tuple[Operand, ...]
    attrs: Mapping[str, Any]


@dataclass(frozen=True)
class Fallback:
    """A node that runs by its op's reference, and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class Binding:
    """What the kernels take of a graph."""

    bound: Mapping[Node, Bound]
    absorbed: frozenset[Node]
    """Nodes that a kernel bound to another node computes along."""
    fallbacks: tuple[Fallback, ...]


def bind_kernels(view: View, compute: tuple[int, int] | None) -> Binding:
    """Bind our ops, and the additions of low-rank paths to them, to kernels.

    ``compute`` is the device's compute capability; ``None`` for the interpreter, which has none.
    """
    bound: dict[Node, Bound] = {}
    fallbacks = []
    for node in view.nodes():
        op = declared(view.op(node))
        if op is None or not op.own:
            continue
        kernel = kernel_of(op.name)
        reason = _reason_against(view, node, kernel, compute)
        if kernel is None or reason is not None:
            fallbacks.append(Fallback(view.name(node), op.name, reason or _NO_KERNEL))
            continue
        bound[node] = Bound(kernel.function, view.operands(node), dict(view.attrs(node)))
    absorbed = {
        n for add, parts in _low_rank_sums(view, bound) for n in _fuse(view, bound, add, parts)
    }
    return Binding(bound, frozenset(absorbed), tuple(fallbacks))


_NO_KERNEL = "it has no kernel"


def _reason_against(
    view: View, node: Node, kernel: Kernel | None, compute: tuple[int, int] | None
) -> str | None:
    if kernel is None:
        return _NO_KERNEL
    if compute is not None and compute < NEEDED_COMPUTE:
        return (
            f"the kernels need compute capability {_version(NEEDED_COMPUTE)}, "
            f"this device has {_version(compute)}"
        )
    for name, taken in kernel.attrs.items():
        value = view.attrs(node)[name]
        if value not in taken:
            return f"{name}={value}: its kernel takes {', '.join(map(str, taken))}"
    types = [view.type(o) for o in view.operands(node) if is_value(o)]
    first = types[0]
    if kernel.dtypes and first.dtype not in kernel.dtypes:
        names = ", ".join(DTYPE_NAMES[d] for d in kernel.dtypes)
        return f"its input is {first}: its kernel takes {names}"
    if kernel.ranks and first.rank not in kernel.ranks:
        return f"its input is {first}: its kernel takes up to {kernel.ranks[-1]} dimensions"
    if kernel.one_dtype and len({t.dtype for t in types}) > 1:
        return f"its operands are {', '.join(map(str, types))}: its kernel takes one dtype"
    return None


def _version(compute: tuple[int, int]) -> str:
    return f"{compute[0]}.{compute[1]}"


# --- low-rank paths ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """``add(main(x, ...), linear(narrow, up))``; the two nodes go into one kernel."""

    main: Node
    side: Node
    narrow: Value
    up: Value


def _low_rank_sums(view: View, bound: Mapping[Node, Bound]) -> Iterator[tuple[Node, _Parts]]:
    for node in [n for n in view.nodes() if view.op(n) == "add"]:
        parts = _parts(view, node, bound)
        if parts is not None:
            yield node, parts


def _parts(view: View, add: Node, bound: Mapping[Node, Bound]) -> _Parts | None:
    a, b = view.operands(add)
    if not is_value(a) or not is_value(b):
        return None
    for total, path in ((a, b), (b, a)):
        main, side = view.producer(total), view.producer(path)
        if main is None or side is None or main not in bound:
            continue
        if _fused(view, main) is None or view.op(side) != "linear":
            continue
        if not (_only_here(view, total, add) and _only_here(view, path, add)):
            continue
        plain = len(view.operands(side)) == 2
        if plain and view.type(path) == view.type(total):
            return _Parts(main, side, view.tensor(side), _uncast(view, view.tensor(side, 1)))
    return None


def _only_here(view: View, value: Value, node: Node) -> bool:
    return view.users(value) == (node,) and not view.is_output(value)


def _uncast(view: View, value: Value) -> Value:
    """A factor in the dtype that it is stored in: the kernel widens it on the way."""
    node = view.producer(value)
    if node is None or view.op(node) != "cast":
        return value
    stored = view.tensor(node)
    weight = view.weight(stored)
    return stored if weight is not None and weight.dtype in HALF_AND_SINGLE else value


def _fused(view: View, main: Node) -> Callable[..., Any] | None:
    """The kernel that computes a linear and its low-rank path at once, where there is one."""
    kernel = kernel_of(view.op(main))
    return None if kernel is None else kernel.low_rank


def _fuse(
    view: View, bound: dict[Node, Bound], add: Node, parts: _Parts
) -> tuple[Node, Node]:
    main, kernel = bound.pop(parts.main), _fused(view, parts.main)
    assert kernel is not None
    absent = len(spec(view.op(parts.main)).operands) - len(main.operands)
    operands = (*main.operands, *[None] * absent, parts.narrow, parts.up)
    bound[add] = Bound(kernel, operands, main.attrs)
    return parts.main, parts.side
