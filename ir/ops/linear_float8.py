"""``linear_float8``: a linear whose weight is float8 with scales: one, one a row, or one a block.

``W = w8 * s``, s a matrix of which each number is that of ``block_rows`` rows and ``block_columns``
columns; the last block of either may be smaller.

ONNX Runtime leaves ``DequantizeLinear`` of constants to run at each call, and folds ``Cast`` and
``Mul`` into a dense matrix as it loads: these are the usual form (opset 19). Other runtimes know
such weights by the first one (opset 21 where there are blocks). Measured with ONNX Runtime 1.31 on
one AVX-512 core, other processes beside it, for 2048 x 2048 with a scale a row:

==================  =========  ========  ==================  =================
form                file, KiB  load, ms  1 / 16 rows, ms     weights in memory
==================  =========  ========  ==================  =================
Cast and Mul            4,104       251  0.19 / 0.80         32 bits
DequantizeLinear        4,104         1  15.9 / 28.0         8 bits
MatMul, float32        16,384        71  0.19 / 0.78         32 bits
==================  =========  ========  ==================  =================
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import InvalidGraph, Refusal
from ..core.types import Type
from ..core.view import Node, Operand, View
from ..vocab.linear import linear_macs
from ..vocab.spec import Attrs, Macs
from .base import Sample, StockDecoder, own_op
from .behind import behind, past
from .emit import cast, constant, derived
from .linear_w8a8 import ended, known
from .stored_types import stored_linear_type

if TYPE_CHECKING:
    from onnx_ir.tape import Tape

FORM = "dequantize-linear"
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def linear_float8(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, *,
    block_rows: int, block_columns: int, in_features: int, out_features: int,
) -> Tensor:  # fmt: skip
    """``x @ W.T + bias`` in the dtype of ``x``, summed in float32; W as ``dense`` gives it.

    x [..., K]; codes float8 [N, K]; scales f32 [ceil(N / block_rows), ceil(K / block_columns)];
    bias [N].
    """
    weight = dense(codes, scales, block_rows, block_columns)
    wide_bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight, wide_bias).to(x.dtype)


def dense(codes: Tensor, scales: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """The matrix ``w8 * s`` f32 [N, K]."""
    matrix, columns = codes.float(), codes.shape[1]
    for place, row in enumerate(scales):  # a second matrix is not wanted
        start = place * block_rows
        matrix[start : start + block_rows] *= row.repeat_interleave(block_columns)[:columns]
    return matrix


def grid(attrs: Attrs) -> tuple[int, int]:
    """The shape of the scales."""
    rows, columns = attrs["out_features"], attrs["in_features"]
    return -(-rows // attrs["block_rows"]), -(-columns // attrs["block_columns"])


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x, codes, scales, bias = (*operands, None)[:4]
    if codes.dtype not in (*DTYPES, None):
        raise ValueError(f"linear_float8: dtype of codes is {codes.dtype}, expected float8")
    matrix = Type(codes.dtype, (attrs["out_features"], attrs["in_features"]))
    stored = {"codes": (codes, matrix), "scales": (scales, Type(torch.float32, grid(attrs)))}
    return stored_linear_type("linear_float8", x, stored, bias, attrs)


def _dense(columns: int, operands: Sequence[Tensor | None], attrs: Attrs) -> Tensor:
    codes, scales = operands[:2]
    assert codes is not None and scales is not None
    return dense(codes, scales, attrs["block_rows"], attrs["block_columns"])


def _form(attrs: Attrs) -> str:
    down, across = attrs["block_rows"], attrs["block_columns"]
    if down == 1 and across == attrs["in_features"]:
        return "float8 with a scale a row"
    whole = (down, across) == (attrs["out_features"], attrs["in_features"])
    return "float8 with one scale" if whole else f"float8 with a scale for {down} x {across}"


# --- the ONNX forms -------------------------------------------------------------------------------


def _record(tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]) -> ir.Value:
    x, codes, scales, bias = known("linear_float8", operands)
    rows, columns = grid(attrs)
    if rows > 1 and attrs["block_rows"] > 1:
        scales = _spread(tape, scales, 0, attrs["block_rows"], rows, attrs["out_features"])
    if columns > 1 and attrs["block_columns"] > 1:
        scales = _spread(tape, scales, 1, attrs["block_columns"], columns, attrs["in_features"])
    numbers = cast(tape, codes, ir.DataType.FLOAT)
    turned = tape.op("Transpose", [tape.op("Mul", [numbers, scales])], {"perm": [1, 0]})
    return ended(tape, tape.op("MatMul", [cast(tape, x, ir.DataType.FLOAT), turned]), bias, x)


def _spread(tape: Tape, scales: ir.Value, axis: int, times: int, count: int, size: int) -> ir.Value:
    """Each of ``count`` scales along an axis so many times, ``size`` of them in all."""
    apart = tape.op("Unsqueeze", [scales, constant(tape, [axis + 1])])
    shape = [1, times, 1] if axis == 0 else [1, 1, times]
    repeated = tape.op("Expand", [apart, constant(tape, shape)])
    whole = [count * times, -1] if axis == 0 else [-1, count * times]
    flat = tape.op("Reshape", [repeated, constant(tape, whole)])
    if count * times == size:
        return flat
    return tape.op("Slice", [flat, *(constant(tape, [n]) for n in (0, size, axis))])


def _record_dequantized(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]
) -> ir.Value:
    """By ``DequantizeLinear`` of the matrix ``[K, N]``; blocks of rows have their scales again for
    each row, as the op wants it."""
    x, codes, scales, bias = known("linear_float8", operands)
    rows, columns = attrs["out_features"], attrs["in_features"]
    groups = -(-columns // attrs["block_columns"])
    inputs = [_turned(tape, codes, (columns, rows), lambda data: data)]
    options: dict[str, int] = {}
    if attrs["block_rows"] >= rows and groups == 1:
        inputs.append(tape.op("Reshape", [scales, constant(tape, [])]))
    else:
        each = attrs["block_rows"]
        wide = _turned(tape, scales, (groups, rows), lambda data: data.repeat(each, 0)[:rows])
        if groups == 1:
            wide, options = tape.op("Reshape", [wide, constant(tape, [-1])]), {"axis": 1}
        else:
            options = {"axis": 0, "block_size": attrs["block_columns"]}
        inputs.append(wide)
    weight = tape.op("DequantizeLinear", inputs, options)
    return ended(tape, tape.op("MatMul", [cast(tape, x, ir.DataType.FLOAT), weight]), bias, x)


def _turned(tape: Tape, data: ir.Value, shape: tuple[int, int], change: Any) -> ir.Value:
    """A constant matrix changed and transposed, as an initializer of the artifact."""
    source = data.const_value
    if source is None:
        raise InvalidGraph("linear_float8 as DequantizeLinear: its operands must be constants")
    dtype = source.dtype

    def make() -> ir.TensorProtocol:
        matrix = np.ascontiguousarray(change(source.numpy()).T)
        return ir.tensor(matrix, dtype=dtype)

    return derived(tape, f"{data.name}.columns", make, dtype, shape)


# --- back from them: DequantizeLinear is read by canonical.dequantize -----------------------------


def _decode(view: View, node: Node) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """From the product up to codes and scales; a bias is an addition behind it."""
    x, turned = view.operands(node)
    numbers, spread = behind(view, behind(view, turned, "transpose")[0], "mul")
    codes = behind(view, numbers, "cast")[0]
    scales, nodes = past(view, spread, "slice", "reshape", "expand", "unsqueeze")
    handles = [view.weight(part) for part in (codes, scales)]
    if any(h is None or len(h.shape) != 2 for h in handles):
        raise Refusal("its codes or scales are no constant matrices", node)
    (rows, columns), (down, across) = (h.shape for h in handles if h is not None)
    blocks = [rows if down == 1 else 1, columns if across == 1 else 1]
    for expand, unsqueeze in itertools.pairwise(nodes):
        if view.op(expand) == "expand" and view.op(unsqueeze) == "unsqueeze":
            (place,) = view.attrs(unsqueeze)["dims"]
            size = view.operands(expand)[1 + place]
            blocks[place - 1] = size if isinstance(size, int) else 0
    sizes = {"in_features": columns, "out_features": rows}
    attrs = {"block_rows": blocks[0], "block_columns": blocks[1], **sizes}
    kinds = [handle.dtype for handle in handles if handle is not None]
    fits = min(blocks) > 0 and grid(attrs) == (down, across)
    if kinds[0] not in DTYPES or kinds[1] != torch.float32 or not fits:
        raise Refusal("its codes are no float8, or its scales do not fit", node)
    return (x, codes, scales), attrs


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        # N, K, block, dtype of codes, dtype of x, leading shape, bias
        (24, 64, (24, 64), 0, torch.float32, (5,), False),
        (7, 45, (1, 45), 0, torch.float32, (2, 3), True),
        (1, 1, (1, 1), 1, torch.float32, (1,), False),
        (24, 64, (8, 16), 0, torch.float32, (1, 5), True),
        (9, 40, (4, 16), 1, torch.float16, (5,), True),
        (16, 45, (1, 16), 0, torch.bfloat16, (1, 5), True),
        (16, 45, (5, 45), 0, torch.float32, (3,), False),
    ]
    return [_sample(seed, *case) for seed, case in enumerate(cases)]


def _sample(
    seed: int, fan_out: int, fan_in: int, block: tuple[int, int], kind: int, dtype: torch.dtype,
    lead: tuple[int, ...], bias: bool,
) -> Sample:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    attrs = {
        "block_rows": block[0], "block_columns": block[1],
        "in_features": fan_in, "out_features": fan_out,
    }  # fmt: skip
    operands = (
        torch.randn(*lead, fan_in, generator=rng).to(dtype),
        torch.randn(fan_out, fan_in, generator=rng).to(DTYPES[kind]),
        torch.rand(grid(attrs), generator=rng) * 0.05 + 0.01,
        torch.randn(fan_out, generator=rng).to(dtype) if bias else None,
    )
    label = f"{fan_out}x{fan_in}-{block[0]}x{block[1]}-{str(dtype).removeprefix('torch.')}"
    return Sample(operands, attrs, label)


LINEAR_FLOAT8 = own_op(
    linear_float8, infer=_infer, record=_record, samples=_samples,
    forms={FORM: _record_dequantized}, heavy=True, macs=Macs(linear_macs), dense=_dense,
    as_numbers=True, stored_linear=_form, decoders=(StockDecoder("matmul", _decode),),
)  # fmt: skip
