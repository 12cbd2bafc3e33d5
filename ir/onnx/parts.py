"""Parts of native ONNX nodes: attributes in and out, captured values, dimensions, places."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import onnx_ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype

from ..core.tensors import has_weight
from ..core.types import DTYPE_NAMES, UNKNOWN_DIM, Type
from ..core.view import NO_SCOPE
from ..vocab import spec

Operand: TypeAlias = onnx_ir.Value | float | int | bool | None
"""``core.view.Operand`` in native words."""
PLAIN = frozenset({
    onnx_ir.AttributeType.INT, onnx_ir.AttributeType.INTS, onnx_ir.AttributeType.FLOAT,
    onnx_ir.AttributeType.FLOATS, onnx_ir.AttributeType.STRING,
})  # fmt: skip
"""Attributes that are numbers or text."""


TORCH_DTYPES: dict[onnx_ir.DataType, torch.dtype] = {
    from_torch_dtype(dtype): dtype for dtype in DTYPE_NAMES
}
"""The native dtypes that torch computes with."""


class Names:
    """The names in use; every new one is unlike the others."""

    def __init__(self, taken: Iterable[str | None] = ()) -> None:
        self._taken = {name for name in taken if name}
        self._count = 0

    def take(self, base: str) -> str:
        """``base`` itself where it is free, else with a number."""
        name = base
        while name in self._taken:
            self._count += 1
            name = f"{base}_{self._count}"
        self._taken.add(name)
        return name

    def reserve(self, names: Iterable[str]) -> None:
        """Count names as taken before anything bears them."""
        self._taken.update(names)

    def free(self, name: str | None) -> None:
        self._taken.discard(str(name))


SCOPE_KEYS = ("pkg.torch.onnx.name_scopes", "graphwright.scope")
"""Metadata of a node that holds its module path, or the list of scopes that it stands in."""
RULE_KEY = "graphwright.rule"
STEP_KEY = "graphwright.pass"
"""Metadata of a node that a rewrite made: the rule's name, and the number of its pass."""


def name_everything(graph: onnx_ir.Graph) -> tuple[Names, Names]:
    """Give each node a name of its own; the names of the values and of the nodes."""
    values = [v.name for v in graph.inputs] + list(graph.initializers)
    values += [v.name for n in graph.all_nodes() for v in n.outputs]
    for inner in (g for node in graph for g in subgraphs(node)):
        # What is added outside must not be called as something that a graph inside hides.
        values += [v.name for v in inner.inputs] + list(inner.initializers)
    nodes = Names()
    for node in graph:
        node.name = nodes.take(node.name or str(node.op_type))
        _keep_scope(node)
    return Names(values), nodes


def _keep_scope(node: onnx_ir.Node) -> None:
    """Note the module path that TorchScript puts into names: ``/encoder/dense/MatMul``."""
    path, slash, _ = str(node.name).rpartition("/")
    if slash and path.startswith("/") and not any(key in node.metadata_props for key in SCOPE_KEYS):
        node.metadata_props["graphwright.scope"] = path[1:].replace("/", ".")


class After:
    """The place right behind a node: what is inserted there follows in the order of insertion."""

    def __init__(self, node: onnx_ir.Node) -> None:
        self.last = node
        self.name = node.name
        self.metadata_props = node.metadata_props


class End(After):
    """The end of a graph, where a graph is made: nodes take the place's name and metadata."""

    def __init__(self, graph: onnx_ir.Graph, name: str, metadata: dict[str, str]) -> None:
        self.last: Any = graph
        self.name = name
        self.metadata_props = metadata


Place: TypeAlias = onnx_ir.Node | After
"""Where a node is inserted: before another one, or at a place."""


def insert(node: onnx_ir.Node, place: Place) -> None:
    """Put a node before another, or at a place."""
    if isinstance(place, After):
        place.last.append(node)
        place.last = node
    else:
        place.prepend(node)


def dim_of(dim: Any) -> int | str:
    """A native dimension in our words."""
    if isinstance(dim, int):
        return dim
    value = getattr(dim, "value", dim)
    return UNKNOWN_DIM if value is None else (value if isinstance(value, int) else str(value))


def innermost_scope(text: str) -> str:
    """The module path out of the exporter's list of scopes: its last entry is the op itself."""
    if not text.startswith("["):
        return text
    names = [part.strip().strip("'\"") for part in text.strip("[]").split(",")]
    return names[-2].removeprefix(NO_SCOPE) if len(names) > 1 else ""


def set_type(value: onnx_ir.Value, type_: Type) -> None:
    """Declare as much of a type as is known; a value that is not a tensor stays what it is."""
    if is_no_tensor(value):
        return
    if type_.dtype is not None:
        set_dtype(value, from_torch_dtype(type_.dtype))
    if type_.shape is not None:
        dims = [None if d == UNKNOWN_DIM else d for d in type_.shape]
        value.shape = onnx_ir.Shape(dims)


def is_no_tensor(value: onnx_ir.Value) -> bool:
    """Whether a value is known to be a sequence or an optional one."""
    return isinstance(value.type, onnx_ir.SequenceType | onnx_ir.OptionalType)


def set_dtype(value: onnx_ir.Value, dtype: onnx_ir.DataType) -> None:
    """Declare a dtype by a type of the value's own: copies of a model share what it had."""
    if value.dtype != dtype:
        value.type = onnx_ir.TensorType(dtype)


def is_plain_model(model: onnx_ir.Model) -> bool:
    """Whether all values of the main graph are ``onnx_ir.Value`` itself, compared by identity."""
    graph = model.graph
    outputs = (v for node in graph for v in node.outputs)
    values = itertools.chain(graph.inputs, graph.initializers.values(), outputs)
    return all(type(v) is onnx_ir.Value for v in values)


def is_used(node: onnx_ir.Node) -> bool:
    return any(value.uses() or value.is_graph_output() for value in node.outputs)


def is_untyped_constant(value: onnx_ir.Value) -> bool:
    """Whether a value is a constant that torch has no dtype for: a part of what reads it."""
    return value.const_value is not None and not has_weight(value.const_value)


def has_subgraph(node: onnx_ir.Node) -> bool:
    """Whether an attribute of the node is a graph (``If``, ``Loop``, ``Scan``)."""
    if not node.attributes:
        return False
    kinds = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
    return any(a.type in kinds for a in node.attributes.values())


def own_graphs(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    """The graphs in a node's attributes."""
    for attr in node.attributes.values():
        if attr.type == onnx_ir.AttributeType.GRAPH:
            yield attr.value
        elif attr.type == onnx_ir.AttributeType.GRAPHS:
            yield from attr.value


def subgraphs(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    """The graphs in a node's attributes, and those in the nodes of these."""
    if not has_subgraph(node):
        return
    for graph in own_graphs(node):
        yield graph
        for inner in graph:
            yield from subgraphs(inner)


def captured(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """Values of the outer graph that a node's subgraphs read."""
    for graph in own_graphs(node):
        nodes = list(graph.all_nodes())
        inner = set(graph.inputs) | set(graph.initializers.values())
        inner |= {v for n in nodes for v in n.outputs}
        for deeper in (g for n in nodes for g in subgraphs(n)):
            inner |= set(deeper.inputs) | set(deeper.initializers.values())
        used = [v for n in nodes for v in n.inputs if v is not None] + list(graph.outputs)
        yield from (v for v in used if v not in inner)


def encode(attrs: Mapping[str, Any]) -> list[onnx_ir.Attr]:
    """Attributes of the vocabulary as native ones; ``None`` is left out."""
    encoded = []
    for name, value in attrs.items():
        if value is None:
            continue
        if isinstance(value, torch.dtype):
            value = int(from_torch_dtype(value))
        if isinstance(value, bool):
            value = int(value)
        if isinstance(value, tuple | list) and not value:
            encoded.append(onnx_ir.AttrInt64s(name, []))
            continue
        encoded.append(onnx_ir.convenience.convert_attribute(name, value))
    return encoded


def decode(node: onnx_ir.Node) -> dict[str, Any]:
    """Attributes of a node of our own domain, in the types that the vocabulary declares."""
    declared = spec(node.op_type).attrs
    decoded = dict(declared)
    for name, attr in node.attributes.items():
        value = attr.value
        default = declared.get(name)
        if isinstance(default, bool):
            value = bool(value)
        elif name == "dtype":
            value = to_torch_dtype(onnx_ir.DataType(value))
        elif isinstance(value, list):
            value = tuple(value)
        decoded[name] = value
    return decoded
