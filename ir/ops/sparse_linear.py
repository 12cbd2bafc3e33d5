"""``sparse_linear``: the side path of a linear's few outlier weights, ``x @ S.T``, S sparse.

The ONNX form gathers rows of the transposed ``x``, multiplies them by the values and sums them by
output row. Measured with ONNX Runtime 1.31 on one AVX-512 core, 0.5 % of 1536 x 384 / of 384 x
1536, in ms for 1 / 16 / 128 / 4096 tokens:

* a dense matrix made at load by ScatterND, then MatMul: 0.036 / 0.17 / 1.33 / 45 for both shapes,
  and the float matrix in memory that quantization had removed.
* gather, then ScatterND with ``reduction=add``: 0.046 / 0.09 / 0.31 / 22, but wrong: its threads
  race where a row has several entries (5 of 230 runs gave other sums with 8 and 64 tokens, 16
  threads, two long rows). ScatterElements is serial: 0.045 / 0.34 / 2.6 / 255.
* gather, rows with equally many entries summed by one ReduceSum: 0.18 / 0.23 / 0.42 / 31 and
  0.11 / 0.15 / 0.39 / 25. Taken: right with any number of threads. Not tried on CUDA.

Entry counts are rounded up to 1, 2, 3, 4, 6, 8, 12, ... with entries of value 0 (2 % and 13 % more
entries here), so that a matrix has at most two sums per power of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import InvalidGraph
from ..core.types import Type
from ..vocab.spec import Attrs, Macs, Shape
from .base import Sample, own_op
from .emit import cast, constant, derived

if TYPE_CHECKING:
    from onnx_ir.tape import Tape

Ints = npt.NDArray[np.int64]


def sparse_linear(
    x: Tensor, rows: Tensor, cols: Tensor, values: Tensor, *, out_features: int
) -> Tensor:
    """``x @ S.T`` in the dtype of ``x``, summed in float32; ``S[rows[i], cols[i]] = values[i]``.

    x [..., K]; rows and cols are integers [nnz] of any width (uint16 holds sizes up to 65536),
    sorted by row then column, without repetition; values float [nnz].
    """
    flat = x.reshape(-1, x.shape[-1]).float()
    index = torch.stack((rows.to(torch.int64), cols.to(torch.int64)))
    size = (out_features, x.shape[-1])
    matrix = torch.sparse_coo_tensor(
        index, values.float(), size, is_coalesced=True, check_invariants=False
    )
    y: Tensor = torch.sparse.mm(matrix, flat.t()).t().contiguous()
    return y.reshape(*x.shape[:-1], out_features).to(x.dtype)


def dense(
    rows: Tensor, cols: Tensor, values: Tensor, *, out_features: int, in_features: int
) -> Tensor:
    """The matrix ``S`` f32 [N, K] that the entries stand for."""
    matrix = values.new_zeros((out_features, in_features), dtype=torch.float32)
    matrix[rows.to(torch.int64), cols.to(torch.int64)] = values.float()
    return matrix


def index_dtype(size: int) -> torch.dtype:
    """The narrowest dtype in which row or column numbers below ``size`` are stored."""
    return torch.uint16 if size <= 1 << 16 else torch.int32


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x, rows, cols, values = operands
    if not (rows.shape == cols.shape == values.shape) or rows.rank not in (None, 1):
        raise ValueError(
            f"sparse_linear: rows {rows}, cols {cols} and values {values} must be vectors "
            "of one length"
        )
    if x.shape is None:
        return (x,)
    return (x.with_shape((*x.shape[:-1], attrs["out_features"])),)


def _dense(columns: int, operands: Sequence[Tensor | None], attrs: Attrs) -> Tensor:
    rows, cols, values = operands
    assert rows is not None and cols is not None and values is not None
    return dense(rows, cols, values, out_features=attrs["out_features"], in_features=columns)


def _macs(operands: Sequence[Any], out: Shape) -> int:
    x, rows = operands[:2]
    return int(math.prod(x[:-1]) * rows[0])


def _width(count: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, ... that is not below ``count``."""
    power = 1 << max(count - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= count else power


class _Buckets:
    """Entries of a matrix sorted by row, laid out as rectangles [rows, width] of equal width."""

    def __init__(self, rows: Ints, out_features: int) -> None:
        counts = np.bincount(rows, minlength=out_features)
        if not rows.size:
            counts[0] = 1  # one entry of value 0 stands for an empty matrix
        widths = np.array([_width(int(c)) if c else 0 for c in counts])
        order = np.argsort(widths, kind="stable")
        order = order[widths[order] > 0]
        sizes = np.unique(widths[order], return_counts=True)
        self.shapes = [(int(n), int(w)) for w, n in zip(*sizes, strict=True)]
        self.slots = int(widths.sum())
        self.place = np.full(out_features, len(order), np.int64)
        """Where a row's sum stands among all sums; rows without entries share the one after."""
        self.place[order] = np.arange(len(order))
        first_slot = np.zeros(out_features, np.int64)
        first_slot[order] = np.cumsum(widths[order]) - widths[order]
        first_entry = np.cumsum(np.bincount(rows, minlength=out_features))
        within = np.arange(rows.size) - np.concatenate(([0], first_entry))[rows]
        self.slot = first_slot[rows] + within

    def spread(self, entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Per-entry numbers in their slots, 0 in the padding."""
        out = np.zeros(self.slots, entries.dtype)
        out[self.slot] = entries
        return out


def entries(
    place: Ints, shapes: Sequence[tuple[int, int]], cols: npt.NDArray[Any]
) -> tuple[Ints, Ints]:
    """The inverse of ``_Buckets``: the row and the slot of each entry, by row, then column.

    ``place`` [N], ``shapes`` and ``cols`` [slots] are as there. Padding is told by its column: 0,
    where an entry has come before it.
    """
    order = np.argsort(place, kind="stable")
    rows, slots, row, slot = [], [], 0, 0
    for count, width in shapes:
        block = cols[slot : slot + count * width].reshape(count, width)
        kept = np.concatenate((np.ones((count, 1), bool), block[:, 1:] > 0), axis=1)
        rows.append(np.repeat(order[row : row + count], kept.sum(axis=1)))
        slots.append(slot + np.flatnonzero(kept))
        row, slot = row + count, slot + count * width
    all_rows = np.concatenate(rows)
    by_row = np.argsort(all_rows, kind="stable")
    return all_rows[by_row], np.concatenate(slots)[by_row]


def _record(tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]) -> ir.Value:
    x, rows, cols, values = operands
    if x is None or x.dtype is None:
        raise InvalidGraph("sparse_linear needs x with a known dtype")
    buckets = _Buckets(_tensor(rows, "rows").numpy().astype(np.int64), attrs["out_features"])
    cols = _spread(tape, cols, "cols", buckets)
    values = _spread(tape, values, "values", buckets)
    work = ir.DataType.FLOAT
    lead = tape.op("Shape", [x], {"start": 0, "end": -1})
    last = tape.op("Shape", [x], {"start": -1})
    flat_shape = tape.op("Concat", [constant(tape, [-1]), last], {"axis": 0})
    flat = tape.op("Reshape", [cast(tape, x, work), flat_shape])
    tokens_last = tape.op("Transpose", [flat], {"perm": [1, 0]})
    picked = tape.op("Gather", [tokens_last, cast(tape, cols, ir.DataType.INT64)], {"axis": 0})
    column = tape.op("Unsqueeze", [cast(tape, values, work), constant(tape, [1])])
    sums = _row_sums(tape, tape.op("Mul", [picked, column]), buckets)
    by_row = tape.op("Gather", [sums, constant(tape, buckets.place, np.int32)], {"axis": 0})
    y = tape.op("Transpose", [by_row], {"perm": [1, 0]})
    out_shape = [lead, constant(tape, [attrs["out_features"]])]
    y = tape.op("Reshape", [y, tape.op("Concat", out_shape, {"axis": 0})])
    return cast(tape, y, x.dtype) if x.dtype != work else y


def _row_sums(tape: Tape, products: ir.Value, buckets: _Buckets) -> ir.Value:
    """Sums [rows with entries + 1, tokens] of the products [slots, tokens]; the last row is 0."""
    sizes = [n * w for n, w in buckets.shapes]
    parts: Sequence[ir.Value] = [products]
    if len(sizes) > 1:
        split = [products, constant(tape, sizes)]
        parts = tape.op_multi_out("Split", split, {"axis": 0}, num_outputs=len(sizes))
    sums = []
    for part, (n, width) in zip(parts, buckets.shapes, strict=True):
        if width > 1:
            block = tape.op("Reshape", [part, constant(tape, [n, width, -1])])
            part = tape.op("ReduceSum", [block, constant(tape, [1])], {"keepdims": 0})
        sums.append(part)
    joined = tape.op("Concat", sums, {"axis": 0}) if len(sums) > 1 else sums[0]
    return tape.op("Pad", [joined, constant(tape, [0, 0, 1, 0])])


def _tensor(value: ir.Value | None, name: str) -> ir.TensorProtocol:
    if value is None or value.const_value is None:
        raise InvalidGraph(f"sparse_linear: {name} must be a constant of the graph")
    return value.const_value


def _spread(tape: Tape, value: ir.Value | None, name: str, buckets: _Buckets) -> ir.Value:
    """A lazy initializer holding a per-entry operand in the order of the buckets."""
    source = _tensor(value, name)
    assert value is not None

    def make() -> ir.TensorProtocol:
        return ir.tensor(buckets.spread(source.numpy()), dtype=source.dtype)

    return derived(tape, f"{value.name or name}.by_row_length", make, source.dtype, [buckets.slots])


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        # N, K, entries, x dtype, leading shape, index dtype
        (7, 45, 30, torch.float32, (5,), torch.uint16),
        (1, 1, 1, torch.float32, (1,), torch.int32),
        (123, 16, 11, torch.float32, (2, 3), torch.int64),
        (3, 123, 200, torch.float32, (1, 1), torch.uint16),
        (5, 8, 0, torch.float32, (4,), torch.uint16),
        (9, 64, 40, torch.float16, (5,), torch.int32),
        (9, 64, 40, torch.bfloat16, (1, 5), torch.uint16),
    ]
    return [_sample(seed, *case) for seed, case in enumerate(cases)]


def _sample(
    seed: int, fan_out: int, fan_in: int, entries: int, dtype: torch.dtype,
    lead: tuple[int, ...], index: torch.dtype,
) -> Sample:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    flat = torch.randperm(fan_out * fan_in, generator=rng)[:entries].sort().values
    operands = (
        torch.randn(*lead, fan_in, generator=rng).to(dtype),
        (flat // fan_in).to(index),
        (flat % fan_in).to(index),
        torch.randn(entries, generator=rng),
    )
    label = f"{fan_out}x{fan_in}-{entries}-{str(dtype).removeprefix('torch.')}"
    return Sample(operands, {"out_features": fan_out}, label)


SPARSE_LINEAR = own_op(
    sparse_linear, infer=_infer, record=_record, samples=_samples,
    heavy=True, macs=Macs(_macs, reads=2), dense=_dense,
)  # fmt: skip
