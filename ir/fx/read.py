"""``FxReader``: what a view answers about an FX graph, and the types of its values."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from torch.export import ExportedProgram
from torch.fx import Graph
from torch.fx.node import Node as FxNode
from torch.fx.node import map_arg

from ..core.errors import InvalidGraph, Refusal
from ..core.types import UNKNOWN, Type
from ..core.view import NATIVE, NO_SCOPE, Origin, Source, View
from ..core.weights import Weight
from ..vocab import ATEN_DECODERS, load_dialects, spec
from .dims import RESIZED, SIZE, FxDims, Sizes

GETITEM = operator.getitem
"""Takes one of several results: part of how FX writes a node, and no node of a view's own."""
Operand: TypeAlias = FxNode | float | int | bool | None
"""``core.view.Operand`` in native words."""


class FxReader(View):
    """The reading half of ``fx.FxView``, whose state it holds."""

    kind: ClassVar[Literal["fx", "onnx"]] = "fx"
    if TYPE_CHECKING:  # what ``View`` does with nodes, in native words
        def number(self, operand: Operand) -> float | int | bool | None: ...
        def tensor(self, node: FxNode, index: int = 0) -> FxNode: ...
        def maker(self, value: FxNode) -> FxNode: ...
        def result(self, node: FxNode) -> FxNode: ...
        def refresh_types(self, nodes: Iterable[FxNode]) -> None: ...

    def __init__(
        self,
        graph: Graph,
        program: ExportedProgram | None,
        weights: dict[str, Weight],
        names: tuple[tuple[str, ...], tuple[str, ...]],
        source: Source,
        symbols: Mapping[str, str],
    ) -> None:
        load_dialects()
        self.graph = graph
        self.program = program
        self.source = source
        self.origin: Origin | None = None
        self.dims = FxDims(symbols)
        self._weights = weights
        self._names = names
        self._metadata: dict[str, str] = {}
        self._placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self._output = next(n for n in reversed(graph.nodes) if n.op == "output")
        self._by_key: dict[Any, FxNode] = {}

    @property
    def symbols(self) -> dict[str, str]:
        """Names of the symbolic dimensions by the exporter's symbols."""
        return self.dims.symbols

    def nodes(self) -> Iterator[FxNode]:
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target is not GETITEM:
                yield node

    def op(self, node: FxNode) -> str:
        entry = ATEN_DECODERS.get(node.target)
        if entry is None:
            return _own_op(node.target)
        name, decode, partial = entry
        return NATIVE if partial and decode(node) is None else name

    def native_op(self, node: FxNode) -> str:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            return str(target)
        return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"

    def is_pure_native(self, node: FxNode) -> bool:
        return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())

    def infer_types(self) -> bool:
        return False  # torch.export leaves none out

    def operands(self, node: FxNode) -> tuple[Operand, ...]:
        reading = self.read(node)
        return tuple(node.all_input_nodes) if reading is None else reading[1]

    def attrs(self, node: FxNode) -> Mapping[str, Any]:
        reading = self.read(node)
        if reading is not None:
            return reading[2]
        plain = {f"arg{i}": a for i, a in enumerate(node.args) if _is_plain(a)}
        return plain | {k: v for k, v in node.kwargs.items() if _is_plain(v)}

    def read(self, node: FxNode) -> tuple[str, tuple[Operand, ...], Mapping[str, Any]] | None:
        entry = ATEN_DECODERS.get(node.target)
        if entry is not None:
            reading = entry[1](node)
            return None if reading is None else (entry[0], *reading)
        name = _own_op(node.target)
        if name == NATIVE:
            return None
        operands: list[Any] = list(node.args)
        while operands and operands[-1] is None:
            operands.pop()
        return name, tuple(operands), {**spec(name).attrs, **node.kwargs}

    def results(self, node: FxNode) -> tuple[FxNode, ...]:
        if not isinstance(node.meta.get("val"), (tuple, list)):
            return (node,)
        items = [u for u in node.users if u.target is GETITEM]
        return tuple(sorted(items, key=item_index))

    def producer(self, value: FxNode) -> FxNode | None:
        if value.op != "call_function":
            return None
        if value.target is not GETITEM:
            return value
        maker: Any = value.args[0]
        return maker  # type: ignore[no-any-return]

    def users(self, value: FxNode) -> tuple[FxNode, ...]:
        return tuple(u for u in value.users if u.op != "output")

    def is_output(self, value: FxNode) -> bool:
        return self._output in value.users

    def inputs(self) -> tuple[FxNode, ...]:
        return tuple(n for n in self._placeholders if "weight" not in n.meta)

    def outputs(self) -> tuple[FxNode, ...]:
        return tuple(self._output.args[0])

    def input_names(self) -> tuple[str, ...]:
        return self._names[0]

    def output_names(self) -> tuple[str, ...]:
        return self._names[1]

    def type(self, value: FxNode) -> Type:
        val = value.meta.get("val")
        if val is None and value.op == "call_function":
            val = self._refresh(value)
        if isinstance(val, torch.Tensor):
            return Type(val.dtype, tuple(self.dims.text(d) for d in val.shape))
        if isinstance(val, int | torch.SymInt):
            return Type(torch.int64, ())
        return UNKNOWN

    def _refresh(self, node: FxNode) -> Any:
        """Compute the fake value of a node whose type an edit left open, its operands first."""
        pending = [node]
        while pending:
            current = pending[-1]
            open_ = [n for n in current.all_input_nodes if n.meta.get("val") is None]
            if open_:
                pending.extend(open_)
                continue
            inferred = self._inferred(current)
            current.meta["val"] = self._computed(current) if inferred is None else inferred
            pending.pop()
        return node.meta["val"]

    def _computed(self, node: FxNode) -> Any:
        """The fake value as torch gives it."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            with self._fake_mode():
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise Refusal(
                f"{self.native_op(node)} does not fit its operands: {error}", node
            ) from None

    def _inferred(self, node: FxNode) -> torch.Tensor | None:
        """The fake value by the vocabulary's type rule, as far as its dimensions are known here:
        with symbolic ones a fake run takes twenty times as long."""
        reading = self.read(node)
        if reading is None or spec(reading[0]).multi_result:
            return None
        op, operands, attrs = reading
        if op in RESIZED:
            return self._resized(RESIZED[op], operands)
        types = [self.type(o) if isinstance(o, FxNode) else o for o in operands]
        try:
            (type_,) = spec(op).infer(types, attrs)
        except (ValueError, IndexError):
            return None  # torch says better what does not fit
        # What has no dimensions may be a size, which is not a tensor.
        known = [self.dims.size(d) for d in type_.shape or ()]
        sizes = [size for size in known if size is not None]
        if not sizes or type_.dtype is None or len(sizes) < len(known):
            return None
        with self._fake_mode():
            return torch.empty(sizes, dtype=type_.dtype)

    def _resized(
        self, rule: Callable[[Sizes, Sizes], Sizes | None], operands: Sequence[Operand]
    ) -> torch.Tensor | None:
        x, *wanted = (o.meta.get("val") if isinstance(o, FxNode) else o for o in operands)
        if not isinstance(x, torch.Tensor) or not all(isinstance(s, SIZE) for s in wanted):
            return None
        sizes = rule(x.shape, wanted)  # type: ignore[arg-type]
        if sizes is None:
            return None
        with self._fake_mode():
            return torch.empty(sizes, dtype=x.dtype)

    def _fake_mode(self) -> Any:
        for node in self._placeholders:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None:
                return mode
        raise InvalidGraph("the graph has no typed input")

    def name(self, item: FxNode) -> str:
        weight = item.meta.get("weight")
        return str(weight) if weight is not None else str(item.name)

    def scope(self, node: FxNode) -> str:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return ""
        path = str(list(stack.values())[-1][0]).removeprefix(NO_SCOPE)
        return re.sub(r"^L(?:__self___?|\['self'\])\.?", "", path)

    def weight(self, value: Operand) -> Weight | None:
        if not isinstance(value, FxNode):
            return None
        name = value.meta.get("weight") if value.op == "placeholder" else None
        return None if name is None else self._weights[name]

    def weights(self) -> Mapping[str, Weight]:
        return self._weights

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def arguments(self, node: FxNode) -> tuple[FxNode, ...]:
        return tuple(node.all_input_nodes)


def item_index(item: FxNode) -> int:
    """Which of several results a ``getitem`` node takes."""
    index: Any = item.args[1]
    return int(index)


def _own_op(target: Any) -> str:
    """The name of an op of ours, ``native`` for every other target."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "graphwright":
        return target._opname
    return NATIVE


def _is_plain(value: Any) -> bool:
    """Whether an argument is a constant that ``attrs`` of a native node can show."""
    if isinstance(value, list | tuple):
        return all(isinstance(v, int | float) for v in value)
    return isinstance(value, int | float | bool | str | torch.dtype | None)
