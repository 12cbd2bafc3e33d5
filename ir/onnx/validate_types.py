"""The types of a file's graph: each op takes its operands, and gives what the file says."""

from __future__ import annotations

import onnx_ir

from ..core.errors import BadInput
from ..core.types import Type, agree
from ..vocab import spec
from .read import OnnxReader


def check_types(view: OnnxReader, where: str) -> None:
    """Raise ``BadInput``, with file and node, at the first op that does not take its operands.

    Ops outside the vocabulary are not looked at.
    """
    for node in view.nodes():
        label = f"{where}: the node {node.name} ({node.op_type})"
        try:
            reading = view.read(node)
        except (ValueError, IndexError, TypeError, KeyError) as error:
            raise BadInput(f"{label} makes no sense: {error}") from error
        if reading is None:
            continue
        op, operands, attrs = reading
        types = [view.type(o) if isinstance(o, onnx_ir.Value) else o for o in operands]
        try:
            inferred = spec(op).infer(types, attrs)
        except (ValueError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
            arguments = ", ".join(str(t) for t in types)
            raise BadInput(f"{label} does not take ({arguments}): {error}") from error
        for value, type_ in zip(node.outputs, inferred, strict=False):
            declared = view.type(value)
            if not agree(Type(None, type_.shape), Type(None, declared.shape)):
                raise BadInput(f"{label} gives {type_}, but the file says {declared}")
