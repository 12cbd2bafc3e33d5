"""``linear_w8a8_static``: 8-bit weights times activations rounded to 8 bits in a fixed range.

Weights have a scale a row; activations one step and one zero point for all tokens, which are
constants of the graph, so that nothing is looked for as the model runs. The ONNX form is QDQ, in
standard ops alone: ONNX Runtime makes a ``QuantizeLinear`` and a ``MatMulIntegerToFloat`` of it,
but where x is a matrix and a bias or an activation follows; for a CPU these two are written.
Measured with 1.31 on one AVX-512 VNNI core, other processes beside it, in ms for 1 / 16 / 128 rows
(``python -m graphwright.tools.bench.w8a8``):

===========================  ===========================  ============================
form                         K x N = 1536 x 384           2048 x 2048
===========================  ===========================  ============================
this one                     0.010 / 0.028 / 0.179        0.050 / 0.162 / 1.32
linear_w8a8                  0.013 / 0.036 / 0.217        0.055 / 0.171 / 1.47
MatMul in float32            0.029 / 0.084 / 0.615        0.199 / 1.12 / 41.5
===========================  ===========================  ============================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import Refusal
from ..core.view import Node, Operand, View, is_value
from ..vocab.linear import linear_macs
from ..vocab.onnx import MICROSOFT
from ..vocab.spec import Macs
from .base import Sample, StockDecoder, own_op
from .emit import cast, constant
from .linear_w8a8 import FORM, NODE, dense, ended, infer, known, sizes

if TYPE_CHECKING:
    from onnx_ir.tape import Tape

MOST = 255
"""The greatest code of an activation."""


def linear_w8a8_static(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, *,
    in_features: int, out_features: int, step: float, zero: int,
) -> Tensor:  # fmt: skip
    """``((q - zero) @ codes.T) * step * scales + bias``, ``q = round(x / step) + zero`` within 0 to
    255, in the dtype of ``x``.

    x [..., K]; codes int8 [N, K]; scales f32 [N]; bias [N]. Products are summed in float32, which
    is exact to one part in 2^24.
    """
    rounded = (x.float() / step).round().add_(zero).clamp_(0, MOST).sub_(zero)
    y = torch.nn.functional.linear(rounded, codes.float()) * step * scales
    return (y if bias is None else y + bias.float()).to(x.dtype)


# --- the ONNX forms -------------------------------------------------------------------------------


def _record(tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]) -> ir.Value:
    x, scales, bias, (rounded, turned, step, zero) = _rounded(tape, operands, attrs)
    weight = tape.op("DequantizeLinear", [turned, scales], {"axis": 1})
    y = tape.op("MatMul", [tape.op("DequantizeLinear", [rounded, step, zero]), weight])
    return ended(tape, y, bias, x)


def _record_fused(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]
) -> ir.Value:
    """As ``_record``, by the nodes that ONNX Runtime's CPU provider makes of it."""
    x, scales, bias, (rounded, turned, step, zero) = _rounded(tape, operands, attrs)
    inputs = [rounded, turned, step, scales, zero, *([] if bias is None else [None, bias])]
    y = tape.op(NODE, inputs, domain=MICROSOFT, version=1)
    return ended(tape, y, None, x)


_Rounded = tuple[ir.Value, ir.Value, ir.Value, ir.Value]


def _rounded(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]
) -> tuple[ir.Value, ir.Value, ir.Value | None, _Rounded]:
    """x, scales and bias; and codes of x, turned codes of the weight, the step and zero point.

    Unlike what other tools write, codes are turned in the graph: the runtime folds that, and
    reading such a form back takes no file of theirs for ours.
    """
    x, codes, scales, bias = known("linear_w8a8_static", operands)
    work = ir.DataType.FLOAT
    step, zero = constant(tape, attrs["step"], np.float32), constant(tape, attrs["zero"], np.uint8)
    rounded = tape.op("QuantizeLinear", [cast(tape, x, work), step, zero])
    turned = tape.op("Transpose", [codes], {"perm": [1, 0]})
    wide = None if bias is None else cast(tape, bias, work)
    return x, scales, wide, (rounded, turned, step, zero)


# --- back from them -------------------------------------------------------------------------------


def _decode(view: View, node: Node) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """From the product up to x, codes and scales; a bias is an addition behind it."""
    x, weight = view.operands(node)
    rounded, step, zero = _behind(view, x, "DequantizeLinear", 3)
    turned, scales = _behind(view, weight, "DequantizeLinear", 2)
    return _read(view, node, rounded, turned, step, scales, zero)


def _decode_fused(view: View, node: Node) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """From the one node; its bias, if any, is one of its operands."""
    rounded, turned, step, scales, zero, *bias = view.operands(node)
    operands, attrs = _read(view, node, rounded, turned, step, scales, zero)
    # Absent operands are not told of: what is left may be zero points of the weights instead.
    if any(not is_value(b) or view.type(b).dtype != torch.float32 for b in bias) or len(bias) > 1:
        raise Refusal("its weights have zero points", node)
    return (*operands, *bias), attrs


def _read(
    view: View, node: Node, rounded: Operand, turned: Operand, step: Operand, scales: Operand,
    zero: Operand,
) -> tuple[Sequence[Operand], Mapping[str, Any]]:  # fmt: skip
    """The op without a bias. Raises ``Refusal`` where constants are none, or do not fit."""
    x, *same = _behind(view, rounded, "QuantizeLinear", 3)
    (codes,) = _behind(view, turned, "Transpose", 1)
    numbers = view.number(step), view.number(zero)
    if None in numbers or numbers != tuple(map(view.number, same)):
        raise Refusal("its activations have no one step and zero point", node)
    if not is_value(x):
        raise Refusal("its activations are no value of the graph", node)
    attrs = sizes(view, node, codes, scales)
    return (x, codes, scales), attrs | {"step": numbers[0], "zero": numbers[1]}


def _behind(view: View, value: Operand, native: str, count: int) -> tuple[Operand, ...]:
    """The operands of what makes a value, which is a native op with so many of them."""
    node = view.producer(value) if is_value(value) else None
    if node is None or view.native_op(node) != native:
        raise Refusal(f"there is no {native} where linear_w8a8_static has one", node)
    operands = view.operands(node)
    if len(operands) != count:
        raise Refusal(f"its {native} has {len(operands)} operands", node)
    return operands


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        # N, K, dtype of x, leading shape, bias, zero point
        (24, 64, torch.float32, (5,), False, 128),
        (7, 45, torch.float32, (2, 3), True, 0),
        (1, 1, torch.float32, (1,), False, 190),
        (9, 64, torch.float16, (5,), True, 37),
        (16, 45, torch.bfloat16, (1, 5), True, 128),
    ]
    return [_sample(seed, *case) for seed, case in enumerate(cases)]


def _sample(
    seed: int, fan_out: int, fan_in: int, dtype: torch.dtype, lead: tuple[int, ...], bias: bool,
    zero: int,
) -> Sample:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    operands = (
        torch.randn(*lead, fan_in, generator=rng).to(dtype),
        torch.randint(-127, 128, (fan_out, fan_in), generator=rng, dtype=torch.int8),
        torch.rand(fan_out, generator=rng) * 0.05 + 0.01,
        torch.randn(fan_out, generator=rng).to(dtype) if bias else None,
    )
    attrs = {"in_features": fan_in, "out_features": fan_out, "step": 2.0**-6, "zero": zero}
    label = f"{fan_out}x{fan_in}-z{zero}-{str(dtype).removeprefix('torch.')}"
    return Sample(operands, attrs, label)


LINEAR_W8A8_STATIC = own_op(
    linear_w8a8_static, infer=partial(infer, "linear_w8a8_static"), record=_record,
    samples=_samples, heavy=True, rounds=True,
    macs=Macs(linear_macs), dense=dense, forms={FORM: _record_fused},
    stored_linear=lambda attrs: "8 bits, activations too, in a fixed range",
    decoders=(
        StockDecoder("matmul", _decode), StockDecoder(f"{MICROSOFT}::{NODE}", _decode_fused),
    ),
)  # fmt: skip
