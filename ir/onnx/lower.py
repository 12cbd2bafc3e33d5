"""Lowering: an ONNX graph in the vocabulary becomes one of stock ONNX (and ``com.microsoft``) ops.

Each op of the domain ``graphwright`` is written out in ops that the target has, as its declaration
says: in the form that the target likes, or in the usual one.
"""

from __future__ import annotations

from typing import Any

import onnx_ir
from onnx_ir.tape import Tape

from ..core.errors import InvalidGraph
from ..core.view import Origin
from ..ops import OwnOp
from ..ops.base import Record
from ..vocab import OpSpec, spec
from ..vocab.onnx import DOMAIN
from ..vocab.targets import CPU, Target
from .builder import OnnxBuilder
from .view import OnnxView


def lower(view: OnnxView, target: Target = CPU) -> int:
    """Expand every node of the domain ``graphwright``, in place; the number of nodes lowered.

    Raises ``InvalidGraph`` where an op has no form that stock ONNX Runtime runs.
    """
    count = 0
    previous = view.origin
    for node in [n for n in view.nodes() if n.domain == DOMAIN]:
        op = view.op(node)
        view.origin = Origin(f"lower-{op.replace('_', '-')}")
        lowered = _lowered(Lowering(view, node), spec(op), target)
        old = node.outputs[0]
        view.retype(lowered, old)
        view.replace(old, lowered)
        view.erase_dead(node)
        count += 1
    view.origin = previous
    view.drop_unused_weights()
    view.model.graph.opset_imports.pop(DOMAIN, None)
    return count


class Lowering(OnnxBuilder):
    """A node to be lowered, and a builder before it."""

    def __init__(self, view: OnnxView, node: onnx_ir.Node) -> None:
        super().__init__(view, node)
        self.node = node
        self.operands: tuple[Any, ...] = view.operands(node)
        self.attrs = view.attrs(node)


def _lowered(e: Lowering, op: OpSpec, target: Target) -> onnx_ir.Value:
    """The result of the stock ops that stand for a node."""
    form = target.form(op.name) or ""
    if op.onnx is not None and op.onnx.lower is not None:
        return op.onnx.forms.get(form, op.onnx.lower)(e)
    if isinstance(op, OwnOp):
        return _recorded(e, op, op.forms.get(form, op.record))
    raise InvalidGraph(f"{e.view.name(e.node)}: {op.name} has no ONNX form")


def _recorded(e: Lowering, op: OwnOp, record: Record) -> onnx_ir.Value:
    """Splice in the nodes that one of the op's forms records."""
    tape = Tape()
    padded = [*e.operands, *[None] * (len(op.operands) - len(e.operands))]
    result = record(tape, padded, e.attrs)
    e.view.adopt(tape.initializers)
    e.view.splice(tape.nodes, before=e.node)
    return result
