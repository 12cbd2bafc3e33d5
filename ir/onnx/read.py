"""``OnnxReader``: what a view answers about an ``onnx_ir.Model``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import onnx_ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from ..core.tensors import has_weight, weight_of
from ..core.types import UNKNOWN, UNKNOWN_DIM, Type
from ..core.view import NATIVE, Origin, Source, View
from ..core.weights import Weight
from ..vocab import ONNX_DECODERS, load_dialects
from ..vocab.onnx import DOMAIN
from .parts import (
    PLAIN,
    SCOPE_KEYS,
    TORCH_DTYPES,
    Operand,
    captured,
    decode,
    dim_of,
    has_subgraph,
    innermost_scope,
    is_no_tensor,
    is_plain_model,
    is_untyped_constant,
    name_everything,
    subgraphs,
)

_IMPURE = ("Random", "Bernoulli", "Multinomial", "If", "Loop")
"""Beginnings of the names of ops whose results may differ from one run to the next, or whose graphs
were not looked into."""


class OnnxReader(View):
    """The reading half of ``onnx.OnnxView``, whose state it holds."""

    kind: ClassVar[Literal["fx", "onnx"]] = "onnx"
    if TYPE_CHECKING:  # what ``View`` does with nodes, in native words
        def number(self, operand: Operand) -> float | int | bool | None: ...
        def tensor(self, node: onnx_ir.Node, index: int = 0) -> onnx_ir.Value: ...
        def maker(self, value: onnx_ir.Value) -> onnx_ir.Node: ...
        def result(self, node: onnx_ir.Node) -> onnx_ir.Value: ...
        def refresh_types(self, nodes: Iterable[onnx_ir.Node]) -> None: ...

    def __init__(self, model: onnx_ir.Model, *, source: Source | None = None) -> None:
        # Values of torch's exporter build nodes when compared; copies are plain.
        model = model if is_plain_model(model) else model.clone()
        load_dialects()
        self.model = model
        self.source = source or Source()
        self.origin: Origin | None = None
        self._handles: dict[onnx_ir.Value, tuple[Any, Weight]] = {}
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        self.value_names, self._node_names = name_everything(model.graph)
        # Nodes inside a subgraph stand for the node of the graph that holds it.
        self._owners: dict[onnx_ir.Graph | None, onnx_ir.Node] = {
            g: node for node in model.graph for g in subgraphs(node)
        }

    def nodes(self) -> Iterator[onnx_ir.Node]:
        return iter(self.model.graph)

    def op(self, node: onnx_ir.Node) -> str:
        if node.domain == DOMAIN:
            return str(node.op_type)
        for name, decoder, partial in ONNX_DECODERS.get((node.domain, node.op_type), ()):
            if not partial or decoder(node) is not None:
                return name
        return NATIVE

    def native_op(self, node: onnx_ir.Node) -> str:
        return f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type)

    def read(
        self, node: onnx_ir.Node
    ) -> tuple[str, tuple[Operand, ...], Mapping[str, Any]] | None:
        if node.domain == DOMAIN:
            inputs = list(node.inputs)
            while inputs and inputs[-1] is None:
                inputs.pop()
            return str(node.op_type), tuple(inputs), decode(node)
        for name, decoder, _ in ONNX_DECODERS.get((node.domain, node.op_type), ()):
            reading = decoder(node)
            if reading is not None:
                return name, *reading
        return None

    def is_pure_native(self, node: onnx_ir.Node) -> bool:
        return not self.native_op(node).startswith(_IMPURE)

    def infer_types(self) -> bool:
        """ONNX's own inference, which follows symbolic dimensions through shape arithmetic.

        It is given no weight larger than a kilobyte.
        """
        types = [self.type(o) for n in self.nodes() for o in n.outputs]
        if not any(t.dtype is None or t.shape is None or UNKNOWN_DIM in t.shape for t in types):
            return False
        from onnx_ir.passes.common import ShapeInferencePass

        infer = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
        try:
            return infer(self.model).modified
        except onnx_ir.serde.SerdeError:  # a map, which onnx-ir has no type for
            return False

    def operands(self, node: onnx_ir.Node) -> tuple[Operand, ...]:
        reading = self.read(node)
        return tuple(v for v in node.inputs if v is not None) if reading is None else reading[1]

    def attrs(self, node: onnx_ir.Node) -> Mapping[str, Any]:
        reading = self.read(node)
        if reading is not None:
            return reading[2]
        return {k: a.value for k, a in node.attributes.items() if a.type in PLAIN}

    def results(self, node: onnx_ir.Node) -> tuple[onnx_ir.Value, ...]:
        return tuple(node.outputs)

    def producer(self, value: onnx_ir.Value) -> onnx_ir.Node | None:
        node: onnx_ir.Node | None = value.producer()
        return node

    def users(self, value: onnx_ir.Value) -> tuple[onnx_ir.Node, ...]:
        nodes = value.consumers()
        if not self._owners:
            return tuple(nodes)
        return tuple(dict.fromkeys(self._owners.get(node.graph, node) for node in nodes))

    def is_output(self, value: onnx_ir.Value) -> bool:
        return bool(value.is_graph_output())

    def inputs(self) -> tuple[onnx_ir.Value, ...]:
        initializers = self.model.graph.initializers
        return tuple(v for v in self.model.graph.inputs if v.name not in initializers)

    def outputs(self) -> tuple[onnx_ir.Value, ...]:
        return tuple(self.model.graph.outputs)

    def input_names(self) -> tuple[str, ...]:
        return tuple(str(v.name) for v in self.inputs())

    def output_names(self) -> tuple[str, ...]:
        return tuple(str(v.name) for v in self.outputs())

    def type(self, value: onnx_ir.Value) -> Type:
        if is_no_tensor(value):
            return UNKNOWN
        shape, dtype = value.shape, value.dtype
        if shape is None or dtype is None:
            const = value.const_value
            shape = getattr(const, "shape", None) if shape is None else shape
            dtype = getattr(const, "dtype", None) if dtype is None else dtype
            if shape is None and dtype is None:
                return UNKNOWN
        return Type(
            None if dtype is None else TORCH_DTYPES.get(dtype),
            None if shape is None else tuple([dim_of(d) for d in shape.dims]),
        )

    def name(self, item: onnx_ir.Node | onnx_ir.Value) -> str:
        return str(item.name)

    def scope(self, node: onnx_ir.Node) -> str:
        for key in SCOPE_KEYS:
            text = node.metadata_props.get(key)
            if text:
                return innermost_scope(text)
        return ""

    def weight(self, value: Operand) -> Weight | None:
        # An initializer that is an input too is whatever the caller says.
        if not isinstance(value, onnx_ir.Value) or value.is_graph_input():
            return None
        return self.default(value)

    def default(self, value: onnx_ir.Value) -> Weight | None:
        if value.const_value is None:
            return None
        tensor = value.const_value
        cached = self._handles.get(value)
        if cached is not None and cached[0] is tensor:
            return cached[1]
        if not has_weight(tensor):
            return None
        weight = weight_of(tensor)
        self._handles[value] = (tensor, weight)
        return weight

    def weights(self) -> Mapping[str, Weight]:
        handles = {n: self.weight(v) for n, v in self.model.graph.initializers.items()}
        return {name: weight for name, weight in handles.items() if weight is not None}

    def metadata(self) -> dict[str, str]:
        return self.model.metadata_props

    def arguments(self, node: onnx_ir.Node) -> tuple[onnx_ir.Value, ...]:
        values = dict.fromkeys(v for v in node.inputs if v is not None)
        if has_subgraph(node):
            values.update(dict.fromkeys(captured(node)))
        return tuple(v for v in values if not is_untyped_constant(v))
