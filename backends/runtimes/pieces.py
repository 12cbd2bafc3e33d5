"""Large ``MatMulNBits`` nodes of a model that is run for a check, cut into nodes of fewer columns.

Without rounded activations ONNX Runtime writes the whole matrix of such a node as float32 before it
multiplies more than one row by it: for a head of 152,000 words by 896 these are 544 MB, the most
that a check of a 0.5B model takes. Each piece writes its own part of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

NUMBERS = 1 << 24
"""Of a matrix that is left whole: 64 MB in float32."""
_WHOLE = (0, 4)
"""Inputs that are not by rows of the matrix: what is multiplied, and the groups of its columns."""


def in_pieces(model: bytes) -> bytes:
    """The model, each of its own ``MatMulNBits`` nodes that holds more than ``NUMBERS`` as several
    whose results are joined. Weights stay where they lie: a piece reads its part of them.

    Each column of a result is the sum of the same products. Nodes in bodies stay whole.
    """
    import onnx

    proto = onnx.load_model_from_string(model)
    graph, nodes = proto.graph, list[Any]()
    weights = {weight.name: weight for weight in graph.initializer}
    casts = {
        node.output[0]: node for node in graph.node
        if node.op_type == "Cast" and node.input[0] in weights
    }  # fmt: skip
    held = {*weights, *casts}
    for node in graph.node:
        if _is_large(node, held):
            nodes += _pieces(node, graph, weights, casts)
        else:
            nodes.append(node)
    if len(nodes) == len(graph.node):
        return model
    outputs = {output.name for output in graph.output}
    used = outputs.union(_read(nodes))
    nodes = [node for node in nodes if node.output[0] in used or node.output[0] not in casts]
    used = outputs.union(_read(nodes))
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [weight for weight in graph.initializer if weight.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return bytes(proto.SerializeToString())


def _read(nodes: Iterable[Any]) -> Iterator[str]:
    """What nodes read, and those of the bodies in them."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _read(body.node)


def _sizes(node: Any) -> tuple[int, int]:
    known = {a.name: a.i for a in node.attribute}
    return known["N"], known["K"]


def _is_large(node: Any, held: Collection[str]) -> bool:
    if node.op_type != "MatMulNBits" or math.prod(_sizes(node)) <= NUMBERS:
        return False
    return all(name in held for name in node.input[1:] if name)


def _pieces(
    node: Any, graph: Any, weights: Mapping[str, Any], casts: Mapping[str, Any]
) -> Iterator[Any]:
    import onnx

    rows, columns = _sizes(node)
    step, parts = max(1, NUMBERS // columns), []
    for start in range(0, rows, step):
        count = min(step, rows - start)
        piece = _renamed(node, start)
        for place, name in enumerate(node.input):
            if place in _WHOLE or not name:
                continue
            source = casts[name].input[0] if name in casts else name
            part = _part(weights[source], f"{node.output[0]}.{place}.{start}", start, count, rows)
            graph.initializer.append(part)
            piece.input[place] = part.name
            if name in casts:
                cast = _renamed(casts[name], f"{node.output[0]}.{start}")
                cast.input[0] = part.name
                piece.input[place] = cast.output[0]
                yield cast
        for attribute in piece.attribute:
            if attribute.name == "N":
                attribute.i = count
        parts.append(piece.output[0])
        yield piece
    yield onnx.helper.make_node("Concat", parts, node.output[:1], axis=-1)


def _renamed(node: Any, by: object) -> Any:
    """By its output, which has a name of its own in the graph; nodes may have none."""
    import onnx

    copy = onnx.NodeProto.FromString(node.SerializeToString())
    copy.name = f"{node.output[0]}.{by}"
    copy.output[:] = [f"{node.output[0]}.{by}"]
    return copy


def _part(weight: Any, name: str, start: int, count: int, rows: int) -> Any:
    """Some rows of a weight that has so many, row by row."""
    import onnx

    part = onnx.TensorProto(name=name, data_type=weight.data_type)
    part.dims[:] = [weight.dims[0] * count // rows, *weight.dims[1:]]
    if weight.data_location != onnx.TensorProto.EXTERNAL:
        flat = onnx.numpy_helper.to_array(weight).reshape(rows, -1)
        kept = onnx.numpy_helper.from_array(flat[start : start + count].reshape(part.dims))
        part.raw_data = kept.raw_data
        return part
    held = {entry.key: entry.value for entry in weight.external_data}
    each = int(held["length"]) // rows
    held["offset"] = str(int(held.get("offset", 0)) + start * each)
    held["length"] = str(count * each)
    part.data_location = onnx.TensorProto.EXTERNAL
    for key in ("location", "offset", "length"):
        part.external_data.add(key=key, value=held[key])
    return part
