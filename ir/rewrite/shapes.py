"""What is known of sizes: the numbers in a shape."""

from __future__ import annotations

from typing import Any

import torch

from ..core.types import UNKNOWN_DIM, Dim
from ..core.view import NATIVE, Node, Operand, Value, View

_END = 1 << 31
"""A slice that ends beyond this ends nowhere."""


_MOST = 16
"""Numbers that a shape, or what is computed of one, has at most."""


class Sizes:
    """The dimensions that integer values hold: numbers, names, or ``UNKNOWN_DIM``.

    ``note`` is called on nodes in topological order; ``of`` then answers for their results, with a
    tuple for a vector and a single dimension for a scalar.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._known: dict[Value, tuple[Dim, ...] | Dim] = {}

    def of(self, operand: Operand) -> tuple[Dim, ...] | Dim | None:
        """The dimensions behind an operand, ``None`` where it is not a known shape or size."""
        if operand is None or isinstance(operand, bool | float):
            return None
        if isinstance(operand, int):
            return operand
        if operand in self._known:
            return self._known[operand]
        weight = self._view.weight(operand)
        if weight is None or weight.dtype.is_floating_point or weight.numel > _MOST:
            return None
        if len(weight.shape) > 1 or weight.dtype.itemsize < 4:
            return None
        numbers = weight.read().reshape(-1).tolist()
        return tuple(numbers) if weight.shape else int(numbers[0])

    def note(self, node: Node) -> tuple[Dim, ...] | Dim | None:
        """Follow one node; what its result holds, if it is a shape or a size."""
        view = self._view
        op = view.op(node)
        if op == NATIVE:
            rule = _NATIVE_RULES.get(view.native_op(node))
            dims = None if rule is None else rule(self, node)
        else:
            rule = _RULES.get(op)
            dims = None if rule is None else rule(self, view.operands(node), view.attrs(node))
        if dims is not None:
            self._known[view.results(node)[0]] = dims
        return dims

    def _shape(self, node: Node) -> tuple[Dim, ...] | None:
        """What ONNX's ``Shape`` takes of its operand's."""
        shape = self._view.type(self._view.tensor(node)).shape
        if shape is None:
            return None
        attrs = self._view.attrs(node)
        return shape[attrs.get("start") : attrs.get("end")]

    def _filled(self, node: Node) -> tuple[Dim, ...] | None:
        """What ``ConstantOfShape`` makes, as a vector of at most ``_MOST`` whole numbers."""
        dims, type_ = self.of(self._view.tensor(node)), self._view.type(self._view.result(node))
        if not isinstance(dims, tuple) or len(dims) != 1 or type_.dtype != torch.int64:
            return None
        if not isinstance(dims[0], int) or not 0 < dims[0] <= _MOST:
            return None
        (vector,) = self._view.execute(node, [torch.tensor(dims)])
        return tuple(vector.tolist())

    # --- one rule for each op that shape arithmetic is made of ------------------------------------

    def _same(self, operands: Any, attrs: Any) -> tuple[Dim, ...] | Dim | None:
        return self.of(operands[0])

    def _cast(self, operands: Any, attrs: Any) -> tuple[Dim, ...] | Dim | None:
        """Sizes stay sizes as whole numbers: floats divide in another way, and bools hold less."""
        return self.of(operands[0]) if attrs["dtype"] in (torch.int32, torch.int64) else None

    def _size(self, operands: Any, attrs: Any) -> Dim | None:
        shape = self._view.type(operands[0]).shape
        return None if shape is None else shape[attrs["dim"]]

    def _index(self, operands: Any, attrs: Any) -> tuple[Dim, ...] | Dim | None:
        items, index = self.of(operands[0]), self.of(operands[1])
        if not isinstance(items, tuple) or index is None:
            return None
        places = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(i, int) and -len(items) <= i < len(items) for i in places):
            return None
        picked = tuple(items[i] for i in places if isinstance(i, int))
        return picked if isinstance(index, tuple) else picked[0]

    def _slice(self, operands: Any, attrs: Any) -> tuple[Dim, ...] | None:
        items, start, end = (self.of(o) for o in operands)
        start, end = (e[0] if isinstance(e, tuple) and len(e) == 1 else e for e in (start, end))
        if not isinstance(items, tuple) or not isinstance(start, int) or not isinstance(end, int):
            return None
        return items[start : None if end >= _END else end : attrs["step"]]

    def _concat(self, operands: Any, attrs: Any) -> tuple[Dim, ...] | None:
        parts = [self.of(o) for o in operands]
        if not all(isinstance(p, tuple) for p in parts):
            return None
        return tuple(d for p in parts if isinstance(p, tuple) for d in p)

    def _vector(self, operands: Any, attrs: Any) -> tuple[Dim, ...] | None:
        item = self.of(operands[0])
        return (item,) if isinstance(item, int | str) else None

    def _scalar(self, operands: Any, attrs: Any) -> Dim | None:
        items = self.of(operands[0])
        return items[0] if isinstance(items, tuple) and len(items) == 1 else None

    def _reshape(self, operands: Any, attrs: Any) -> tuple[Dim, ...] | Dim | None:
        if tuple(operands[1:]) not in ((-1,), (1,)):
            return None
        items = self.of(operands[0])
        return (items,) if isinstance(items, int | str) else items

    def _pairs(self, operands: Any) -> tuple[bool, list[tuple[Dim, ...]]] | None:
        """Whether the result is a vector, and what its elements are made of."""
        sides = [self.of(o) for o in operands]
        if any(side is None for side in sides):
            return None
        lengths = {len(side) for side in sides if isinstance(side, tuple)} - {1}
        if len(lengths) > 1:
            return None
        count = max(lengths, default=1)
        wide = [side if isinstance(side, tuple) else (side,) for side in sides]
        columns = [side * count if len(side) == 1 else side for side in wide]
        return any(isinstance(side, tuple) for side in sides), list(zip(*columns, strict=True))

    def _elementwise(self, operands: Any, each: Any) -> tuple[Dim, ...] | Dim | None:
        pairs = self._pairs(operands)
        items = [] if pairs is None else [each(*elements) for elements in pairs[1]]
        if pairs is None or any(item is None for item in items):
            return None
        return tuple(items) if pairs[0] else items[0]


def _arithmetic(what: str) -> Any:
    def each(a: Dim, b: Dim) -> Dim | None:
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        if what == "div":
            return int(a / b) if b else None
        return {"add": a + b, "sub": a - b, "mul": a * b}[what]

    return lambda sizes, operands, attrs: sizes._elementwise(operands, each)


def _equal(a: Dim, b: Dim) -> bool | None:
    """A size with a name is not below 0: exporters ask whether one is -1, which is to be kept."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return False if any(isinstance(d, int) and d < 0 for d in (a, b)) else None


def _chosen(which: Dim, a: Dim, b: Dim) -> Dim | None:
    return (a if which else b) if isinstance(which, int) else None


_NATIVE_RULES: dict[str, Any] = {"Shape": Sizes._shape, "ConstantOfShape": Sizes._filled}
_RULES: dict[str, Any] = {
    "identity": Sizes._same, "cast": Sizes._cast, "size": Sizes._size,
    "index_select": Sizes._index, "slice": Sizes._slice, "concat": Sizes._concat,
    "unsqueeze": Sizes._vector, "squeeze": Sizes._scalar, "reshape": Sizes._reshape,
    "add": _arithmetic("add"), "sub": _arithmetic("sub"), "mul": _arithmetic("mul"),
    "div": _arithmetic("div"),
    "eq": lambda sizes, operands, attrs: sizes._elementwise(operands, _equal),
    "where": lambda sizes, operands, attrs: sizes._elementwise(operands, _chosen),
}  # fmt: skip


def all_numbers(dims: tuple[Dim, ...] | Dim | None) -> bool:
    """Whether every dimension is a number."""
    if isinstance(dims, tuple):
        return all(isinstance(d, int) for d in dims)
    return isinstance(dims, int)


def same_shape(a: tuple[Dim, ...] | None, b: tuple[Dim, ...] | None) -> bool:
    """Whether two shapes are known to be equal."""
    return a is not None and a == b and UNKNOWN_DIM not in a


__all__ = ["Sizes", "all_numbers", "same_shape"]
