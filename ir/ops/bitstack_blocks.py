"""Names and order of the blocks of stacked weights in an ONNX model.

A block is some initializers named ``bitstack.PLACE.PART``; a ``Concat`` joins the blocks of a site.
The data file holds all other tensors first and then the blocks by their places, so that the
model of a smaller size needs its beginning only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx_ir

_BLOCK = re.compile(r"bitstack\.(\d{6,})\.")


def block_name(place: int, part: str) -> str:
    """The initializer of one part of the block that comes at ``place`` of the order."""
    return f"bitstack.{place:06d}.{part}"


def place_of(name: str | None) -> int | None:
    """The place in the order of the block that an initializer belongs to, if it does."""
    match = _BLOCK.match(name or "")
    return int(match[1]) if match else None


def in_file_order(values: Iterable[onnx_ir.Value]) -> list[onnx_ir.Value]:
    """Initializers as a data file holds them: blocks last, by their places."""
    return sorted(values, key=lambda v: -1 if (p := place_of(v.name)) is None else p)


def forget_types(model: onnx_ir.Model) -> None:
    """Leave out the types of what is computed from blocks until they are summed.

    They depend on the number of blocks, and would make the file of a smaller size larger.
    """
    reached = [value for node in joins(model) for value in node.outputs]
    while reached:
        value = reached.pop()
        value.shape = value.type = None
        for user in value.consumers():
            if user.op_type != "ReduceSum":
                reached.extend(user.outputs)


def joins(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """The nodes that put the blocks of a site together."""
    return [
        node
        for node in model.graph
        if node.op_type == "Concat" and all(v and place_of(v.name) is not None for v in node.inputs)
    ]
