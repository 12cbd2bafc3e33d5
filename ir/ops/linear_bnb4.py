"""``linear_bnb4``: a linear in the 4 bits of bitsandbytes, NF4 (QLoRA, arXiv 2305.14314) or FP4.

``W = table[code] * absmax``: the matrix is flattened, row behind row, and cut into blocks, each
with its greatest magnitude; codes pick from 16 numbers, two a byte, the earlier in the high nibble.
With double quantization these magnitudes are codes of 8 bits, ``table[code] * outer + offset``: so
they lie in a file, and the runtime folds them into float32.

ONNX Runtime has ``com.microsoft::MatMulBnb4`` for it, with the same tables, for blocks of up to 256
(``BLOCKS``); it makes the matrix anew at each call. In standard ops bytes pick pairs of numbers
from a table of 256, which the runtime folds into one dense matrix as it loads. Measured with ONNX
Runtime 1.31 on one AVX-512 core, other processes beside it, for 2048 x 2048 in blocks of 64:

==================  =========  ========  ==================  =================
form                file, KiB  load, ms  1 / 16 rows, ms     weights in memory
==================  =========  ========  ==================  =================
MatMulBnb4              2,304         1  2.5 / 3.3           4.5 bits
table of pairs          2,306       224  0.18 / 0.61         32 bits
MatMul, float32        16,384        71  0.19 / 0.78         32 bits
==================  =========  ========  ==================  =================

4 bits anew (``quantize``) take 0.08 ms a row there, and lose what their rounding costs
(``python -m graphwright.tools.bench.format_codes --costs``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import Refusal
from ..core.types import Type
from ..core.view import Node, Operand, View
from ..vocab.linear import linear_macs
from ..vocab.onnx import MICROSOFT
from ..vocab.spec import Attrs, Macs
from .base import Sample, StockDecoder, own_op
from .behind import behind, past
from .emit import cast, constant
from .linear_w8a8 import ended, known
from .stored_types import stored_linear_type

if TYPE_CHECKING:
    from onnx_ir.tape import Tape

NODE = "MatMulBnb4"
FORM = "table-of-pairs"
"""The name by which a target asks for standard ops."""
BLOCKS = (16, 32, 64, 128, 256)
"""Numbers of a block, as the node takes them."""
_HALF = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
TABLES = {
    "fp4": torch.tensor([*_HALF, *(-number for number in _HALF)]),
    "nf4": torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]),
}  # fmt: skip
"""The 16 numbers f32 of each kind, in the order of the node's ``quant_type``."""
KINDS = tuple(TABLES)


def linear_bnb4(
    x: Tensor, codes: Tensor, absmax: Tensor, outer: Tensor | None = None,
    table: Tensor | None = None, bias: Tensor | None = None, *,
    quant_type: int, block: int, in_features: int, out_features: int, outer_block: int = 0,
    offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """``x @ W.T + bias`` in the dtype of ``x``, summed in float32; W as ``dense`` gives it.

    x [..., K]; codes uint8 [ceil(N K / 2)]; absmax f32 [ceil(N K / block)], or uint8 with outer f32
    [ceil(blocks / outer_block)] and table f32 [256]; bias [N]; quant_type 0 for FP4, 1 for NF4.
    """
    each = magnitudes(absmax, outer, table, outer_block, offset)
    weight = dense(codes, each, _numbers(quant_type), block, (out_features, in_features))
    wide_bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight, wide_bias).to(x.dtype)


def _numbers(quant_type: int) -> Tensor:
    return TABLES[KINDS[quant_type]]


def magnitudes(
    absmax: Tensor, outer: Tensor | None, table: Tensor | None, outer_block: int, offset: float
) -> Tensor:
    """Those of the blocks, f32: as they are stored, or ``table[absmax] * outer + offset``."""
    if outer is None or table is None:
        return absmax
    spread = outer.repeat_interleave(outer_block)[: len(absmax)]
    return table.index_select(0, absmax.int()) * spread + offset


def pairs(table: Tensor) -> Tensor:
    """The two numbers f32 that each byte stands for, ``[256, 2]``."""
    return torch.stack((table.repeat_interleave(16), table.repeat(16)), 1)


def dense(
    codes: Tensor, absmax: Tensor, table: Tensor, block: int, shape: tuple[int, int]
) -> Tensor:
    """The matrix ``table[code] * absmax`` f32 [N, K] of a table of 16 numbers."""
    count = shape[0] * shape[1]
    numbers = pairs(table).index_select(0, codes.int()).flatten()[:count]
    padded = torch.nn.functional.pad(numbers, (0, len(absmax) * block - count))
    return padded.view(-1, block).mul_(absmax.unsqueeze(1)).flatten()[:count].view(shape)


def operand_types(attrs: Attrs) -> list[Type]:
    """Types of codes and absmax, and with double quantization those of outer and table."""
    count = attrs["in_features"] * attrs["out_features"]
    blocks, outer = -(-count // attrs["block"]), attrs.get("outer_block", 0)
    codes = Type(torch.uint8, (-(-count // 2),))
    if not outer:
        return [codes, Type(torch.float32, (blocks,))]
    sizes = (-(-blocks // outer), 256)
    return [codes, Type(torch.uint8, (blocks,)), *(Type(torch.float32, (n,)) for n in sizes)]


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x, *constants, bias = (*operands, *[None] * 6)[:6]
    names, types = ("codes", "absmax", "outer", "table"), operand_types(attrs)
    if [c is None for c in constants] != [place >= len(types) for place in range(4)]:
        raise ValueError("linear_bnb4: outer and table are there where outer_block is, both")
    stored = dict(zip(names, zip(constants, types, strict=False), strict=False))
    return stored_linear_type("linear_bnb4", x, stored, bias, attrs)


def _dense(columns: int, operands: Sequence[Tensor | None], attrs: Attrs) -> Tensor:
    codes, absmax, outer, table = operands[:4]
    assert codes is not None and absmax is not None
    shape = (attrs["out_features"], attrs["in_features"])
    each = magnitudes(absmax, outer, table, attrs["outer_block"], attrs["offset"])
    return dense(codes, each, _numbers(attrs["quant_type"]), attrs["block"], shape)


def _form(attrs: Attrs) -> str:
    form = f"{KINDS[attrs['quant_type']]} in blocks of {attrs['block']}"
    return f"{form}, scales in 8 bits" if attrs.get("outer_block") else form


# --- the ONNX forms -------------------------------------------------------------------------------


def _record(tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]) -> ir.Value:
    if attrs["block"] not in BLOCKS:
        return _record_table(tape, operands, attrs)
    x, codes, absmax, bias = _operands(tape, operands, attrs)
    sizes = {"K": attrs["in_features"], "N": attrs["out_features"]}
    kind = {"block_size": attrs["block"], "quant_type": attrs["quant_type"]}
    # The CPU provider has the node for float32 alone.
    inputs = [cast(tape, x, ir.DataType.FLOAT), codes, absmax]
    y = tape.op(NODE, inputs, sizes | kind, domain=MICROSOFT, version=1)
    return ended(tape, y, bias, x)


def _operands(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value | None]:
    """x, codes, the magnitudes f32 and the bias, if any."""
    x, codes, absmax, outer, table, bias = (*operands, *[None] * 6)[:6]
    x, codes, absmax, bias = known("linear_bnb4", (x, codes, absmax, bias))
    if outer is None or table is None:
        return x, codes, absmax, bias
    picked = tape.op("Gather", [table, cast(tape, absmax, ir.DataType.INT32)], {"axis": 0})
    blocks = -(-attrs["in_features"] * attrs["out_features"] // attrs["block"])
    times = attrs["outer_block"]
    apart = tape.op("Unsqueeze", [outer, constant(tape, [1])])
    spread = tape.op("Expand", [apart, constant(tape, [1, times])])
    flat = _cut(tape, tape.op("Reshape", [spread, constant(tape, [-1])]), blocks)
    scaled = tape.op("Mul", [picked, flat])
    return x, codes, tape.op("Add", [scaled, constant(tape, attrs["offset"], np.float32)]), bias


def _record_table(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]
) -> ir.Value:
    """The same in standard ops."""
    x, codes, absmax, bias = _operands(tape, operands, attrs)
    rows, columns, block = attrs["out_features"], attrs["in_features"], attrs["block"]
    count = rows * columns
    whole = -(-count // block) * block
    table = constant(tape, pairs(_numbers(attrs["quant_type"])).numpy(), np.float32)
    picked = tape.op("Gather", [table, cast(tape, codes, ir.DataType.INT32)], {"axis": 0})
    numbers = tape.op("Reshape", [picked, constant(tape, [-1])])
    held = 2 * -(-count // 2)
    if held < whole:
        numbers = tape.op("Pad", [numbers, constant(tape, [0, whole - held])])
    if held > whole:
        numbers = _cut(tape, numbers, whole)
    blocks = tape.op("Reshape", [numbers, constant(tape, [-1, block])])
    column = tape.op("Unsqueeze", [absmax, constant(tape, [1])])
    scaled = tape.op("Mul", [blocks, column])
    if whole > count:
        scaled = _cut(tape, tape.op("Reshape", [scaled, constant(tape, [-1])]), count)
    weight = tape.op("Reshape", [scaled, constant(tape, [rows, columns])])
    turned = tape.op("Transpose", [weight], {"perm": [1, 0]})
    return ended(tape, tape.op("MatMul", [cast(tape, x, ir.DataType.FLOAT), turned]), bias, x)


def _cut(tape: Tape, flat: ir.Value, count: int) -> ir.Value:
    return tape.op("Slice", [flat, *(constant(tape, [n]) for n in (0, count, 0))])


# --- back from them -------------------------------------------------------------------------------


def _decode(view: View, node: Node) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """From the one node; its bias is an addition behind it."""
    attrs = view.attrs(node)
    kind, block = attrs.get("quant_type"), int(attrs["block_size"])
    if kind not in (0, 1) or attrs.get("transB", 1) != 1 or len(view.operands(node)) != 3:
        raise Refusal(f"its quant_type is {kind}, or its matrix is not transposed", node)
    sizes = {"in_features": int(attrs["K"]), "out_features": int(attrs["N"])}
    x, codes, absmax = view.operands(node)
    return _read(view, node, (x, codes, absmax), {"quant_type": kind, "block": block, **sizes})


def _decode_table(view: View, node: Node) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """From the product up to the table, the codes and the scales of the blocks."""
    x, turned = view.operands(node)
    (weight, *_) = behind(view, turned, "transpose")
    shape = behind(view, weight, "reshape")[1:]
    scaled, _ = past(view, weight, "reshape", "slice")
    numbers, column = behind(view, scaled, "mul")
    block = behind(view, numbers, "reshape")[-1]
    picked, _ = past(view, numbers, "reshape", "slice", "Pad")
    table, ids = behind(view, picked, "embedding", "index_select")
    known_pairs = view.weight(table)
    sizes_known = len(shape) == 2 and all(isinstance(size, int) for size in (*shape, block))
    if known_pairs is None or known_pairs.shape != (256, 2) or not sizes_known:
        raise Refusal("there is no table of pairs where linear_bnb4 has one", node)
    held = known_pairs.read()
    kind = next((k for k in (0, 1) if torch.equal(held, pairs(_numbers(k)))), None)
    if kind is None:
        raise Refusal("its table is none of bitsandbytes'", node)
    parts = (x, behind(view, ids, "cast")[0], behind(view, column, "unsqueeze")[0])
    sizes = {"in_features": shape[1], "out_features": shape[0]}
    return _read(view, node, parts, {"quant_type": kind, "block": block, **sizes})


def _read(
    view: View, node: Node, operands: Sequence[Operand], attrs: dict[str, Any]
) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """The op. Raises ``Refusal`` where its codes or scales are no constants, or do not fit."""
    x, codes, absmax = operands
    parts, more = _magnitudes(view, absmax)
    parts, attrs = [codes, *parts], attrs | more
    if min(attrs["in_features"], attrs["out_features"], attrs["block"]) < 1:
        raise Refusal("its sizes are no numbers above 0", node)
    handles = [view.weight(part) for part in parts]
    types = operand_types(attrs)
    if any(h is None or (h.dtype, h.numel) != (t.dtype, t.numel)
           for h, t in zip(handles, types, strict=True)):  # fmt: skip
        raise Refusal("its codes or absmax are no constants of such sizes", node)
    flat = [
        view.add_weight(view.name(part), handle.reshaped((handle.numel,)))  # type: ignore[arg-type]
        if handle is not None and len(handle.shape) != 1 else part
        for part, handle in zip(parts, handles, strict=True)
    ]  # fmt: skip
    return (x, *flat), attrs


def _magnitudes(view: View, absmax: Operand) -> tuple[list[Operand], dict[str, Any]]:
    """The constants that the magnitudes of the blocks are, or are made of, and the attributes."""
    if view.weight(absmax) is not None:
        return [absmax], {}
    scaled, offset = behind(view, absmax, "add")
    picked, flat = behind(view, scaled, "mul")
    table, ids = behind(view, picked, "embedding", "index_select")[:2]
    apart, _ = past(view, flat, "slice", "reshape")
    outer, _, times = behind(view, apart, "expand")
    codes, outer = behind(view, ids, "cast")[0], behind(view, outer, "unsqueeze")[0]
    number = view.number(offset)
    if number is None or not isinstance(times, int) or times < 1:
        raise Refusal("its magnitudes are made of something else")
    return [codes, outer, table], {"outer_block": times, "offset": float(number)}


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        # N, K, block, outer block, NF4, dtype of x, leading shape, bias
        (24, 64, 64, 0, 1, torch.float32, (5,), False),
        (7, 45, 16, 8, 0, torch.float32, (2, 3), True),
        (1, 1, 64, 0, 1, torch.float32, (1,), False),
        (16, 96, 512, 256, 1, torch.float32, (1, 5), True),
        (9, 64, 32, 4, 1, torch.float16, (5,), True),
        (16, 45, 128, 0, 0, torch.bfloat16, (1, 5), True),
    ]
    return [_sample(seed, *case) for seed, case in enumerate(cases)]


def _sample(
    seed: int, fan_out: int, fan_in: int, block: int, outer: int, kind: int, dtype: torch.dtype,
    lead: tuple[int, ...], bias: bool,
) -> Sample:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    sizes = {"in_features": fan_in, "out_features": fan_out}
    attrs: dict[str, Any] = {"quant_type": kind, "block": block, **sizes}
    attrs |= {"outer_block": outer, "offset": 0.25} if outer else {}
    constants: list[Tensor | None] = []
    for type_ in operand_types(attrs):
        (size,) = type_.shape or ()
        assert isinstance(size, int)
        drawn = torch.rand(size, generator=rng)
        is_code = type_.dtype == torch.uint8
        constants.append((drawn * 256).byte() if is_code else drawn * 0.05 + 0.01)
    operands = (
        torch.randn(*lead, fan_in, generator=rng).to(dtype),
        *(*constants, None, None)[:4],
        torch.randn(fan_out, generator=rng).to(dtype) if bias else None,
    )
    label = f"{KINDS[kind]}-{block}-{outer}-{fan_out}x{fan_in}-{str(dtype).removeprefix('torch.')}"
    return Sample(operands, attrs, label)


LINEAR_BNB4 = own_op(
    linear_bnb4, infer=_infer, record=_record, samples=_samples, forms={FORM: _record_table},
    heavy=True, macs=Macs(linear_macs), dense=_dense, as_numbers=True,
    stored_linear=_form,
    decoders=(
        StockDecoder(f"{MICROSOFT}::{NODE}", _decode), StockDecoder("matmul", _decode_table),
    ),
)  # fmt: skip
