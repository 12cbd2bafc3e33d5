"""Names of sites: dotted, unique, and the same for a model's FX graph and its ONNX export."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ..core.view import Node, Value, View
from ..vocab import traits
from .weights import readers, weight_behind

_MADE_UP = re.compile(r"(?:val|const|onnx|onnx::\w+|t|_?tensor_constant|lifted_tensor|w)?[_:]*\d*")
_TURNED = re.compile(r"(\.matrix)?(\.T)?$")
"""What ``ir/canonical/linear`` adds to the name of a constant that it flattens or transposes."""
_QUANTIZED = re.compile(r"(?:_quantized|_DequantizeLinear(?:_Output)?(?:\.folded)?)$")
"""What ONNX Runtime's quantizer, and folding after it, add to a weight's name."""


def site_names(view: View, nodes: Sequence[Node]) -> dict[Node, str]:
    """A name for each node that holds a weight (operand 1, of an embedding operand 0).

    It is the weight's name without ``.weight`` where that name is the model's own and the weight is
    no other site's; else the path of the module that made the node; else the node's own name.
    """
    proposals = {node: _proposal(view, node) for node in nodes}
    counts = Counter(proposals.values())
    names: dict[Node, str] = {}
    taken: set[str] = set()
    for node, name in proposals.items():
        index = 0
        unique = name if counts[name] == 1 else f"{name}.{index}"
        while unique in taken or (unique != name and unique in counts):
            index += 1
            unique = f"{name}.{index}"
        taken.add(unique)
        names[node] = unique
    return names


def _proposal(view: View, node: Node) -> str:
    table = traits(view.op(node)).table
    weight = weight_behind(view, node) if table is None else view.tensor(node, table)
    name = _of_weight(view, node, weight)
    return name or view.scope(node) or view.name(node)


def _of_weight(view: View, node: Node, weight: Value) -> str:
    if len(readers(view, weight)) > 1:
        return ""
    name = _QUANTIZED.sub("", _TURNED.sub("", view.name(weight), count=1))
    head, dot, last = name.rpartition(".")
    if traits(view.op(node)).stored_linear or last == "codes":
        return head.removesuffix(".weight")
    if last == "weight" and dot:
        return head
    return "" if not dot or _MADE_UP.fullmatch(last) or _MADE_UP.fullmatch(name) else name
