"""``embedding_nbit``: rows of a table that is stored in 4 or 8 bits (layout: ``pack``).

The ONNX form is ``com.microsoft::GatherBlockQuantized`` on the very bytes that ``linear_nbit``'s
``MatMulNBits`` multiplies by, so that a table and a head that is tied to it are stored once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import InvalidGraph, Refusal
from ..core.types import Type
from ..core.view import Node, Operand, View
from ..vocab.onnx import MICROSOFT
from . import dequantized
from .base import Sample, StockDecoder, own_op
from .emit import cast, constant
from .pack import dequantize, n_groups, pack, pack_zeros, zero_bytes

if TYPE_CHECKING:
    from onnx_ir.tape import Tape

NODE = "GatherBlockQuantized"
BITS = (4, 8)


def embedding_nbit(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group: int,
    width: int,
) -> Tensor:
    """Rows ``ids`` of ``(codes - zeros) * scales``: float32 ``[*ids, width]``.

    ids int [...], 0 to rows - 1; codes uint8 [rows, width / group, group * bits / 8]; scales [rows,
    width / group] of floats; zeros absent (all are 2^(bits-1)) or uint8 [rows, zero bytes]
    (``pack_zeros``). ``bits`` is 4 or 8, ``group`` divides ``width``.
    """
    flat = ids.reshape(-1).long()
    parts = codes[flat], scales[flat], None if zeros is None else zeros[flat]
    rows = dequantize(*parts, bits=bits, group=group, in_features=width)
    return rows.reshape(*ids.shape, width)


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    ids, codes, scales = operands[:3]
    width, group = attrs["width"], attrs["group"]
    groups = n_groups(group, width)
    if attrs["bits"] not in BITS or not group or width % group:
        raise ValueError(f"embedding_nbit: {attrs['bits']} bits, group {group} of {width}")
    for name, type_, tail in (
        ("codes", codes, (groups, group * attrs["bits"] // 8)), ("scales", scales, (groups,)),
    ):  # fmt: skip
        if type_.shape is not None and type_.shape[1:] != tail:
            raise ValueError(f"embedding_nbit: {name} are {type_}, expected [rows, *{tail}]")
    shape = None if ids.shape is None else (*ids.shape, width)
    return (Type(torch.float32, shape),)


def _record(tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]) -> ir.Value:
    ids, codes, scales, zeros = (*operands, None)[:4]
    if codes is None or ids is None or scales is None:
        raise InvalidGraph("embedding_nbit needs codes, ids and scales")
    flat = constant(tape, [-1, attrs["width"] * attrs["bits"] // 8])
    wide = cast(tape, scales, ir.DataType.FLOAT)
    inputs = [tape.op("Reshape", [codes, flat]), ids, wide, zeros]
    options = {
        "bits": attrs["bits"], "block_size": attrs["group"], "gather_axis": 0, "quantize_axis": 1,
    }  # fmt: skip
    return tape.op(NODE, inputs if zeros else inputs[:3], options, domain=MICROSOFT, version=1)


def _decode(view: View, node: Node) -> tuple[Sequence[Operand], Mapping[str, Any]]:
    """``GatherBlockQuantized`` of a constant uint8 table, flat or in blocks, ours or another's."""
    data, ids, scales, *zeros = view.operands(node)
    attrs = view.attrs(node)
    bits, group = int(attrs.get("bits", 4)), int(attrs.get("block_size", 128))
    codes, scales = _constant(view, data, "reshape"), _constant(view, scales, "cast")
    table = None if codes is None else view.weight(codes)
    if codes is None or scales is None or table is None or table.dtype != torch.uint8:
        raise Refusal("its codes or scales are no constants, or codes are not packed", node)
    width = table.numel // table.shape[0] * 8 // bits
    axes = attrs.get("gather_axis", 0), attrs.get("quantize_axis", 1) % 2
    if axes != (0, 1) or bits not in BITS or width % group:
        raise Refusal(f"{bits} bits in groups of {group}, axes {axes}: not read", node)
    if view.type(view.results(node)[0]).dtype != torch.float32:
        raise Refusal("its rows are not float32", node)
    shape = (table.shape[0], width // group, group * bits // 8)
    if table.shape != shape:
        codes = view.add_weight(view.name(codes), table.reshaped(shape))
    return (ids, codes, scales, *zeros), {"bits": bits, "group": group, "width": width}


def _constant(view: View, value: Operand, op: str) -> Any:
    """The constant that a value is, or is one ``op`` of."""
    node = view.producer(value) if view.weight(value) is None else None  # type: ignore[arg-type]
    if node is not None and view.op(node) == op:
        value = view.operands(node)[0]
    return value if view.weight(value) is not None else None


def _samples() -> list[Sample]:
    cases = [
        # bits, group, width, rows, shape of ids, dtype of scales, zero points
        (4, 32, 64, 17, (2, 5), torch.float16, False),
        (4, 16, 48, 5, (1,), torch.float32, True),
        (8, 16, 32, 9, (3, 1), torch.float16, False),
        (8, 64, 128, 6, (4,), torch.float32, True),
        (4, 128, 128, 3, (0,), torch.float16, False),
    ]
    return [_sample(seed, *case) for seed, case in enumerate(cases)]


def _sample(
    seed: int, bits: int, group: int, width: int, rows: int, lead: tuple[int, ...],
    dtype: torch.dtype, integer: bool,
) -> Sample:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    groups = width // group
    codes = torch.randint(0, 1 << bits, (rows, width), generator=rng, dtype=torch.uint8)
    scales = (torch.rand(rows, groups, generator=rng) * 0.05 + 0.01).to(dtype)
    zeros = None
    if integer:
        drawn = torch.randint(0, 1 << bits, (rows, groups), generator=rng, dtype=torch.uint8)
        zeros = pack_zeros(drawn, bits)
        assert zeros.shape[1] == zero_bytes(bits, groups)
    ids = torch.randint(0, rows, lead, generator=rng)
    label = f"{bits}bit-g{group}-{rows}x{width}-{'integer' if integer else 'none'}"
    return Sample(
        (ids, pack(codes, bits, group), scales, zeros),
        {"bits": bits, "group": group, "width": width}, label,
    )  # fmt: skip


EMBEDDING_NBIT = own_op(
    embedding_nbit, infer=_infer, record=_record, samples=_samples,
    heavy=True, table=1, tolerances={torch.float32: 1e-6},
    decoders=(StockDecoder(f"{MICROSOFT}::{NODE}", _decode),),
    forms={dequantized.FORM: dequantized.record_embedding},
)  # fmt: skip
