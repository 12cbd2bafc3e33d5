"""Which nodes our kernels take, and why they do not take the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.core.types import DTYPE_NAMES
from ..ir.core.view import Node, Operand, Value, View
from ..ir.vocab import is_known, spec

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
NEEDED_COMPUTE = (8, 0)
"""The least compute capability: bfloat16 and asynchronous copies begin there."""


@dataclass(frozen=True)
class Capability:
    """What the kernel of one op takes."""

    function: str
    """``module.function`` in ``kernels``; it takes what the op's reference takes."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Of the first operand; any, where empty."""
    attrs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """The values that an attribute may have, where not all are taken."""
    ranks: tuple[int, ...] = ()
    """Of the first operand; any, where empty."""
    one_dtype: bool = False
    """Whether all operands must be of the first one's dtype."""


CAPABILITIES: Mapping[str, Capability] = {
    "linear_nbit": Capability(
        "linear_nbit.linear_nbit",
        HALF_AND_SINGLE,
        {"bits": (4, 8)},
    ),
    "token_select": Capability("token_select.token_select"),
    "rope": Capability("rope.rope", HALF_AND_SINGLE, ranks=(1, 2, 3, 4), one_dtype=True),
}
"""By op of ours. One that is not here runs by its reference."""

FUSED = "linear_nbit.linear_nbit_low_rank"
"""``linear_nbit`` that also adds ``narrow @ up.T``; it takes what ``linear_nbit`` takes."""


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
        op = view.op(node)
        if not is_known(op) or not spec(op).own:
            continue
        reason = _reason_against(view, node, op, compute)
        if reason is not None:
            fallbacks.append(Fallback(view.name(node), op, reason))
            continue
        operands, attrs = view.operands(node), dict(view.attrs(node))
        bound[node] = Bound(_function(CAPABILITIES[op].function), operands, attrs)
    absorbed = {n for add, parts in _low_rank_sums(view, bound) for n in _fuse(bound, add, parts)}
    return Binding(bound, frozenset(absorbed), tuple(fallbacks))


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(".")
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"...kernels.{module}", __name__), name
    )
    return found


def _reason_against(view: View, node: Node, op: str, compute: tuple[int, int] | None) -> str | None:
    capability = CAPABILITIES.get(op)
    if capability is None:
        return "it has no kernel"
    if compute is not None and compute < NEEDED_COMPUTE:
        return (
            f"the kernels need compute capability {_version(NEEDED_COMPUTE)}, "
            f"this device has {_version(compute)}"
        )
    for name, taken in capability.attrs.items():
        value = view.attrs(node)[name]
        if value not in taken:
            return f"{name}={value}: its kernel takes {', '.join(map(str, taken))}"
    types = [view.type(o) for o in view.operands(node) if _is_value(o)]
    first = types[0]
    if capability.dtypes and first.dtype not in capability.dtypes:
        names = ", ".join(DTYPE_NAMES[d] for d in capability.dtypes)
        return f"its input is {first}: its kernel takes {names}"
    if capability.ranks and first.rank not in capability.ranks:
        return f"its input is {first}: its kernel takes up to {capability.ranks[-1]} dimensions"
    if capability.one_dtype and len({t.dtype for t in types}) > 1:
        return f"its operands are {', '.join(map(str, types))}: its kernel takes one dtype"
    return None


def _version(compute: tuple[int, int]) -> str:
    return f"{compute[0]}.{compute[1]}"


def _is_value(operand: Operand) -> bool:
    return operand is not None and not isinstance(operand, int | float | bool)


# --- low-rank paths ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """``add(linear_nbit(...), linear(narrow, up))``; the two nodes go into one kernel."""

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
    operands = view.operands(add)
    if not all(_is_value(o) for o in operands):
        return None
    for total, path in (operands, operands[::-1]):
        main, side = view.producer(total), view.producer(path)
        if main is None or side is None or main not in bound:
            continue
        if view.op(main) != "linear_nbit" or view.op(side) != "linear":
            continue
        if not (_only_here(view, total, add) and _only_here(view, path, add)):
            continue
        given = view.operands(side)
        if len(given) == 2 and view.type(path) == view.type(total):
            return _Parts(main, side, given[0], _uncast(view, given[1]))
    return None


def _only_here(view: View, value: Value, node: Node) -> bool:
    return view.users(value) == (node,) and not view.is_output(value)


def _uncast(view: View, value: Value) -> Value:
    """A factor in the dtype that it is stored in: the kernel widens it on the way."""
    node = view.producer(value)
    if node is None or view.op(node) != "cast":
        return value
    stored = view.operands(node)[0]
    weight = view.weight(stored)
    return stored if weight is not None and weight.dtype in HALF_AND_SINGLE else value


def _fuse(bound: dict[Node, Bound], add: Node, parts: _Parts) -> tuple[Node, Node]:
    main = bound.pop(parts.main)
    operands = [*main.operands, *[None] * (5 - len(main.operands)), parts.narrow, parts.up]
    bound[add] = Bound(_function(FUSED), tuple(operands), main.attrs)
    return parts.main, parts.side
