"""Checkpoints in codes that are not affine: float8 with scales, bitsandbytes' 4 bits.

They are numbers for whoever reads them, computed in float32, and codes for whoever writes them
where no pass has given them other numbers (``ir.ops.coded_weight``):

* float8: ``W = w8 * s``, s one number, one a row, or one a block of rows and columns, the last of
  which may be smaller. DeepSeek's ``weight_scale_inv`` multiplies, whatever its name says.
* bitsandbytes: ``W = map[code] * absmax`` over blocks of the flattened matrix, the earlier of two
  codes in the high nibble. With double quantization absmax is ``nested_map[code] * nested_absmax +
  offset``. Read from bitsandbytes 0.50 (``functional.py``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import BadInput
from ...core.weights import ComputedWeight, Weight
from ...ops.coded_weight import CodedWeight
from ...ops.linear_bnb4 import KINDS, TABLES, dense, magnitudes
from .stored_linear import finite, needed, powers_of_two
from .tensor_kinds import BYTES, FLOAT8, FLOATS, SCALES

FLOAT8_TENSORS = {
    "weight": FLOAT8, "weight_scale": SCALES, "weight_scale_inv": SCALES, "input_scale": None,
    "output_scale": None, "activation_scale": None,
}  # fmt: skip
STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
BNB4_TENSORS = {
    "weight": BYTES, "weight.absmax": None, "weight.quant_map": FLOATS,
    "weight.nested_absmax": FLOATS, "weight.nested_quant_map": FLOATS,
    **dict.fromkeys(STATES, BYTES),
}  # fmt: skip


@dataclass(frozen=True)
class Dense:
    """A weight in numbers, and what it was stored as."""

    weight: Weight
    form: str


def read_float8(name: str, own: Mapping[str, Weight], config: Mapping[str, Any]) -> Dense:
    """A float8 matrix with its scales. Raises ``BadInput`` where they contradict each other."""
    weight = needed(name, own, "weight")
    scale = next(own[key] for key in ("weight_scale_inv", "weight_scale") if key in own)
    rows, columns = weight.shape
    block = _block(name, config)
    shape = tuple(scale.shape)
    if scale.numel == 1:
        block, form = [rows, columns], "one scale"
    elif shape in ((rows,), (rows, 1)):
        block, form = [1, columns], "a scale a row"
    elif block is not None:
        form = f"a scale for {block[0]} x {block[1]}"
        if shape != (-(-rows // block[0]), -(-columns // block[1])):
            raise BadInput(
                f"{name}: {list(shape)} scales of a matrix {[rows, columns]} in blocks of {block}"
            )
    else:
        raise BadInput(
            f"{name}: {list(shape)} scales of a matrix {[rows, columns]}, and the config does not "
            "say of which blocks"
        )
    down, across = block
    grid = (-(-rows // down), -(-columns // across))

    def codes() -> Tensor:
        stored = weight.read()
        finite(name, "the float8 numbers", stored.to(torch.float16))
        return stored

    parts = {
        "codes": ComputedWeight(codes, (rows, columns), weight.dtype, ("float8", weight.key)),
        "scales": ComputedWeight(lambda: _scales(name, scale).reshape(grid), grid, torch.float32,
                                 ("scales", scale.key)),
    }  # fmt: skip
    attrs = {"block_rows": down, "block_columns": across,
             "in_features": columns, "out_features": rows}  # fmt: skip
    kind = str(weight.dtype).removeprefix("torch.")
    return Dense(CodedWeight("linear_float8", parts, attrs), f"{kind} with {form}")


def _block(name: str, config: Mapping[str, Any]) -> list[int] | None:
    """Rows and columns that share a scale, where the config says them."""
    block = config.get("weight_block_size") or config.get("block_structure")
    if config.get("type") == "float" and config.get("group_size"):
        block = [1, config["group_size"]]
    if isinstance(block, str):
        block = [int(size) if size.isdigit() else size for size in block.split("x")]
    if block is None:
        return None
    if not isinstance(block, list) or [type(size) for size in block] != [int, int] or (
        min(block) < 1
    ):  # fmt: skip
        raise BadInput(f"{name}: blocks of {block!r} in quantization_config; rows and columns are "
                       "read")  # fmt: skip
    return block


def _scales(name: str, scale: Weight) -> Tensor:
    """f32; exponents alone (``e8m0``) are powers of two."""
    stored = scale.read()
    if stored.dtype == torch.uint8:
        return powers_of_two(name, stored)
    return finite(name, "the scales", stored.float())


def read_bnb4(name: str, own: Mapping[str, Weight], config: Mapping[str, Any]) -> Dense:
    """A matrix in NF4 or FP4. Raises ``BadInput`` where its tensors contradict each other."""
    codes, absmax, table = (
        needed(name, own, key) for key in ("weight", "weight.absmax", "weight.quant_map")
    )
    key = next((key for key in STATES if key in own), None)
    if key is None:
        raise BadInput(f"{name}: {STATES[0]} is not in the checkpoint, and others of it are")
    try:
        state = json.loads(bytes(own[key].read().tolist()))
        rows, columns = (int(size) for size in state["shape"])
        block, kind = int(state["blocksize"]), str(state["quant_type"])
        outer = int(state["nested_blocksize"]) if "nested_blocksize" in state else 0
        offset = float(state.get("nested_offset", 0.0))
        if min(rows, columns, block) < 1 or outer < 0 or not math.isfinite(offset):
            raise ValueError("a size below 1, or an offset that is no number")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{name}.{key} is no state of bitsandbytes: {error}") from None
    blocks = -(-rows * columns // block)
    if codes.numel * 2 != rows * columns or absmax.numel != blocks or table.numel != 16:
        raise BadInput(
            f"{name}: {codes.numel} bytes, {absmax.numel} blocks and a table of {table.numel} do "
            f"not make {rows} x {columns} in blocks of {block}"
        )
    if absmax.dtype not in (BYTES if outer else FLOATS).dtypes:
        expected = (BYTES if outer else FLOATS).words
        raise BadInput(f"{name}.weight.absmax is {absmax.type}, expected {expected}")
    if outer:
        sizes = {"weight.nested_absmax": -(-blocks // outer), "weight.nested_quant_map": 256}
        for part, size in sizes.items():
            if needed(name, own, part).numel != size:
                raise BadInput(f"{name}.{part} has {own[part].numel} numbers; {blocks} blocks in "
                               f"blocks of {outer} need {size}")  # fmt: skip

    parts = {"codes": codes.reshaped((codes.numel,)), "absmax": _flat(name, own, "weight.absmax")}
    nested: dict[str, Any] = {}
    if outer:
        parts["outer"] = _flat(name, own, "weight.nested_absmax")
        parts["table"] = _map(name, own["weight.nested_quant_map"].read())
        nested = {"outer_block": outer, "offset": offset}
    form, numbers = f"{kind} in blocks of {block}", table.read().float().flatten()
    known = TABLES.get(kind)
    finite(name, "weight.quant_map", numbers)
    if known is None or not torch.equal(numbers, known):

        def make() -> Tensor:
            read = {part: weight.read() for part, weight in parts.items()}
            each = magnitudes(read["absmax"], read.get("outer"), read.get("table"), outer, offset)
            return dense(read["codes"], each, numbers, block, (rows, columns))

        keys = (*(part.key for part in parts.values()), table.key)
        handle = ComputedWeight(make, (rows, columns), torch.float32, keys)
        return Dense(handle, f"{form} with a table of its own")
    attrs = {"quant_type": KINDS.index(kind), "block": block,
             "in_features": columns, "out_features": rows, **nested}  # fmt: skip
    weight = CodedWeight("linear_bnb4", parts, attrs)
    return Dense(weight, weight.form)


def _map(name: str, stored: Tensor) -> Weight:
    """The map of bytes; all linears have one, and an artifact holds it once."""
    numbers = finite(name, "weight.nested_quant_map", stored.float().flatten())
    key = ("map", *numbers.tolist())
    return ComputedWeight(lambda: numbers, (len(numbers),), torch.float32, key)


def _flat(name: str, own: Mapping[str, Weight], part: str) -> Weight:
    """A tensor of bitsandbytes in one dimension: bytes as they are, floats in float32."""
    stored = own[part]
    if not stored.dtype.is_floating_point:
        return stored.reshaped((stored.numel,))
    return ComputedWeight(
        lambda: finite(name, part, stored.read().float().flatten()), (stored.numel,),
        torch.float32, (part, stored.key),
    )  # fmt: skip
