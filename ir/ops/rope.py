"""``rope``: rotary position embedding in its half-split form, as one op.

The usual ONNX form is the plain arithmetic. Where both halves of the tables are the same, as
``cos(concat(f, f))`` is, ``com.microsoft::RotaryEmbedding`` takes one half of them, and is told for
each token in which row its angles are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import InvalidGraph, Refusal
from ..core.types import UNKNOWN_DIM, Type
from ..core.view import Node, Operand, View, is_value
from ..vocab.onnx import MICROSOFT
from .base import Sample, StockDecoder, own_op
from .emit import constant

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape

NODE = "RotaryEmbedding"
_ELEMENTWISE = frozenset({"Cast", "Cos", "Div", "Identity", "Mul", "Sin"})
"""What keeps equal halves equal, beside a number."""


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x cos + [-x₂, x₁] sin`` with x = [x₁, x₂] halved along the last dimension (2104.09864).

    x [..., D] with D even; cos and sin broadcast to x.
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x: Type = operands[0]
    if x.shape and isinstance(x.shape[-1], int) and x.shape[-1] % 2:
        raise ValueError(f"rope: the last dimension of x is {x.shape[-1]}, it must be even")
    return (x,)


def _record(
    tape: Tape, operands: Sequence[onnx_ir.Value | None], attrs: Mapping[str, Any]
) -> onnx_ir.Value:
    x, cos, sin = operands
    size = x.shape[-1] if x is not None and x.shape is not None else None
    if not isinstance(size, int):
        raise InvalidGraph("rope needs a last dimension of known size")
    # Slices, as exporters write them, so that the artifact is read back as this op.
    start, half, end, last = (constant(tape, [n]) for n in (0, size // 2, size, -1))
    low = tape.op("Slice", [x, start, half, last])
    high = tape.op("Slice", [x, half, end, last])
    rotated = tape.op("Concat", [tape.op("Neg", [high]), low], {"axis": -1})
    return tape.op("Add", [tape.op("Mul", [x, cos]), tape.op("Mul", [rotated, sin])])


def _record_node(
    tape: Tape, operands: Sequence[onnx_ir.Value | None], attrs: Mapping[str, Any]
) -> onnx_ir.Value:
    """RotaryEmbedding(x, rows, half of cos, half of sin), or the arithmetic where it is no such."""
    x, cos, sin = operands
    batch = None if x is None or cos is None or sin is None else _batch(x, cos, sin)
    if x is None or cos is None or sin is None or batch is None:
        return _record(tape, operands, attrs)
    # From one table for both, so that all layers share what is made of it.
    rows = constant(tape, [0]) if batch == 1 else _rows(tape, cos)
    tables = [_half(tape, table) for table in (cos, sin)]
    return tape.op(NODE, [x, rows, *tables], domain=MICROSOFT, version=1)


def _batch(x: onnx_ir.Value, cos: onnx_ir.Value, sin: onnx_ir.Value) -> Any:
    """The number of texts that tables [batch, 1, tokens, D] have angles of, 1 where all texts have
    the same ones; ``None`` where the node cannot take them, or x is not [batch, heads, tokens, D].
    """
    if x.shape is None or cos.shape is None or len({x.dtype, cos.dtype, sin.dtype}) > 1:
        return None
    sizes, table = _dims(x), _dims(cos)
    if len(sizes) != 4 or len(table) != 4 or cos.shape != sin.shape:
        return None
    known = (*sizes[2:], table[0])
    same = table[1:] == (1, *sizes[2:]) and table[0] in (1, sizes[0])
    if not same or UNKNOWN_DIM in known or not (_has_halves(cos) and _has_halves(sin)):
        return None
    return table[0]


def _dims(value: onnx_ir.Value) -> tuple[int | str, ...]:
    dims = value.shape.dims if value.shape is not None else ()
    return tuple(d if isinstance(d, int) else d.value or UNKNOWN_DIM for d in dims)


def _has_halves(value: onnx_ir.Value) -> bool:
    """Whether the halves of the last dimension are one tensor twice."""
    node = value.producer()
    while node is not None:
        first, *rest = node.inputs
        if node.op_type == "Concat":
            twice = len(rest) == 1 and rest[0] is first
            return twice and node.attributes["axis"].as_int() in (-1, len(_dims(value)) - 1)
        if node.op_type == "Unsqueeze":
            if _dims(value)[-1] != _dims(node.inputs[0] or value)[-1]:
                return False
        elif node.op_type not in _ELEMENTWISE or any(r is None or _dims(r) for r in rest):
            return False
        if first is None:
            return False
        value, node = first, first.producer()
    return False


def _half(tape: Tape, table: onnx_ir.Value) -> onnx_ir.Value:
    """[batch, 1, tokens, D] => [batch · tokens, D / 2]"""
    half = int(_dims(table)[-1]) // 2
    start, end, last = (constant(tape, [n]) for n in (0, half, -1))
    cut = tape.op("Slice", [table, start, end, last])
    return tape.op("Reshape", [cut, constant(tape, [-1, half])])


def _rows(tape: Tape, table: onnx_ir.Value) -> onnx_ir.Value:
    """0, 1, ... as [batch, tokens]"""
    import onnx_ir

    batch = tape.op("Shape", [table], {"start": 0, "end": 1})
    tokens = tape.op("Shape", [table], {"start": 2, "end": 3})
    zero, one = constant(tape, 0), constant(tape, 1)
    count = tape.op("Squeeze", [tape.op("Mul", [batch, tokens]), constant(tape, [0])])
    counted = tape.op("Range", [zero, count, one])
    counted.dtype = count.dtype = onnx_ir.DataType.INT64  # what has no type is not shared
    return tape.op("Reshape", [counted, tape.op("Concat", [batch, tokens], {"axis": 0})])


def _decode(view: View, node: Node) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """The tables that the halves were cut from, in the form that is written here."""
    x, rows, *halves = view.operands(node)
    if any(view.attrs(node).get(name, 0) for name in ("interleaved", "is_packed_batching")):
        raise Refusal("it turns features in another order", node)
    tables = [_whole(view, half) for half in halves]
    maker = view.producer(rows) if is_value(rows) else None
    lone = view.number(rows) == 0
    counted = (
        maker is not None and view.op(maker) == "reshape" and _counts(view, view.tensor(maker))
    )
    if len(tables) != 2 or not (lone or counted):
        raise Refusal("its rows are not counted through", node)
    return (x, *tables), {}


def _counts(view: View, value: Operand) -> bool:
    node = view.producer(value) if is_value(value) else None
    if node is None or view.op(node) != "arange":
        return False
    start, _, step = view.operands(node)
    return (view.number(start), view.number(step)) == (0, 1)


def _whole(view: View, half: Operand) -> Operand:
    """What ``_half`` made it of."""
    flat = view.producer(half) if is_value(half) else None
    cut = (
        view.producer(view.tensor(flat))
        if flat is not None and view.op(flat) == "reshape"
        else None
    )
    if cut is None or view.op(cut) != "slice":
        raise Refusal("its tables are not halves of others")
    table, start, end = view.operands(cut)[:3]
    shape = view.type(table).shape if is_value(table) else None
    if shape is None or len(shape) != 4 or view.attrs(cut)["dim"] != 3:
        raise Refusal("its tables are not halves of [batch, 1, tokens, width]")
    width, ends = shape[3], (view.number(start), view.number(end))
    if not isinstance(width, int) or ends != (0, width // 2):
        raise Refusal("its tables are not the first halves of others")
    return table


FORM = "rotary-embedding"
"""The name by which a target asks for the one node."""


def _samples() -> list[Sample]:
    rng = torch.Generator().manual_seed(0)
    cases = []
    for shape in ((1, 2, 5, 8), (3, 1, 1, 2)):
        tables = [torch.randn(shape[0], 1, *shape[2:], generator=rng) for _ in range(2)]
        x = torch.randn(shape, generator=rng)
        cases.append(Sample((x, *tables), {}, "x".join(map(str, shape))))
    return cases


ROPE = own_op(
    rope, infer=_infer, record=_record, samples=_samples, forms={FORM: _record_node},
    decoders=(StockDecoder(f"{MICROSOFT}::{NODE}", _decode),),
)  # fmt: skip
