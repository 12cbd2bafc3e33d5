"""Cleaning: what computes nothing goes, and what depends on constants alone is computed at once.

Both are exact: every output stays bit-identical.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ..core.errors import BadInput, Missing, Refusal
from ..core.view import NATIVE, Node, Operand, Origin, Value, View
from ..core.weights import MemoryWeight, Weight
from ..ops.bitstack_blocks import place_of
from ..vocab import traits
from ..vocab.builder import Builder
from .driver import RewriteReport
from .shapes import Sizes, all_numbers, same_shape

_CHECKS = ("aten._assert_", "aten.sym_constrain_range")
_PURE_NATIVES = frozenset({"Shape", "Squeeze", "CastLike"})
"""ONNX ops outside the vocabulary that are merged where they are repeated."""
_FAR = 1 << 31


def clean(view: View) -> RewriteReport:
    """Remove identities, checks, dead nodes, repeated computations and unused weights, in place.

    ``x + 0`` goes for integers only: of floats, -0.0 + 0.0 is 0.0.
    """
    report = RewriteReport()
    firsts: dict[Hashable, Node] = {}
    previous = view.origin
    try:
        for node in list(view.nodes()):
            view.origin = Origin("clean")
            what = _clean_node(view, node, firsts)
            if what is not None:
                report.applied[what] += 1
    finally:
        view.origin = previous
    dead = _erase_dead(view)
    if dead:
        report.applied["dead code"] += dead
    unused = view.drop_unused_weights()
    if unused:
        report.applied["unused weights"] += unused
    return report


def _clean_node(view: View, node: Node, firsts: dict[Hashable, Node]) -> str | None:
    op = view.op(node)
    if op == NATIVE and view.native_op(node).startswith(_CHECKS):
        view.erase(node)
        return "checks"
    if traits(op).multi_result or len(view.results(node)) != 1:
        return None
    result = view.results(node)[0]
    source = _same_as(view, node, op, result)
    if source is not None and _replaceable(view, result, source):
        view.replace(result, source)
        view.erase(node)
        return "identities"
    if op == "transpose" and _join_transposes(view, node, result):
        return "joined transposes"
    key = _key(view, node, op)
    if key is None or view.is_output(result):
        return None
    first = firsts.setdefault(key, node)
    if first is node:
        return None
    view.replace(result, view.results(first)[0])
    view.erase(node)
    return "repeated computations"


def _replaceable(view: View, result: Value, source: Value) -> bool:
    """An output keeps a node of its own where its value is an input, a weight or another output."""
    if not view.is_output(result):
        return True
    return view.kind == "fx" or (view.producer(source) is not None and not view.is_output(source))


def _same_as(view: View, node: Node, op: str, result: Value) -> Value | None:
    """The operand that a node merely repeats, if it does."""
    if op == "identity":
        return view.tensor(node)
    test = _REPEATS.get(op)
    if test is None:
        return None
    source: Value | None = test(view, view.operands(node), view.attrs(node), result)
    return source


def _cast(view: View, operands: Any, attrs: Any, result: Value) -> Value | None:
    x: Value = operands[0]
    if view.type(x).dtype == attrs["dtype"]:
        return x
    inner = view.producer(x)
    if inner is None or view.op(inner) != "cast":
        return None
    origin = view.tensor(inner)
    first, middle = view.type(origin).dtype, view.type(x).dtype
    if first is None or middle is None or first != attrs["dtype"]:
        return None
    return origin if _holds(middle, first) else None


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of ``narrow`` is one of ``wide``."""
    if narrow.is_floating_point != wide.is_floating_point:
        return narrow == torch.bool
    return torch.promote_types(wide, narrow) == wide


def _slice(view: View, operands: Any, attrs: Any, result: Value) -> Value | None:
    x, start, end = (operands[0], view.number(operands[1]), view.number(operands[2]))
    if start != 0 or end is None or attrs["step"] != 1:
        return None
    shape = view.type(x).shape
    size = shape[attrs["dim"]] if shape is not None else None
    return x if end >= _FAR or (isinstance(size, int) and end >= size) else None


def _transpose(view: View, operands: Any, attrs: Any, result: Value) -> Value | None:
    return operands[0] if attrs["perm"] == tuple(range(len(attrs["perm"]))) else None


def _shaped(view: View, operands: Any, attrs: Any, result: Value) -> Value | None:
    x = operands[0]
    return x if same_shape(view.type(x).shape, view.type(result).shape) else None


def _neutral(number: int, integers_only: bool, commutes: bool) -> Any:
    def test(view: View, operands: Any, attrs: Any, result: Value) -> Value | None:
        for x, other in ((0, 1), (1, 0)) if commutes else ((0, 1),):
            if _is_number(view, operands[other], number):
                return _unchanged(view, operands[x], result, integers_only)
        return None

    return test


def _is_number(view: View, operand: Operand, number: int) -> bool:
    if operand is None or isinstance(operand, int | float):
        return operand == number
    weight = view.weight(operand)
    return weight is not None and weight.numel == 1 and view.number(operand) == number


def _unchanged(view: View, x: Operand, result: Value, integers_only: bool) -> Value | None:
    if x is None or isinstance(x, int | float):
        return None
    before, after = view.type(x), view.type(result)
    if before.dtype is None or before.dtype != after.dtype:
        return None
    if integers_only and before.dtype.is_floating_point:
        return None
    return x if same_shape(before.shape, after.shape) else None


def _neutral_bit(bit: bool) -> Any:
    """Of ``logical_and`` and ``logical_or``: the operand beside a constant that changes nothing."""

    def test(view: View, operands: Any, attrs: Any, result: Value) -> Value | None:
        for x, other in ((0, 1), (1, 0)):
            if view.kind == "onnx" and _is_number(view, operands[other], bit):
                return _unchanged(view, operands[x], result, False)
        return None

    return test


def _only_part(view: View, operands: Any, attrs: Any, result: Value) -> Value | None:
    return operands[0] if len(operands) == 1 else None


_REPEATS: dict[str, Any] = {
    "logical_and": _neutral_bit(True), "logical_or": _neutral_bit(False), "concat": _only_part,
    "cast": _cast, "slice": _slice, "transpose": _transpose,
    "reshape": _shaped, "expand": _shaped, "squeeze": _shaped,
    "add": _neutral(0, True, True), "sub": _neutral(0, False, False),
    "mul": _neutral(1, False, True), "div": _neutral(1, False, False),
}  # fmt: skip


def _join_transposes(view: View, node: Node, result: Value) -> bool:
    inner = view.producer(view.tensor(node))
    if inner is None or view.op(inner) != "transpose":
        return False
    source, first = view.tensor(inner), view.attrs(inner)["perm"]
    perm = tuple(first[d] for d in view.attrs(node)["perm"])
    if perm == tuple(range(len(perm))):
        if not _replaceable(view, result, source):
            return False
        joined = source
    else:
        joined = Builder(view, node).transpose(source, perm=perm, like=result)
    view.replace(result, joined)
    view.erase(node)
    return True


def _key(view: View, node: Node, op: str) -> Hashable | None:
    """Nodes with equal keys compute the same."""
    pure = traits(op).pure
    name = op if pure else view.native_op(node)
    if not pure and name not in _PURE_NATIVES:
        return None
    attrs = tuple(sorted((k, v) for k, v in view.attrs(node).items()))
    return (name, tuple(_operand_key(o) for o in view.operands(node)), str(attrs))


def _operand_key(operand: Operand) -> Hashable:
    if operand is None or isinstance(operand, int | float):
        return (type(operand), str(operand))
    return operand


def _erase_dead(view: View) -> int:
    count = 0
    for node in reversed(list(view.nodes())):
        if not any(view.users(r) or view.is_output(r) for r in view.results(node)):
            view.erase(node)
            count += 1
    return count


def fold_constants(view: View, max_bytes: int = 1 << 20) -> RewriteReport:
    """Replace nodes that depend on constants alone, or on known sizes, by their results.

    A result of more than ``max_bytes`` bytes is left to be computed, and so is the transposition of
    a weight (it is free on a handle) and a matrix in a wider dtype (it is stored in fewer bytes).
    Where a ``reshape`` or ``expand`` computes its target, the target is put in numbers if its type
    says them. Missing types are inferred first.
    """
    report = RewriteReport()
    if view.infer_types():
        report.applied["inferred types"] += 1
    sizes = Sizes(view)
    with view.made_by("fold-constants"):
        for node in list(view.nodes()):
            what = _fold_node(view, node, sizes, max_bytes)
            if what is not None:
                report.applied[what] += 1
    dead = _erase_dead(view)
    if dead:
        report.applied["dead code"] += dead
    view.drop_unused_weights()
    return report


def _fold_node(view: View, node: Node, sizes: Sizes, max_bytes: int) -> str | None:
    if len(view.results(node)) != 1:
        return None
    result = view.results(node)[0]
    if view.is_output(result) or not view.users(result):
        return None
    dims = sizes.note(node)
    if dims is not None and all_numbers(dims) and view.kind == "onnx" and view.arguments(node):
        numbers = torch.tensor(dims, dtype=view.type(result).dtype or torch.int64)
        return _put(view, node, result, numbers, "sizes")
    op = view.op(node)
    if op in ("reshape", "expand"):
        return _settle_target(view, node, op, result)
    if op == NATIVE and view.native_op(node) == "CastLike":
        return _settle_cast(view, node, result)
    tensor = _constant_result(view, node, op, result, max_bytes)
    return None if tensor is None else _put(view, node, result, tensor, "constants")


def _put(view: View, node: Node, result: Value, tensor: torch.Tensor, what: str) -> str:
    constant = view.add_weight(f"{view.name(node)}.folded", MemoryWeight(tensor.contiguous()))
    view.replace(result, constant)
    view.erase(node)
    return what


def _constant_result(
    view: View, node: Node, op: str, result: Value, max_bytes: int
) -> torch.Tensor | None:
    arguments = view.arguments(node)
    handles = [view.weight(a) for a in arguments]
    if any(h is None for h in handles) or not _is_pure(view, node, op):
        return None
    if any(place_of(view.name(a)) is not None for a in arguments):
        return None  # blocks stay apart, so that a file can be cut behind each of them
    known = view.type(result)
    if op == "transpose" or (op == NATIVE and not arguments and known.shape != ()):
        return None
    if op == "cast" and known.rank == 2 and _widens(handles[0], known.dtype):
        return None
    if known.numel is not None and known.dtype is not None:
        if known.numel * known.dtype.itemsize > max_bytes:
            return None
    elif sum(h.nbytes for h in handles if h is not None) > max_bytes:
        return None
    try:
        values = view.execute(node, [h.read() for h in handles if h is not None])
    except (Missing, BadInput):
        return None  # a dry run has no numbers; an op without a reference is left alone
    tensor = values[0] if len(values) == 1 else None
    fits = isinstance(tensor, torch.Tensor) and tensor.numel() * tensor.element_size() <= max_bytes
    return tensor if fits else None


def _widens(weight: Weight | None, dtype: torch.dtype | None) -> bool:
    return weight is not None and dtype is not None and dtype.itemsize > weight.dtype.itemsize > 1


def _is_pure(view: View, node: Node, op: str) -> bool:
    return view.is_pure_native(node) if op == NATIVE else traits(op).pure


def _settle_cast(view: View, node: Node, result: Value) -> str | None:
    """CastLike(x, y) => cast(x, dtype of y)"""
    x, dtype = view.tensor(node), view.type(view.tensor(node, 1)).dtype
    if dtype is None:
        return None
    weight = view.weight(x)
    if weight is not None and weight.numel == 1:
        return _put(view, node, result, weight.read().to(dtype), "constants")
    view.replace(result, Builder(view, node).cast(x, dtype=dtype))
    view.erase(node)
    return "casts"


def _settle_target(view: View, node: Node, op: str, result: Value) -> str | None:
    """reshape(x, computed shape) => reshape(x, numbers), one dimension at most being -1."""
    x, *shape = view.operands(node)
    if not x or all(isinstance(s, int) for s in shape):
        return None
    known = view.type(result).shape
    if known is None:
        return None
    open_ = [d for d in known if not isinstance(d, int)]
    if len(open_) > (1 if op == "reshape" else 0) or 0 in known:
        return None
    dims: list[Operand] = [d if isinstance(d, int) else -1 for d in known]
    try:
        settled = Builder(view, node).build(op, x, *dims, like=result)
    except Refusal:
        return None
    view.replace(result, settled)
    view.erase(node)
    return "target shapes"
