"""FX graphs in the text form: how native nodes are written, and graphs made from lines."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import Node as FxNode

from ..core.errors import BadInput, Refusal
from ..core.types import UNKNOWN, UNKNOWN_DIM, Dim, parse_type
from ..core.view import Source
from ..core.weights import Weight
from ..fx.read import item_index
from ..fx.view import FxView
from ..vocab.fx import call
from .syntax import Reader

_PYTHON: dict[str, Any] = {
    **{f"_operator.{f.__name__}": f for f in (
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv,
        operator.mod, operator.pow, operator.neg, operator.eq, operator.ne, operator.lt,
        operator.le, operator.gt, operator.ge, operator.and_, operator.or_,
    )},
    **{f"math.{f.__name__}": f for f in (math.ceil, math.floor, math.trunc, math.sqrt)},
    **{f"torch.{f.__name__}": f for f in (
        torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite, torch.sym_int, torch.sym_float,
    )},
}  # fmt: skip
"""The plain functions that a parsed graph may call. Text from elsewhere must not reach others."""


def header(view: FxView) -> list[str]:
    return []


def check(view: FxView) -> None:
    """Raise ``BadInput`` where the graph holds more than calls."""
    for node in view.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise BadInput(f"{node.name}: a {node.op} node has no text form")


def input_name(view: FxView, value: FxNode, index: int) -> str:
    return view.input_names()[index]


def type_text(view: FxView, value: FxNode) -> str:
    """The type of a value; a symbolic integer is ``int(seq + 1)``."""
    val = value.meta.get("val")
    if isinstance(val, int | torch.SymInt) and not isinstance(val, bool):
        return f"int({view.dims.text(val)})"
    try:
        return str(view.type(value))
    except Refusal:
        return str(UNKNOWN)


def results(view: FxView, node: FxNode) -> tuple[list[FxNode | None], bool]:
    """The node's results by position, ``None`` for one that nobody takes; whether it is a tuple."""
    view.type(node)
    val = node.meta.get("val")
    if not isinstance(val, tuple | list):
        return [node], False
    items: list[FxNode | None] = [None] * len(val)
    for item in reversed(view.results(node)):
        items[item_index(item)] = item
    return items, True


def canonical(view: FxView, value: FxNode) -> FxNode:
    """The first of several ``getitem`` nodes that take the same result."""
    if value.target is not operator.getitem or value.op != "call_function":
        return value
    maker, index = view.producer(value), item_index(value)
    assert maker is not None
    return next(item for item in view.results(maker) if item_index(item) == index)


def form(view: FxView, node: FxNode) -> tuple[str, Sequence[Any], Mapping[str, Any]]:
    """Op, operands and attributes as they are printed."""
    reading = view.read(node)
    if reading is not None:
        op, operands, attrs = reading
        return op, _kept(view, operands) if op == "expand" else operands, attrs
    name = view.native_op(node)
    if not isinstance(node.target, torch._ops.OpOverload) and name not in _PYTHON:
        raise BadInput(f"{node.name}: the function {name} has no text form")
    return name, _plain(node.args), {k: _plain(v) for k, v in node.kwargs.items()}


def _kept(view: FxView, operands: Sequence[Any]) -> list[Any]:
    """The sizes of ``expand`` with -1 for a dimension that stays 1, as the vocabulary builds it."""
    x, *sizes = operands
    new = len(sizes) - (view.type(x).rank or 0)
    return [x, *[-1 if i >= new and isinstance(s, int) and s == 1 else s
                 for i, s in enumerate(sizes)]]  # fmt: skip


def _plain(value: Any) -> Any:
    """FX's immutable lists as plain ones."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return tuple(_plain(v) for v in value) if isinstance(value, tuple) else value


def _target(name: str) -> Any:
    if name in _PYTHON:
        return _PYTHON[name]
    parts = name.split(".")
    if len(parts) != 3:
        raise ValueError(f"{name!r} is not an op: native ones are written aten.add.Tensor")
    overload = getattr(getattr(getattr(torch.ops, parts[0]), parts[1], None), parts[2], None)
    if not isinstance(overload, torch._ops.OpOverload):
        raise ValueError(f"torch has no op {name}")
    if overload._schema.is_mutable:
        raise ValueError(f"{name} works in place; only functional graphs are rewritten")
    return overload


class Maker:
    """Builds an ``FxView`` without a program, line by line."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.weights: dict[str, Weight] = {}
        self.inputs: list[str] = []
        self._dims = _Dims()
        self._names: dict[FxNode, str] = {}
        self._view: FxView | None = None

    def header(self, word: str, reader: Reader) -> bool:
        return False

    def reserve(self, names: set[str]) -> None:
        """Names are settled in ``finish``."""

    def input(self, name: str, text: str) -> FxNode:
        node = self.graph.placeholder(name if name.isidentifier() else re.sub(r"\W", "_", name))
        node.meta["val"] = self._val(text)
        if node.meta["val"] is None:
            raise ValueError(f"the input {name} has no type")
        self.inputs.append(name)
        return node

    def weight(self, name: str, weight: Weight) -> FxNode:
        node = self.graph.placeholder(re.sub(r"\W", "_", f"w_{name}"))
        with self._dims.mode:
            node.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype)
        node.meta["weight"] = name
        self.weights[name] = weight
        return node

    def op(
        self,
        op: str,
        operands: Sequence[Any],
        attrs: Mapping[str, Any],
        results: Sequence[tuple[str, str] | None],
        several: bool,
    ) -> list[FxNode | None]:
        vals = [None if r is None else self._val(r[1]) for r in results]
        view = self._opened()
        end = view._output
        if "." in op:
            with self.graph.inserting_before(end):
                node = call(self.graph, _target(op), tuple(operands), attrs)
        else:
            built = view.producer(view.build(op, operands, attrs, before=end))
            assert built is not None
            node = built
        for unused in list(node.users):
            self.graph.erase_node(unused)
        if not several:
            node.meta["val"] = vals[0]
            self._names[node] = results[0][0] if results[0] is not None else node.name
            return [node]
        return self._items(node, end, results, vals)

    def _items(
        self, node: FxNode, end: FxNode, results: Sequence[tuple[str, str] | None], vals: list[Any]
    ) -> list[FxNode | None]:
        known = node.meta.get("val") or vals
        if len(known) != len(vals):
            raise ValueError(f"the op has {len(known)} results, not {len(vals)}")
        node.meta["val"] = tuple(k if v is None else v for k, v in zip(known, vals, strict=True))
        items: list[FxNode | None] = []
        for index, result in enumerate(results):
            if result is None:
                items.append(None)
                continue
            with self.graph.inserting_before(end):
                item = call(self.graph, operator.getitem, (node, index))
            item.meta["val"] = vals[index]
            self._names[item] = result[0]
            items.append(item)
        return items

    def finish(self, outputs: Sequence[tuple[str, FxNode]]) -> FxView:
        view = self._opened()
        view._output.args = (tuple(value for _, value in outputs),)
        taken = set(self._names.values())
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in self._names and node.name in taken:
                node.name = f"{node.name}_part"
        for node, name in self._names.items():
            node.name = name
        # A copy gives the names to a namespace that has seen no other.
        graph = Graph()
        mapping: dict[FxNode, FxNode] = {}
        graph.output(graph.graph_copy(self.graph, mapping))
        names = tuple(self.inputs), tuple(name for name, _ in outputs)
        return FxView(graph, None, self.weights, names, Source(), self._dims.names)

    def _opened(self) -> FxView:
        if self._view is None:
            self.graph.output(())
            self._view = FxView(self.graph, None, self.weights, ((), ()), Source(), {})
        return self._view

    def _val(self, text: str) -> Any:
        """A fake value of a printed type; ``None`` for ``?[*]``."""
        if text.startswith("int(") and text.endswith(")"):
            return self._dims.size(text[4:-1])
        type_ = parse_type(text)
        if type_ == UNKNOWN:
            return None
        if type_.dtype is None or type_.shape is None:
            raise ValueError(f"{text}: a value of an fx graph has a dtype and a shape")
        sizes = [self._dims.size(d) for d in type_.shape]
        with self._dims.mode:
            return torch.empty(sizes, dtype=type_.dtype)


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


class _Dims:
    """Symbolic sizes for printed dimensions, in one shape environment.

    A sum or product of named sizes keeps its meaning where it prints as it was written; any other
    expression becomes a size of its own that prints the same.
    """

    def __init__(self) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self.names: dict[str, str] = {}
        self._known: dict[str, Any] = {}

    def size(self, dim: Dim) -> Any:
        if isinstance(dim, int) or dim.isdigit():
            return int(dim)
        size = self._known.get(dim)
        if size is None:
            size = self._computed(dim)
            size = self._fresh(dim) if size is None else size
            if dim != UNKNOWN_DIM:
                self._known[dim] = size
        return size

    def _fresh(self, text: str) -> Any:
        # Distinct odd hints of no small common factor: no two sizes look equal by accident.
        hint = 101 + 6 * len(self.names)
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[None]
        )
        fake = self.mode.from_tensor(
            torch.empty(hint),
            symbolic_context=context,
        )
        size = fake.shape[0]
        self.names[str(size)] = text
        return size

    def _computed(self, text: str) -> Any:
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            return None
        if isinstance(tree, ast.Name):
            return None
        value = self._evaluate(tree)
        if not isinstance(value, torch.SymInt):
            return None
        printed = re.sub(r"[a-z]+\d+", lambda m: self.names.get(m[0], m[0]), str(value.node.expr))
        return value if printed == text else None

    def _evaluate(self, tree: ast.expr) -> Any:
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return tree.value
        if isinstance(tree, ast.Name):
            return self.size(tree.id)
        if isinstance(tree, ast.BinOp) and type(tree.op) in _ARITHMETIC:
            left, right = self._evaluate(tree.left), self._evaluate(tree.right)
            if left is None or right is None:
                return None
            divides = isinstance(tree.op, ast.FloorDiv | ast.Mod)
            if divides and not (isinstance(right, int) and right > 0):
                return None
            return _ARITHMETIC[type(tree.op)](left, right)
        return None
