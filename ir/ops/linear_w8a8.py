"""``linear_w8a8``: a linear that multiplies 8-bit weights by activations rounded to 8 bits.

Weights have a scale a row, activations one a token, found as the model runs; products are summed in
int32. The ONNX form is ``MatMulInteger`` between ops of the standard. Measured with ONNX Runtime
1.31 on one AVX-512 VNNI core, other processes beside it, in ms for 1 / 16 / 128 rows
(``python -m graphwright.tools.bench.w8a8``):

===========================  ===========================  ============================
form                         K x N = 1536 x 384           2048 x 2048
===========================  ===========================  ============================
this one                     0.012 / 0.045 / 0.305        0.057 / 0.183 / 1.67
DynamicQuantizeMatMul        0.009 / 0.029 / 0.186        0.054 / 0.159 / 1.37
MatMulNBits, level 4, g 32   0.011 / 0.071 / 0.531        0.063 / 0.435 / 3.78
MatMul in float32            0.029 / 0.083 / 0.601        0.207 / 0.620 / 13.8
===========================  ===========================  ============================

``DynamicQuantizeMatMul`` has one range for all tokens of a call, so that a text's result depends on
what else is in its batch; hence not that one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import InvalidGraph, Refusal
from ..core.types import Type
from ..core.view import Node, Operand, View, is_value
from ..vocab.linear import linear_macs
from ..vocab.onnx import MICROSOFT
from ..vocab.spec import Attrs, Macs
from .base import Sample, StockDecoder, own_op
from .emit import cast, constant
from .stored_types import stored_linear_type

if TYPE_CHECKING:
    from onnx_ir.tape import Tape

NODE = "MatMulIntegerToFloat"
LEAST = 1e-30
"""Below it a token counts as 0: its step would be no normal number."""


def linear_w8a8(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, *,
    in_features: int, out_features: int,
) -> Tensor:  # fmt: skip
    """``(round(x / step) @ codes.T) * step * scales + bias`` in the dtype of ``x``.

    x [..., K]; ``step = max |x| / 127`` of each token; codes int8 [N, K]; scales f32 [N]; bias [N].
    Products are summed in float32, which is exact to one part in 2^24.
    """
    wide = x.float()
    step = wide.abs().amax(-1, keepdim=True).clamp_min(LEAST) / 127
    y = torch.nn.functional.linear((wide / step).round(), codes.float())
    y = y * step * scales
    return (y if bias is None else y + bias.float()).to(x.dtype)


def operand_types(in_features: int, out_features: int) -> tuple[Type, Type]:
    """Types of codes and scales."""
    return Type(torch.int8, (out_features, in_features)), Type(torch.float32, (out_features,))


def infer(op: str, operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    """The type of a linear with codes and scales of rows, by the name of its op."""
    x, codes, scales, bias = (*operands, None)[:4]
    types = operand_types(attrs["in_features"], attrs["out_features"])
    stored = {"codes": (codes, types[0]), "scales": (scales, types[1])}
    return stored_linear_type(op, x, stored, bias, attrs)


def _record(tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]) -> ir.Value:
    x, codes, scales, bias = known("linear_w8a8", operands)
    work = ir.DataType.FLOAT
    wide = cast(tape, x, work)
    step = _step(tape, wide)
    rounded = tape.op("Round", [tape.op("Div", [wide, step])])
    # Unsigned with a zero point: what every provider takes beside signed weights.
    moved = tape.op("Add", [rounded, constant(tape, 128, np.float32)])
    inputs = [
        cast(tape, moved, ir.DataType.UINT8), tape.op("Transpose", [codes], {"perm": [1, 0]}),
        constant(tape, 128, np.uint8),
    ]  # fmt: skip
    sums = cast(tape, tape.op("MatMulInteger", inputs), work)
    return ended(tape, tape.op("Mul", [tape.op("Mul", [sums, step]), scales]), bias, x)


def known(
    op: str, operands: Sequence[ir.Value | None]
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value | None]:
    """x, codes, scales and the bias, if any."""
    x, codes, scales, bias = (*operands, None)[:4]
    if x is None or codes is None or scales is None or x.dtype is None:
        raise InvalidGraph(f"{op} needs x with a known dtype, codes and scales")
    return x, codes, scales, bias


def ended(tape: Tape, y: ir.Value, bias: ir.Value | None, x: ir.Value) -> ir.Value:
    """``y`` f32 with the bias, in the dtype of ``x``."""
    work = ir.DataType.FLOAT
    if bias is not None:
        y = tape.op("Add", [y, cast(tape, bias, work)])
    return cast(tape, y, x.dtype) if x.dtype not in (work, None) else y


FORM = "matmul-integer-to-float"
"""The name by which a target asks for nodes that only ONNX Runtime's CPU provider has."""


def _record_fused(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]
) -> ir.Value:
    """As ``_record``; rounding is one node, and so are the product, its cast and the scales."""
    x, codes, scales, bias = known("linear_w8a8", operands)
    wide = cast(tape, x, ir.DataType.FLOAT)
    step = _step(tape, wide)
    zero, one = constant(tape, 128, np.uint8), constant(tape, 1.0, np.float32)
    rounded = tape.op("QuantizeLinear", [tape.op("Div", [wide, step]), one, zero])
    turned = tape.op("Transpose", [codes], {"perm": [1, 0]})
    y = tape.op(NODE, [rounded, turned, one, scales, zero], domain=MICROSOFT, version=1)
    return ended(tape, tape.op("Mul", [y, step]), bias, x)


def _step(tape: Tape, x: ir.Value) -> ir.Value:
    """max |x| / 127 of each token"""
    most = tape.op("ReduceMax", [tape.op("Abs", [x]), constant(tape, [-1])], {"keepdims": 1})
    most = tape.op("Max", [most, constant(tape, LEAST, np.float32)])
    return tape.op("Div", [most, constant(tape, 127, np.float32)])


def _decode_fused(view: View, node: Node) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """From the product with the step up to x."""
    sums, step = view.operands(node)
    product = view.producer(sums) if is_value(sums) else None
    if product is None or view.native_op(product) != f"{MICROSOFT}::{NODE}":
        raise Refusal(f"{NODE} is not where linear_w8a8 has it", node)
    rounded, turned, one, scales, *_ = view.operands(product)
    quantized, swap = (view.producer(v) if is_value(v) else None for v in (rounded, turned))
    if quantized is None or view.native_op(quantized) != "QuantizeLinear" or swap is None:
        raise Refusal("its activations or codes are no such as linear_w8a8 has", node)
    parted, unit, *_ = view.operands(quantized)
    quotient = view.producer(parted) if is_value(parted) else None
    if quotient is None or view.op(quotient) != "div" or view.operands(quotient)[1] is not step:
        raise Refusal("its activations are not divided by their step", node)
    if (view.number(one), view.number(unit)) != (1, 1) or view.op(swap) != "transpose":
        raise Refusal("its activations have another scale", node)
    x, codes = view.operands(quotient)[0], view.operands(swap)[0]
    return (x, codes, scales), sizes(view, node, codes, scales)


def sizes(view: View, node: Node, codes: Operand, scales: Operand) -> dict[str, Any]:
    """Inputs and results of a linear whose codes and scales these are. Raises ``Refusal`` where
    they are none."""
    stored, factor = view.weight(codes), view.weight(scales)
    if stored is None or factor is None or stored.dtype != torch.int8:
        raise Refusal("its codes or scales are no constants", node)
    if factor.shape != stored.shape[:1]:
        raise Refusal("its scales are not one a row", node)
    rows, columns = stored.shape
    return {"in_features": columns, "out_features": rows}


def _decode(view: View, node: Node) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """From the product with the scales up to x; a bias is an addition behind it."""

    def operands_of(value: Operand, native: str) -> tuple[Node, Sequence[Any]]:
        maker = view.producer(value)  # type: ignore[arg-type]
        if maker is None or view.native_op(maker) != native:
            raise Refusal(f"{native} is not where linear_w8a8 has it", node)
        return maker, view.operands(maker)

    sums, scales = view.operands(node)
    _, (sums, step) = operands_of(sums, "Mul")
    _, (sums, *_) = operands_of(sums, "Cast")
    _, (x, codes, *_) = operands_of(sums, "MatMulInteger")
    _, (codes, *_) = operands_of(codes, "Transpose")
    _, (x, *_) = operands_of(x, "Cast")
    _, (x, _) = operands_of(x, "Add")
    _, (x, *_) = operands_of(x, "Round")
    _, (x, divisor) = operands_of(x, "Div")
    if divisor is not step:
        raise Refusal("its activations are not divided by their step", node)
    return (x, codes, scales), sizes(view, node, codes, scales)


def dense(columns: int, operands: Sequence[Tensor | None], attrs: Attrs) -> Tensor:
    codes, scales = operands[:2]
    assert codes is not None and scales is not None
    return codes.float() * scales.unsqueeze(1)


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        # N, K, dtype of x, leading shape, bias
        (24, 64, torch.float32, (5,), False),
        (7, 45, torch.float32, (2, 3), True),
        (1, 1, torch.float32, (1,), False),
        (5, 123, torch.float32, (1, 5), True),
        (9, 64, torch.float16, (5,), True),
        (16, 45, torch.bfloat16, (1, 5), True),
    ]
    return [_sample(seed, *case) for seed, case in enumerate(cases)]


def _sample(
    seed: int, fan_out: int, fan_in: int, dtype: torch.dtype, lead: tuple[int, ...], bias: bool
) -> Sample:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, fan_in, generator=rng)
    x[..., :1, :] *= 0 if len(lead) > 1 else 1
    codes = torch.randint(-127, 128, (fan_out, fan_in), generator=rng, dtype=torch.int8)
    scales = torch.rand(fan_out, generator=rng) * 0.05 + 0.01
    offset = torch.randn(fan_out, generator=rng).to(dtype) if bias else None
    attrs = {"in_features": fan_in, "out_features": fan_out}
    label = f"{fan_out}x{fan_in}-{str(dtype).removeprefix('torch.')}"
    return Sample((x.to(dtype), codes, scales, offset), attrs, label)


LINEAR_W8A8 = own_op(
    linear_w8a8, infer=partial(infer, "linear_w8a8"), record=_record, samples=_samples,
    heavy=True, rounds=True,
    macs=Macs(linear_macs), dense=dense, stored_linear=lambda attrs: "8 bits, activations too",
    forms={FORM: _record_fused},
    decoders=(StockDecoder("mul", _decode), StockDecoder("mul", _decode_fused)),
)  # fmt: skip
