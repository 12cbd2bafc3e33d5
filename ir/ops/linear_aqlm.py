"""``linear_aqlm``: a linear whose weights, eight inputs at a time, are sums of codebooks' vectors.

``W = scale * sum_p T_p[code_p]``: each byte of such a group picks a vector from a table of 256. The
tables are stored as they are, or each as two codebooks of 16 vectors, whose sums it holds.

The ONNX form gathers vectors from the tables, sums them, scales the rows and multiplies; the
runtime folds all but the product into one dense float32 matrix as it loads, so that weights are
small in the file alone. Measured with ONNX Runtime 1.31 on one AVX-512 core, other processes beside
it, for 2048 x 2048 (``python -m graphwright.tools.bench.aqlm costs``):

=====================  =========  ========  =========  =======================
form                   file, KiB  load, ms  a row, ms  with optimisation off
=====================  =========  ========  =========  =======================
this one, 2 bits           1,039       413       0.29                      132
float32                   16,384       258       0.47                     0.39
4 bits, level 4            2,561        21       0.08                     0.08
=====================  =========  ========  =========  =======================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import InvalidGraph, Refusal
from ..core.types import Type
from ..core.view import Node, Operand, Value, View, is_value
from ..vocab.linear import linear_macs
from ..vocab.spec import Attrs, Macs
from .base import Sample, StockDecoder, own_op
from .emit import cast, constant
from .stored_types import stored_linear_type

if TYPE_CHECKING:
    from onnx_ir.tape import Tape

WIDTH = 8
"""Inputs that a code stands for."""
TABLE = 256
"""Vectors that a byte picks from."""
ENTRIES = (16, 256)
"""Vectors of a codebook: two of 16 make a table."""


def linear_aqlm(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None, *,
    in_features: int, out_features: int,
) -> Tensor:  # fmt: skip
    """``x @ W.T + bias`` in the dtype of ``x``, summed in float32; W as ``dense`` gives it.

    x [..., K]; codes uint8 [planes, N, ceil(K / 8)]; codebooks f16 [planes, 256, 8] or
    [2 planes, 16, 8]; scales f16 or f32 [N]; bias [N].
    """
    weight = dense(codes, codebooks, scales, in_features)
    wide_bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight, wide_bias).to(x.dtype)


def tables(codebooks: Tensor) -> Tensor:
    """The vectors f32 [planes, 256, 8] that bytes pick from.

    The high half of a byte picks from the first of two codebooks of 16, the low half from the
    second.
    """
    wide = codebooks.float()
    if wide.shape[1] == TABLE:
        return wide
    return (wide[0::2, :, None] + wide[1::2, None]).flatten(1, 2)


def dense(codes: Tensor, codebooks: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """The matrix ``scale * sum_p T_p[code_p]`` f32 [N, K]."""
    weight: Tensor | None = None
    for table, plane in zip(tables(codebooks), codes, strict=True):
        picked = table[plane.long()]
        weight = picked if weight is None else weight.add_(picked)
    assert weight is not None
    return weight.flatten(1)[:, :in_features].mul_(scales.float().unsqueeze(1))


def operand_types(
    in_features: int, out_features: int, *, planes: int, entries: int,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Type, Type, Type]:  # fmt: skip
    """Types of codes, codebooks and scales."""
    books = planes if entries == TABLE else 2 * planes
    return (
        Type(torch.uint8, (planes, out_features, -(-in_features // WIDTH))),
        Type(torch.float16, (books, entries, WIDTH)),
        Type(scale_dtype, (out_features,)),
    )


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x, codes, codebooks, scales, bias = (*operands, None)[:5]
    stored: dict[str, tuple[Type | None, Type | None]] = {}
    if codes.shape is not None and codebooks.shape is not None:
        if codebooks.shape[1] not in ENTRIES:
            raise ValueError(f"linear_aqlm: {codebooks.shape[1]} vectors, expected 16 or 256")
        types = operand_types(
            attrs["in_features"], attrs["out_features"], planes=codes.shape[0],
            entries=codebooks.shape[1], scale_dtype=scales.dtype,
        )  # fmt: skip
        names = ("codes", "codebooks", "scales")
        stored = dict(zip(names, zip((codes, codebooks, scales), types, strict=True), strict=True))
    return stored_linear_type("linear_aqlm", x, stored, bias, attrs)


def _dense(columns: int, operands: Sequence[Tensor | None], attrs: Attrs) -> Tensor:
    codes, codebooks, scales = operands[:3]
    assert codes is not None and codebooks is not None and scales is not None
    return dense(codes, codebooks, scales, columns)


# --- the ONNX form --------------------------------------------------------------------------------


def _record(tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]) -> ir.Value:
    x, codes, codebooks, scales, bias = (*operands, None)[:5]
    if x is None or codes is None or codebooks is None or scales is None or x.dtype is None:
        raise InvalidGraph("linear_aqlm needs x with a known dtype, codes, codebooks and scales")
    if codes.shape is None or codebooks.shape is None:
        raise InvalidGraph("linear_aqlm: its codes and codebooks must be constants of known shape")
    # In float32 for every dtype, as the dense matrix is folded in it.
    work = ir.DataType.FLOAT
    planes, rows, groups = codes.shape.numpy()
    table = _table(tape, cast(tape, codebooks, work), planes, codebooks.shape.numpy()[1])
    starts = constant(tape, np.arange(planes).reshape(-1, 1, 1) * TABLE, np.int32)
    ids = tape.op("Add", [cast(tape, codes, ir.DataType.INT32), starts])
    picked = tape.op("Gather", [table, ids], {"axis": 0})
    summed = tape.op("ReduceSum", [picked, constant(tape, [0])], {"keepdims": 0})
    weight = tape.op("Reshape", [summed, constant(tape, [rows, groups * WIDTH])])
    if attrs["in_features"] != groups * WIDTH:
        ends = (constant(tape, [n]) for n in (0, attrs["in_features"], 1))
        weight = tape.op("Slice", [weight, *ends])
    column = tape.op("Unsqueeze", [cast(tape, scales, work), constant(tape, [1])])
    turned = tape.op("Transpose", [tape.op("Mul", [weight, column])], {"perm": [1, 0]})
    y = tape.op("MatMul", [cast(tape, x, work), turned])
    if bias is not None:
        y = tape.op("Add", [y, cast(tape, bias, work)])
    return cast(tape, y, x.dtype) if work != x.dtype else y


def _table(tape: Tape, codebooks: ir.Value, planes: int, entries: int) -> ir.Value:
    """All tables, one behind the other, [256 planes, 8]."""
    if entries != TABLE:
        pairs = tape.op("Reshape", [codebooks, constant(tape, [planes, 2, entries, WIDTH])])
        halves = [pairs, constant(tape, [1, 1])]
        high, low = tape.op_multi_out("Split", halves, {"axis": 1}, num_outputs=2)
        high = tape.op("Reshape", [high, constant(tape, [planes, entries, 1, WIDTH])])
        codebooks = tape.op("Add", [high, low])
    return tape.op("Reshape", [codebooks, constant(tape, [-1, WIDTH])])


# --- back from it ---------------------------------------------------------------------------------


def _decode(view: View, node: Node) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """From the product up to codes, codebooks and scales; a bias is an addition behind it."""
    x, turned = view.operands(node)
    (scaled, *_) = _behind(view, turned, "transpose")
    weight, column = _behind(view, scaled, "mul")
    scales = _behind(view, column, "unsqueeze")[0]
    columns = None
    if is_value(weight) and _op(view, weight) == "slice":
        weight, _, columns = _behind(view, weight, "slice")
    summed = _behind(view, weight, "reshape")[0]
    picked = _behind(view, summed, "sum")[0]
    table, ids = _behind(view, picked, "embedding", "index_select")
    codes = _behind(view, _behind(view, ids, "add")[0], "cast")[0]
    codebooks = _codebooks(view, _behind(view, table, "reshape")[0])
    parts = [_uncast(view, part) for part in (codes, codebooks, scales)]
    handles = [view.weight(part) for part in parts]
    kinds = [None if h is None else (h.dtype.is_floating_point, len(h.shape)) for h in handles]
    if kinds != [(False, 3), (True, 3), (True, 1)]:
        raise Refusal("its codes, codebooks or scales are no constants of such kinds", node)
    assert handles[0] is not None
    _, rows, groups = handles[0].shape
    fan_in = groups * WIDTH if columns is None else columns
    return (x, *parts), {"in_features": fan_in, "out_features": rows}


def _codebooks(view: View, value: Operand) -> Operand:
    """What the tables are reshaped from, or summed from."""
    if not is_value(value) or _op(view, value) != "add":
        return value
    high, low = _behind(view, value, "add")
    high = _behind(view, high, "reshape")[0]
    split = view.producer(low) if is_value(low) else None
    if split is None or view.op(split) != "split" or tuple(view.results(split)) != (high, low):
        raise Refusal("its tables are not the sums of two codebooks", split)
    return _behind(view, view.tensor(split), "reshape")[0]


def _uncast(view: View, value: Operand) -> Operand:
    if not is_value(value) or _op(view, value) != "cast":
        return value
    return _behind(view, value, "cast")[0]


def _op(view: View, value: Value) -> str:
    node = view.producer(value)
    return "" if node is None else view.op(node)


def _behind(view: View, value: Operand, *ops: str) -> tuple[Operand, ...]:
    """The operands of what makes a value, which is one of ``ops``."""
    node = view.producer(value) if is_value(value) else None
    if node is None or view.op(node) not in ops:
        raise Refusal(f"there is no {ops[0]} where linear_aqlm has one", node)
    return view.operands(node)


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        # N, K, planes, entries, dtype of x, leading shape, bias
        (24, 64, 2, 256, torch.float32, (5,), False),
        (7, 45, 1, 16, torch.float32, (2, 3), True),
        (1, 1, 1, 256, torch.float32, (1,), False),
        (5, 123, 3, 16, torch.float32, (1, 5), True),
        (9, 64, 2, 16, torch.float16, (5,), True),
        (16, 45, 2, 256, torch.bfloat16, (1, 5), True),
    ]
    return [_sample(seed, *case) for seed, case in enumerate(cases)]


def _sample(
    seed: int, fan_out: int, fan_in: int, planes: int, entries: int, dtype: torch.dtype,
    lead: tuple[int, ...], bias: bool,
) -> Sample:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    books = planes if entries == TABLE else 2 * planes
    groups = -(-fan_in // WIDTH)
    operands = (
        torch.randn(*lead, fan_in, generator=rng).to(dtype),
        torch.randint(0, 256, (planes, fan_out, groups), generator=rng, dtype=torch.uint8),
        torch.randn(books, entries, WIDTH, generator=rng).half(),
        (torch.rand(fan_out, generator=rng) * 0.05 + 0.01).half(),
        torch.randn(fan_out, generator=rng).to(dtype) if bias else None,
    )
    attrs = {"in_features": fan_in, "out_features": fan_out}
    label = f"{fan_out}x{fan_in}-{planes}x{entries}-{str(dtype).removeprefix('torch.')}"
    return Sample(operands, attrs, label)


LINEAR_AQLM = own_op(
    linear_aqlm, infer=_infer, record=_record, samples=_samples, heavy=True,
    macs=Macs(linear_macs), dense=_dense, stored_linear=lambda attrs: "sums of vectors",
    decoders=(StockDecoder("matmul", _decode),),
)  # fmt: skip
