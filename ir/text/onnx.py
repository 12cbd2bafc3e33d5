"""ONNX graphs in the text form: how native nodes are written, and graphs made from lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir
from onnx_ir import serde
from onnx_ir.tensor_adapters import from_torch_dtype

from ..core.errors import BadInput
from ..core.types import UNKNOWN_DIM, Type, parse_type
from ..core.weights import Weight
from ..onnx.parts import captured, has_subgraph
from ..onnx.view import OnnxView
from ..vocab.onnx import DOMAIN
from .syntax import Proto, Reader

_DEFAULT_DOMAIN = "ai.onnx"
_PLAIN = frozenset({
    onnx_ir.AttributeType.INT, onnx_ir.AttributeType.FLOAT, onnx_ir.AttributeType.STRING,
    onnx_ir.AttributeType.INTS, onnx_ir.AttributeType.FLOATS, onnx_ir.AttributeType.STRINGS,
})  # fmt: skip


def header(view: OnnxView) -> list[str]:
    model = view.model
    lines = [f"ir_version {model.ir_version}"]
    for domain, version in sorted(model.graph.opset_imports.items()):
        if domain != DOMAIN:
            lines.append(f"opset {json.dumps(domain)} {version}")
    for function in model.functions.values():
        data = serde.serialize_function(function).SerializeToString(deterministic=True)
        literal = Proto(data)
        lines.append(f"function {_proto_text(literal)}")
    return lines


def _proto_text(proto: Proto) -> str:
    from .syntax import write_literal

    return write_literal(proto, _no_ref)


def _no_ref(value: Any) -> Any:
    raise ValueError(f"{value!r} has no text form")


def check(view: OnnxView) -> None:
    """Raise ``BadInput`` where a constant has a dtype that the text form has no word for."""
    for node in view.nodes():
        for value in node.inputs:  # arguments leave out what no handle stands for
            if value is None or value.const_value is None:
                continue
            if view.weight(value) is None or view.type(value).dtype is None:
                raise BadInput(
                    f"{view.name(value)}: a constant of dtype {value.const_value.dtype.name} "
                    "has no text form"
                )


def input_name(view: OnnxView, value: onnx_ir.Value, index: int) -> str:
    return str(value.name)


def type_text(view: OnnxView, value: onnx_ir.Value) -> str:
    return str(view.type(value))


def results(view: OnnxView, node: onnx_ir.Node) -> tuple[list[onnx_ir.Value | None], bool]:
    """The node's results by position, ``None`` for one that nobody takes; whether it is a list."""
    values = [value if value.name else None for value in node.outputs]
    return values, len(values) != 1 or values[0] is None


def canonical(view: OnnxView, value: onnx_ir.Value) -> onnx_ir.Value:
    return value


def form(view: OnnxView, node: onnx_ir.Node) -> tuple[str, Sequence[Any], Mapping[str, Any]]:
    """Op, operands and attributes as they are printed."""
    reading = view.read(node)
    if reading is not None and _returns(view, *reading[:2], node):
        return reading
    if node.overload:
        raise BadInput(f"{node.name}: the overload {node.overload!r} has no text form")
    attrs = {name: _attr_literal(attr) for name, attr in node.attributes.items()}
    return f"{node.domain or _DEFAULT_DOMAIN}::{node.op_type}", list(node.inputs), attrs


def _returns(view: OnnxView, op: str, operands: Sequence[Any], node: onnx_ir.Node) -> bool:
    """Whether building the reading gives the node again; sizes computed at run time may not."""
    computed = [o for o in operands[1:] if isinstance(o, onnx_ir.Value)]
    if op == "slice":
        return not computed
    if op not in ("reshape", "expand") or not computed:
        return True
    return len(operands) == 2 and view.type(computed[0]).rank == 1


def _attr_literal(attr: onnx_ir.Attr) -> Any:
    # An empty list would not tell of what: only that of integers is written plainly.
    integers = attr.type == onnx_ir.AttributeType.INTS
    if attr.type in _PLAIN and not attr.is_ref() and (attr.value not in ([], ()) or integers):
        return list(attr.value) if isinstance(attr.value, list | tuple) else attr.value
    return Proto(serde.serialize_attribute(attr).SerializeToString(deterministic=True))


class Maker:
    """Builds an ``OnnxView`` line by line."""

    def __init__(self) -> None:
        graph = onnx_ir.Graph([], [], nodes=[], opset_imports={}, name="graph")
        self.model = onnx_ir.Model(graph, ir_version=10)
        self.view = OnnxView(self.model)
        self._values: dict[str, onnx_ir.Value] = {}

    def header(self, word: str, reader: Reader) -> bool:
        if word == "ir_version":
            self.model.ir_version = reader.integer()
        elif word == "opset":
            domain = reader.string()
            self.model.graph.opset_imports[domain] = reader.integer()
        elif word == "function":
            function = _parsed(onnx_ir_proto("FunctionProto"), reader.literal())
            definition = serde.deserialize_function(function)
            self.model.functions[definition.identifier()] = definition
        else:
            return False
        return True

    def reserve(self, names: set[str]) -> None:
        """Keep the constants that ``build`` makes from taking these names."""
        self.view.value_names.reserve(names)

    def input(self, name: str, text: str) -> onnx_ir.Value:
        value = onnx_ir.Value(name=name)
        _retype(value, parse_type(text))
        self.model.graph.inputs.append(value)
        self._values[name] = value
        return value

    def weight(self, name: str, weight: Weight) -> onnx_ir.Value:
        self.view.value_names.free(name)
        value = self.view.add_weight(name, weight)
        self._values[name] = value
        return value

    def op(
        self,
        op: str,
        operands: Sequence[Any],
        attrs: Mapping[str, Any],
        results: Sequence[tuple[str, str] | None],
        several: bool,
    ) -> list[onnx_ir.Value | None]:
        if "::" in op:
            outputs = self._native(op, operands, attrs, len(results))
        else:
            built = self.view.build(op, operands, attrs, before=None).producer()
            assert built is not None
            outputs = built.outputs
        if len(outputs) != len(results):
            raise ValueError(f"the op has {len(outputs)} results, not {len(results)}")
        values: list[onnx_ir.Value | None] = []
        maker = outputs[0].producer()
        assert maker is not None
        maker.name = next((result[0] for result in results if result is not None), maker.name)
        for value, result in zip(outputs, results, strict=True):
            value.name = "" if result is None else result[0]
            values.append(None if result is None else value)
            if result is not None:
                _retype(value, parse_type(result[1]))
                self._values[result[0]] = value
        return values

    def _native(
        self, op: str, inputs: Sequence[Any], attrs: Mapping[str, Any], count: int
    ) -> Sequence[onnx_ir.Value]:
        domain, _, op_type = op.partition("::")
        if any(i is not None and not isinstance(i, onnx_ir.Value) for i in inputs):
            raise ValueError(f"the inputs of {op} are values (%name, @name) or None")
        domain = "" if domain == _DEFAULT_DOMAIN else domain
        encoded = {name: self._attr(value) for name, value in attrs.items()}
        self.view.at(None)
        node = self.view.emit(op_type, inputs, encoded, domain=domain, outputs=count)
        if has_subgraph(node):
            self._bind(node)
        return node.outputs

    def _attr(self, value: Any) -> Any:
        if not isinstance(value, Proto):
            return value
        return serde.deserialize_attribute(_parsed(onnx_ir_proto("AttributeProto"), value))

    def _bind(self, node: onnx_ir.Node) -> None:
        """Let subgraphs read the outer values that they name."""
        for inner in dict.fromkeys(captured(node)):
            outer = self._values.get(str(inner.name))
            if outer is None:
                raise ValueError(f"a subgraph reads {inner.name!r}, which nothing defines")
            inner.replace_all_uses_with(outer, replace_graph_outputs=True)

    def finish(self, outputs: Sequence[tuple[str, onnx_ir.Value]]) -> OnnxView:
        for name, value in outputs:
            output = value
            if name != value.name:
                self.view.at(None)
                output = self.view.emit("Identity", [value]).outputs[0]
                output.name, output.type, output.shape = name, value.type, value.shape
            self.model.graph.outputs.append(output)
        return OnnxView(self.model)


def onnx_ir_proto(name: str) -> Any:
    """A message class of the ONNX format."""
    import onnx

    return getattr(onnx, name)


def _parsed(message: Any, literal: Any) -> Any:
    if not isinstance(literal, Proto):
        raise ValueError('expected proto("...")')
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return message.FromString(literal.data)
    except DecodeError:
        raise ValueError(f"the bytes are no {message.__name__}") from None


def _retype(value: onnx_ir.Value, type_: Type) -> None:
    value.type = None
    value.shape = None
    if type_.dtype is not None:
        value.type = onnx_ir.TensorType(from_torch_dtype(type_.dtype))
    if type_.shape is not None:
        value.shape = onnx_ir.Shape([None if d == UNKNOWN_DIM else d for d in type_.shape])
