"""Additions to a ``linear_nbit`` that are a part of it: what real zero points add, and the bias.

add(linear_nbit(x, c, s), matmul(groupsum(x), ((mid - z) s)ᵀ)) => linear_nbit(x, c, s, z)
add(linear_nbit(x, ...), b)                                    => linear_nbit(x, ..., b)
"""

from __future__ import annotations

import re
from typing import Any

import onnx_ir
import torch
from onnx_ir.tape import Tape

from ..core.view import Node, Operand, Value, View
from ..core.weights import CastWeight
from ..onnx.forms import native_value, same_form, stand_in
from ..onnx.view import OnnxView, native_view
from ..ops.matmul_nbits import Form
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule

OURS = re.compile(r"(/(Add|MatMulNBits|linear_nbit)(_\d+)?)+$")
"""What lowering and reading back have put behind a node's name: taken off, so that names do not
grow from artifact to artifact."""


def _grown(view: View, main: Node) -> str:
    """A name for what stands for a ``linear_nbit`` and an addition to it."""
    name = view.name(main)
    base = OURS.sub("", name)
    return base if base != name else f"{base}/linear_nbit"


def source_of(value: onnx_ir.Value) -> onnx_ir.Value:
    """What the first operands of nodes lead back to."""
    node = value.producer()
    while node is not None and node.inputs and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def dtype_of(value: onnx_ir.Value) -> onnx_ir.DataType | None:
    """The dtype of a value, be it only said by the nearest cast above."""
    node = value.producer()
    while value.dtype is None and node is not None and node.inputs and node.inputs[0] is not None:
        if node.op_type == "Cast":
            return onnx_ir.DataType(node.attributes["to"].value)
        value = node.inputs[0]
        node = value.producer()
    return value.dtype


class FuseRealZeros(Rule):
    """add(linear_nbit(x, c, s), matmul(groupsum(x), ((mid - z) s)ᵀ)) => linear_nbit(x, c, s, z)"""

    name = "fuse-real-zeros"

    def pattern(self, p: Any, x: Any, codes: Any, scales: Any, side: Any) -> Any:
        return p.add(p.linear_nbit(x, codes, scales), side)

    def where(self, match: Match) -> None:
        if _real_zeros(match) is None:
            match.refuse("what is added is not what real zero points add")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, main = build.view, _main(build.match)
        parts = _real_zeros(build.match)
        assert parts is not None
        scales, zeros, attrs = parts
        operands = [bound["x"], bound["codes"], *_of_one_dtype(view, scales, zeros)]
        return build.linear_nbit(*operands, name=_grown(view, main), **attrs)


def _of_one_dtype(view: View, scales: Value, zeros: Value) -> tuple[Value, Value]:
    """Scales that were widened for the node as narrow as the zero points again, or where that
    would round them, zero points as wide as they are."""
    kept, others = view.weight(scales), view.weight(zeros)
    assert kept is not None and others is not None
    if kept.dtype == others.dtype:
        return scales, zeros
    numbers = kept.read()
    if torch.equal(numbers.to(others.dtype).to(kept.dtype), numbers):
        name = view.name(scales).removesuffix(".written")
        return view.add_weight(name, CastWeight(kept, others.dtype)), zeros
    return scales, view.add_weight(view.name(zeros), CastWeight(others, kept.dtype))


def _main(match: Match) -> Node:
    return next(n for n in match.nodes if match.view.op(n) == "linear_nbit")


def _real_zeros(match: Match) -> tuple[Value, Value, dict[str, Any]] | None:
    """Scales, zero points z and attributes in ``matmul(sums, transpose(mul(sub(mid, z), s)))``."""
    view, side, x = native_view(match.view), native_value(match["side"]), native_value(match["x"])
    value = side
    for op, operand in (("matmul", 1), ("transpose", 0)):
        node = view.producer(value)
        if node is None or view.op(node) != op:
            return None
        value = view.tensor(node, operand)
    offset = view.producer(value)
    node = None if offset is None else view.producer(view.tensor(offset))
    if offset is None or node is None or (view.op(offset), view.op(node)) != ("mul", "sub"):
        return None
    scales, zeros = (source_of(view.tensor(n, 1)) for n in (offset, node))
    work, written = dtype_of(value), native_value(match["scales"])
    if view.weight(zeros) is None or work is None or not _written(view, written, scales):
        return None
    attrs = dict(match.view.attrs(_main(match)))
    leaves = {stand_in(v): v for v in (x, scales, zeros)}
    inner, *stored = leaves
    block = Form(Tape(), attrs).block
    for group in (attrs["group"], 0):
        form = Form(Tape(), {**attrs, "group": group})
        correction = form.correction(inner, *(form.cast(leaf, work) for leaf in stored))
        if form.block == block and same_form(side, correction, leaves):
            return Value(scales), Value(zeros), {**attrs, "group": group}
    return None


def _written(view: OnnxView, scales: onnx_ir.Value, stored: onnx_ir.Value) -> bool:
    """Whether scales are those stored, or what ``Form.written`` made of them."""
    if scales is stored:
        return True
    final, source = view.weight(scales), view.weight(stored)
    if final is None or source is None or view.name(scales) != f"{view.name(stored)}.written":
        return False
    return torch.equal(final.read(), source.read().to(final.dtype).expand(final.shape))


class FuseNBitBias(Rule):
    """add(linear_nbit(x, codes, scales, zeros), b) => linear_nbit(x, codes, scales, zeros, b)"""

    name = "fuse-nbit-bias"

    def pattern(self, p: Any, x: Any, codes: Any, scales: Any, b: Any) -> Any:
        return p.add(p.linear_nbit(x, codes, scales, rest=True), b)

    def where(self, match: Match) -> None:
        view, main = match.view, _main(match)
        handle, width = view.weight(_bias(match)), view.attrs(main)["out_features"]
        if handle is None:
            match.refuse("b is not a constant")
        elif handle.shape != (width,):
            match.refuse(f"b {list(handle.shape)} is not a bias of {width} outputs")
        if len(view.operands(main)) > 4:
            match.refuse("the linear has a bias already")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, main = build.view, _main(build.match)
        operands = [*(*view.operands(main), None)[:4], _bias(build.match)]
        return build.linear_nbit(*operands, name=_grown(view, main), **view.attrs(main))


def _bias(match: Match) -> Operand:
    """What is added, before a cast to the dtype that the linear computes in."""
    b = match["b"]
    node = match.view.producer(match.value("b"))
    if node is not None and match.view.op(node) == "cast":
        return match.view.tensor(node)
    return b


RULES: tuple[type[Rule], ...] = (FuseRealZeros, FuseNBitBias)
