"""What must hold of a file's graph before anything else looks at it: names, order, arity, kinds.

Files are checked as they are written, in protobuf, where each fault still has a name. What an op's
operands must be to each other is checked with their types, when the graph is a view.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import onnx

from ..core.errors import BadInput, near_misses
from ..vocab import is_known, load_dialects, ops_with, spec
from ..vocab.onnx import DOMAIN
from .fatal import why_fatal
from .validate_tensor import DTYPES, check_tensor

_KIND = onnx.AttributeProto
_WORDS = {
    _KIND.FLOAT: "a number", _KIND.INT: "a whole number", _KIND.STRING: "text",
    _KIND.TENSOR: "a tensor", _KIND.GRAPH: "a graph", _KIND.FLOATS: "numbers",
    _KIND.INTS: "whole numbers", _KIND.STRINGS: "texts", _KIND.TENSORS: "tensors",
    _KIND.GRAPHS: "graphs", _KIND.SPARSE_TENSOR: "a sparse tensor",
    _KIND.SPARSE_TENSORS: "sparse tensors", _KIND.TYPE_PROTO: "a type",
    _KIND.TYPE_PROTOS: "types",
}  # fmt: skip
DAMAGED = "the file is damaged or cut short"


def check_model(model: onnx.ModelProto, where: str) -> None:
    """Raise ``BadInput``, with file, node and field, at the first thing that cannot be.

    ``where`` is the file's name. Weights are looked at only for their sizes.
    """
    load_dialects()
    versions = _versions(model.opset_import, where)
    functions = {(f.domain, f.name, f.overload) for f in model.functions}
    if len(functions) < len(model.functions):
        raise BadInput(f"{where}: two functions of the file have the same name")
    _Checker(where, versions, functions).graph(model.graph, ())
    for function in model.functions:
        inside = f"{where}: the function {function.domain}::{function.name}"
        own = _versions(function.opset_import, inside)
        _Checker(inside, own or versions, functions, formal=True).function(function)


def _versions(opsets: Iterable[onnx.OperatorSetIdProto], where: str) -> dict[str, int]:
    for opset in opsets:
        if not 1 <= opset.version < 1 << 31:
            raise BadInput(f"{where}: the opset of {opset.domain or 'ai.onnx'} is {opset.version}")
    return {opset.domain: opset.version for opset in opsets}


class _Checker:
    """Checks of one graph and those inside it; ``formal`` where attributes may be parameters."""

    def __init__(
        self, where: str, versions: dict[str, int], functions: set[tuple[str, str, str]],
        formal: bool = False,
    ) -> None:  # fmt: skip
        self._where, self._versions, self._functions = where, versions, functions
        self._formal = formal

    def graph(self, graph: onnx.GraphProto, outer: tuple[set[str], ...]) -> None:
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise self._wrong(f"the weight {name!r} is sparse, and sparse weights are not read")
        self._text(i.name for i in (*graph.initializer, *graph.input, *graph.output))
        constants: set[str] = set()
        for tensor in graph.initializer:
            if not tensor.name:
                raise self._wrong("one of its initializers has no name")
            if tensor.name in constants:
                raise self._wrong(
                    f"the model names the initializer {tensor.name!r} twice, and tools differ in "
                    "which of the two they take: leave one of them away"
                )
            constants.add(tensor.name)
            check_tensor(tensor, f"{self._where}: the initializer {tensor.name!r}")
        names: set[str] = set()
        for info in graph.input:
            if not info.name or info.name in names:
                raise self._wrong(f"two of its inputs are named {info.name!r}")
            names.add(info.name)
            self._type(info, "input")
        self._nodes(graph.node, names | constants, outer, {i.name for i in graph.output})
        for info in graph.output:
            self._type(info, "output")

    def function(self, function: onnx.FunctionProto) -> None:
        self._nodes(function.node, set(function.input), (), set(function.output))

    def _nodes(
        self, nodes: Sequence[onnx.NodeProto], names: set[str], outer: tuple[set[str], ...],
        outputs: set[str],
    ) -> None:  # fmt: skip
        for node in nodes:
            self._text((node.name, node.op_type, node.domain, *node.input, *node.output))
            for name in filter(None, node.output):
                if name in names:
                    raise self._wrong(f"makes {name!r}, which is made already", node)
                names.add(name)
        scopes = (*outer, names)
        for node in nodes:
            for name in filter(None, node.input):
                if not any(name in scope for scope in scopes):
                    raise self._wrong(f"reads {name!r}, which nothing makes: {DAMAGED}", node)
            self._node(node)
            for attribute in node.attribute:
                self._attribute(node, attribute, scopes)
        for name in outputs:
            if not any(name in scope for scope in scopes):
                raise self._wrong(f"nothing makes the output {name!r}: {DAMAGED}")

    def _node(self, node: onnx.NodeProto) -> None:
        if not node.op_type:
            raise self._wrong(f"has no op: {DAMAGED}", node)
        names = [a.name for a in node.attribute]
        if len(set(names)) < len(names):
            raise self._wrong("has two attributes of one name", node)
        if node.domain == DOMAIN:
            self._own(node)
            return
        if (node.domain, node.op_type, node.overload) in self._functions:
            return
        fatal = why_fatal(node, node.input)
        if fatal:
            raise self._wrong(fatal, node)
        schema = _schema(node.domain, node.op_type, self._versions.get(node.domain, 1))
        if schema is None:
            return
        self._count(node, node.input, "input", schema.min_input, schema.max_input)
        for i, name in enumerate(node.input):
            formal = schema.inputs[min(i, len(schema.inputs) - 1)]
            if not name and formal.option != onnx.defs.OpSchema.FormalParameterOption.Optional:
                raise self._wrong(f"leaves its input {formal.name} out", node)
        self._count(node, node.output, "output", schema.min_output, schema.max_output)
        attributes = dict(zip(names, node.attribute, strict=True))
        for name, attribute in attributes.items():
            declared = schema.attributes.get(name)
            if declared is None:
                raise self._wrong(f"has an attribute {name!r}, and the op has none of it", node)
            type_ = int(declared.type.value)
            if attribute.type != type_:
                kind = _WORDS.get(attribute.type, "of no known kind")
                raise self._wrong(f"its attribute {name} is {kind}, not {_WORDS[type_]}", node)
        for name, declared in schema.attributes.items():
            if declared.required and name not in attributes:
                raise self._wrong(f"lacks the attribute {name!r}", node)

    def _count(
        self, node: onnx.NodeProto, names: Sequence[str], what: str, least: int, most: int
    ) -> None:
        # At the end of the list an absent one may be written as an empty name.
        count = max((i for i, name in enumerate(names, 1) if name), default=0)
        if not least <= len(names) or count > most:
            bounds = str(least) if least == most else f"{least} to {most}"
            raise self._wrong(f"has {count} {what}s, and the op takes {bounds}", node)

    def _own(self, node: onnx.NodeProto) -> None:
        """Ops of ours, which no other tool writes, are those that are declared here."""
        if not is_known(node.op_type) or not spec(node.op_type).own:
            raise self._wrong(
                f"its domain is {DOMAIN!r}, which has no op of this name; "
                f"{near_misses(node.op_type, ops_with(lambda op: op.own))}", node,
            )  # fmt: skip
        declared = spec(node.op_type)
        least, most = declared.arity
        if not least <= len(node.input) <= (most or len(node.input)):
            raise self._wrong(f"has {len(node.input)} inputs, and the op takes {least}", node)
        unknown = [a.name for a in node.attribute if a.name not in declared.attrs]
        if unknown:
            raise self._wrong(f"has an attribute {unknown[0]!r}, and the op has none of it", node)

    def _attribute(
        self, node: onnx.NodeProto, attribute: onnx.AttributeProto, scopes: tuple[set[str], ...]
    ) -> None:
        name = attribute.name
        if attribute.ref_attr_name and not self._formal:
            raise self._wrong(f"its attribute {name} is a parameter outside of a function", node)
        if attribute.type not in _WORDS:
            raise self._wrong(f"its attribute {name} is of no known kind", node)
        tensors = [*attribute.tensors, *([attribute.t] if attribute.type == _KIND.TENSOR else [])]
        if attribute.ref_attr_name:
            return
        for tensor in tensors:
            check_tensor(tensor, f"{self._label(node)}: its attribute {name}")
        graphs = [*attribute.graphs, *([attribute.g] if attribute.type == _KIND.GRAPH else [])]
        for graph in graphs:
            inner = _Checker(self._label(node), self._versions, self._functions, self._formal)
            inner.graph(graph, scopes)

    def _type(self, info: onnx.ValueInfoProto, what: str) -> None:
        if info.type.WhichOneof("value") != "tensor_type":
            return
        tensor = info.type.tensor_type
        if tensor.elem_type not in DTYPES and (tensor.elem_type or what == "input"):
            raise self._wrong(f"the {what} {info.name!r} is of an unknown dtype: {DAMAGED}")

    def _text(self, names: Iterable[str | bytes]) -> None:
        """Protobuf gives what is not UTF-8 as the bytes that it is."""
        for name in names:
            if isinstance(name, bytes):
                raise self._wrong(f"the name {name!r} is not text: {DAMAGED}")

    def _label(self, node: onnx.NodeProto) -> str:
        return f"{self._where}: the node {node.name or node.op_type} ({node.op_type})"

    def _wrong(self, what: str, node: onnx.NodeProto | None = None) -> BadInput:
        if node is None:
            return BadInput(f"{self._where}: {what}")
        return BadInput(f"{self._label(node)}{': ' if what.startswith('its') else ' '}{what}")


@cache
def _schema(domain: str, op_type: str, version: int) -> Any:
    """What onnx says of an op; ``None`` for ops of others."""
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


def open_dims(infos: Iterable[onnx.ValueInfoProto]) -> None:
    """Dimensions of less than 0, which runtimes take for any size, become open; in place."""
    for info in infos:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                dim.ClearField("dim_value")
