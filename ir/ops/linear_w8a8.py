"""``linear_w8a8``: a linear that multiplies 8-bit weights by activations rounded to 8 bits.

Weights have a scale a row, activations one a token, found as the model runs, and a zero point where
ranges are not symmetric; products are summed in int32. The ONNX form is ``MatMulInteger`` between
ops of the standard. In ms for 1 / 16 / 128 rows (``python -m graphwright.tools.bench.w8a8``, ONNX
Runtime 1.31 on one AVX-512 VNNI core, other processes beside it):

===========================  ===========================  ============================
form                         K x N = 1536 x 384           2048 x 2048
===========================  ===========================  ============================
this one, symmetric          0.013 / 0.036 / 0.217        0.055 / 0.171 / 1.47
this one, not symmetric      0.015 / 0.038 / 0.221        0.060 / 0.182 / 1.55
DynamicQuantizeMatMul        0.009 / 0.028 / 0.184        0.052 / 0.159 / 1.27
MatMulNBits, level 4, g 32   0.011 / 0.071 / 0.536        0.062 / 0.435 / 3.84
MatMul in float32            0.029 / 0.084 / 0.615        0.199 / 1.12 / 41.5
===========================  ===========================  ============================

One node rounds all tokens, each in its own range: 128 rows of 1536 take 15 us so, and 49 by a
division before a rounding. ``DynamicQuantizeMatMul`` has one range for all tokens of a call, so
that a text's result depends on what else is in its batch; hence not that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from .emit import cast, constant, leading_sizes
from .stored_types import stored_linear_type

if TYPE_CHECKING:
    from onnx_ir.tape import Tape

NODE = "MatMulIntegerToFloat"
LEAST = 1e-30
"""Below it a token counts as 0: its step would be no normal number."""
MIDDLE = 128
"""The code of 0 where a token's range is symmetric."""


def linear_w8a8(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, *,
    in_features: int, out_features: int, symmetric: bool = True,
) -> Tensor:  # fmt: skip
    """``((q - zero) @ codes.T) * step * scales + bias`` in the dtype of ``x``, ``q = round(x /
    step) + zero`` within 0 to 255.

    x [..., K]; codes int8 [N, K]; scales f32 [N]; bias [N]. Of each token, ``step = max |x| / 127``
    and ``zero = 128``; unless ``symmetric``, ``step = (high - low) / 255`` and ``zero = round(-low
    / step)``, ``low`` and ``high`` its least and greatest number, or 0. Products are summed in
    float32, which is exact to one part in 2^24.
    """
    wide = x.float()
    if symmetric:
        step = wide.abs().amax(-1, keepdim=True).clamp_min(LEAST) / 127
        rounded = (wide / step).round()
    else:
        low = wide.amin(-1, keepdim=True).clamp_max(0)
        step = (wide.amax(-1, keepdim=True).clamp_min(LEAST) - low) / 255
        zero = (-low / step).round()
        rounded = ((wide / step).round() + zero).clamp(0, 255) - zero
    y = torch.nn.functional.linear(rounded, codes.float()) * step * scales
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
    def product(rounded: ir.Value, codes: ir.Value, scales: ir.Value, zero: ir.Value) -> ir.Value:
        sums = tape.op("MatMulInteger", [rounded, codes, zero])
        return tape.op("Mul", [cast(tape, sums, ir.DataType.FLOAT), scales])

    return _recorded(tape, operands, attrs, product)


def _record_fused(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]
) -> ir.Value:
    """As ``_record``; the product, its cast and the scales are one node."""

    def product(rounded: ir.Value, codes: ir.Value, scales: ir.Value, zero: ir.Value) -> ir.Value:
        inputs = [rounded, codes, constant(tape, 1.0, np.float32), scales, zero]
        return tape.op(NODE, inputs, domain=MICROSOFT, version=1)

    return _recorded(tape, operands, attrs, product)


Product = Callable[[ir.Value, ir.Value, ir.Value, ir.Value], ir.Value]
"""Of rounded activations, turned codes, scales and the zero point of all activations."""


def _recorded(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any], product: Product
) -> ir.Value:
    """Tokens as rows of a matrix, each with a scale and a zero point of its own, which one node
    rounds. A product has one zero point for all: what is beyond it is taken off behind."""
    x, codes, scales, bias = known("linear_w8a8", operands)
    flat = constant(tape, [-1, attrs["in_features"]])
    rows = tape.op("Reshape", [cast(tape, x, ir.DataType.FLOAT), flat])
    turned = tape.op("Transpose", [codes], {"perm": [1, 0]})
    if attrs["symmetric"]:
        rounded, step = _around_zero(tape, rows)
        y = product(rounded, turned, scales, constant(tape, MIDDLE, np.uint8))
        y = tape.op("Mul", [y, step])
    else:
        rounded, step, zero = _between(tape, rows)
        y = product(rounded, turned, scales, constant(tape, 0, np.uint8))
        moved = [tape.op("Mul", [zero, step]), _offsets(tape, codes, scales)]
        moved += [] if bias is None else [cast(tape, bias, ir.DataType.FLOAT)]
        beyond = tape.op("Gemm", moved, {"alpha": -1.0})
        y, bias = tape.op("Add", [tape.op("Mul", [y, step]), beyond]), None
    sizes = [leading_sizes(tape, x), constant(tape, [attrs["out_features"]])]
    y = tape.op("Reshape", [y, tape.op("Concat", sizes, {"axis": 0})])
    if x.shape is not None:
        # ONNX Runtime makes one node of a bias behind this and of a gelu if it knows how many
        # features there are, and does not know what its own product gives.
        y.shape, y.dtype = ir.Shape([*x.shape[:-1], attrs["out_features"]]), ir.DataType.FLOAT
    return ended(tape, y, bias, x)


def _around_zero(tape: Tape, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes of rows [tokens, K] around ``MIDDLE``, and the step of each [tokens, 1]."""
    most = tape.op("ReduceMax", [tape.op("Abs", [rows]), constant(tape, [1])], {"keepdims": 1})
    most = tape.op("Max", [most, constant(tape, LEAST, np.float32)])
    step = tape.op("Div", [most, constant(tape, 127, np.float32)])
    each = tape.op("Reshape", [step, constant(tape, [-1])])
    # Unsigned with a zero point: what every provider takes beside signed weights.
    zeros = tape.op("Expand", [constant(tape, MIDDLE, np.uint8), tape.op("Shape", [each])])
    return tape.op("QuantizeLinear", [rows, each, zeros], {"axis": 0}), step


def _between(tape: Tape, rows: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes of rows [tokens, K], and the step and the zero point of each, f32 [tokens, 1]."""
    axis, keep = constant(tape, [1]), {"keepdims": 1}
    most = tape.op("ReduceMax", [rows, axis], keep)
    high = tape.op("Max", [most, constant(tape, LEAST, np.float32)])
    low = tape.op("Min", [tape.op("ReduceMin", [rows, axis], keep), constant(tape, 0, np.float32)])
    step = tape.op("Div", [tape.op("Sub", [high, low]), constant(tape, 255, np.float32)])
    zero = tape.op("Round", [tape.op("Neg", [tape.op("Div", [low, step])])])
    flat = constant(tape, [-1])
    zeros = tape.op("Reshape", [cast(tape, zero, ir.DataType.UINT8), flat])
    each = tape.op("Reshape", [step, flat])
    return tape.op("QuantizeLinear", [rows, each, zeros], {"axis": 0}), step, zero


def _offsets(tape: Tape, codes: ir.Value, scales: ir.Value) -> ir.Value:
    """What a token of ones gives, [1, N]: ONNX Runtime computes it when it loads a model."""
    wide = cast(tape, codes, ir.DataType.FLOAT)
    sums = tape.op("ReduceSum", [wide, constant(tape, [1])], {"keepdims": 0})
    return tape.op("Unsqueeze", [tape.op("Mul", [sums, scales]), constant(tape, [0])])


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
    """From the last reshape up to x; a bias is added on the way."""
    sums, *bias = _ended(view, view.tensor(node))
    product, step = _made_by(view, node, sums, "Mul")
    maker = view.producer(product) if is_value(product) else None
    if maker is not None and view.native_op(maker) == f"{MICROSOFT}::{NODE}":
        rounded, turned, one, scales, zero = view.operands(maker)
        if view.number(one) != 1:
            raise Refusal("its activations have another scale", node)
    else:
        sums, scales = _made_by(view, node, product, "Mul")
        (sums,) = _made_by(view, node, sums, "Cast")
        rounded, turned, zero = _made_by(view, node, sums, "MatMulInteger")
    middle = view.number(zero)
    rows, each, _ = _made_by(view, node, rounded, "QuantizeLinear")
    apart, *_ = _made_by(view, node, each, "Reshape")
    x, *_ = _made_by(view, node, rows, "Reshape")
    (codes,) = _made_by(view, node, turned, "Transpose")
    if apart is not step or middle not in (0, MIDDLE):
        raise Refusal("its activations are not divided by their step", node)
    attrs = sizes(view, node, codes, scales) | {"symmetric": middle == MIDDLE}
    return (x, codes, scales, *bias), attrs


def _decode_bias(view: View, node: Node) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """From a constant behind the op, a number for each feature; half ones are cast there."""
    y, bias = view.operands(node)
    maker = view.producer(y) if is_value(y) else None
    if maker is None or view.op(maker) != "linear_w8a8" or not is_value(bias):
        raise Refusal("nothing is added to linear_w8a8", node)
    result = view.result(maker)
    features = view.attrs(maker)["out_features"]
    cast = view.producer(bias)
    stored = bias if cast is None or view.native_op(cast) != "Cast" else view.operands(cast)[0]
    weight = view.weight(stored) if is_value(stored) else None
    fits = weight is not None and weight.shape == (features,)
    if not fits or len(view.operands(maker)) > 3 or len(view.users(result)) > 1:
        raise Refusal("what is added is no bias, or there is one", node)
    return (*view.operands(maker), bias), view.attrs(maker)


def _ended(view: View, y: Operand) -> tuple[Operand, ...]:
    """The scaled product and the bias, if any; what is beyond a zero point is added with it."""
    last = view.producer(y) if is_value(y) else None
    if last is None or view.native_op(last) != "Add":
        return (y,)
    sums, other = view.operands(last)
    beyond = view.producer(other) if is_value(other) else None
    if beyond is None or view.native_op(beyond) != "Gemm":
        return sums, other
    return (sums, *view.operands(beyond)[2:])


def _made_by(view: View, node: Node, value: Operand, native: str) -> Sequence[Any]:
    """The operands of the native node that makes a value."""
    maker = view.producer(value) if is_value(value) else None
    if maker is None or view.native_op(maker) != native:
        raise Refusal(f"{native} is not where linear_w8a8 has it", node)
    return view.operands(maker)


def dense(columns: int, operands: Sequence[Tensor | None], attrs: Attrs) -> Tensor:
    codes, scales = operands[:2]
    assert codes is not None and scales is not None
    return codes.float() * scales.unsqueeze(1)


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        # N, K, dtype of x, leading shape, bias, symmetric
        (24, 64, torch.float32, (5,), False, True),
        (7, 45, torch.float32, (2, 3), True, True),
        (1, 1, torch.float32, (1,), False, True),
        (5, 123, torch.float32, (1, 5), True, False),
        (7, 45, torch.float32, (2, 3), False, False),
        (9, 64, torch.float16, (5,), True, False),
        (16, 45, torch.bfloat16, (1, 5), True, True),
    ]
    return [_sample(seed, *case) for seed, case in enumerate(cases)]


def _sample(
    seed: int, fan_out: int, fan_in: int, dtype: torch.dtype, lead: tuple[int, ...], bias: bool,
    symmetric: bool,
) -> Sample:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, fan_in, generator=rng)
    x[..., :1, :] *= 0 if len(lead) > 1 else 1
    codes = torch.randint(-127, 128, (fan_out, fan_in), generator=rng, dtype=torch.int8)
    scales = torch.rand(fan_out, generator=rng) * 0.05 + 0.01
    offset = torch.randn(fan_out, generator=rng).to(dtype) if bias else None
    attrs = {"in_features": fan_in, "out_features": fan_out, "symmetric": symmetric}
    kind = "" if symmetric else "-between"
    label = f"{fan_out}x{fan_in}-{str(dtype).removeprefix('torch.')}{kind}"
    return Sample((x.to(dtype), codes, scales, offset), attrs, label)


LINEAR_W8A8 = own_op(
    linear_w8a8, infer=partial(infer, "linear_w8a8"), record=_record, samples=_samples,
    heavy=True, rounds=True,
    macs=Macs(linear_macs), dense=dense, stored_linear=lambda attrs: "8 bits, activations too",
    forms={FORM: _record_fused},
    decoders=(StockDecoder("reshape", _decode), StockDecoder("add", _decode_bias)),
)  # fmt: skip
