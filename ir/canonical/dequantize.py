"""Constants that a graph stores as whole numbers with scales become weights again.

DequantizeLinear(codes, scale, zero) => (codes - zero) scale, computed each time that it is read
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.errors import Refusal
from ..core.view import Operand, Value, View
from ..core.weights import ComputedWeight, Weight
from ..ops.coded_weight import CodedWeight
from ..ops.linear_float8 import DTYPES
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule
from ..vocab import traits

_NATIVE = "DequantizeLinear"


class FuseDequantize(Rule):
    """DequantizeLinear(codes, scale, zero) => w, where all three are constants

    Of every version, with one scale, one a row of ``axis``, or one for each ``block_size`` of them.
    Tables that rows are picked from stay as they are stored: only what is picked is computed.
    """

    name = "fuse-dequantize"

    def pattern(self, p: Any, codes: Any, scale: Any) -> Any:
        return p.native(_NATIVE, codes, scale, rest=True)

    def where(self, match: Match) -> None:
        _stored(match)
        view, result = match.view, match.view.result(match.root)
        users = view.users(result)
        if view.is_output(result) or any(_picks(view, user, result) for user in users):
            match.refuse("it is a table that rows are picked from, or an output")

    def replace(self, build: Build, **bound: Operand) -> Value:
        weight, view = _stored(build.match), build.view
        name = view.name(build.match.value("codes")).removesuffix("_quantized")
        ours = name.removesuffix(".codes.columns")  # as linear_float8 is written
        return view.add_weight(name if ours == name else f"{ours}.weight", weight)


def _picks(view: View, user: Any, value: Value) -> bool:
    return traits(view.op(user)).picks and value in view.operands(user)[:1]


def _stored(match: Match) -> Weight:
    """The weight; ``Refusal`` where an operand is computed or the scales do not fit the codes."""
    view, attrs = match.view, match.view.attrs(match.root)
    parts = [view.weight(operand) for operand in view.operands(match.root)]
    if len(parts) not in (2, 3) or any(part is None for part in parts):
        raise Refusal("its codes, scales or zero points are computed", match.root)
    codes, scale, *zeros = (part for part in parts if part is not None)
    rank, block = len(codes.shape), int(attrs.get("block_size", 0))
    axis = int(attrs.get("axis", 1)) % max(rank, 1)
    shape = list(codes.shape) if block else list(codes.shape[axis : axis + 1])
    if block:
        shape[axis] = -(-shape[axis] // block)
    if scale.numel != 1 and list(scale.shape) != shape:
        match.refuse(f"scales {list(scale.shape)} do not fit codes {list(codes.shape)}")
    if zeros and zeros[0].shape != scale.shape:
        match.refuse(f"zero points {list(zeros[0].shape)} do not fit scales {list(scale.shape)}")
    zero = zeros[0] if zeros else None

    if codes.dtype in DTYPES and not zeros and rank == 2 and scale.dtype == torch.float32:
        if scale.numel == 1:  # which way it lies is told by who multiplies by it
            users = view.users(view.result(match.root))
            axis, block = int(any(view.op(user) == "matmul" for user in users)), 0
        return _float8(codes, scale, axis, block)

    def make() -> Tensor:
        wide = torch.float32 if codes.dtype.is_floating_point else torch.int32
        numbers = codes.read().to(wide)
        if zero is not None:
            numbers = numbers - _spread(zero.read().to(wide), codes.shape, axis, block)
        factor = _spread(scale.read().to(torch.float32), codes.shape, axis, block)
        return (numbers.to(torch.float32) * factor).to(scale.dtype)

    keys = (codes.key, scale.key, zero.key if zero else None)
    return ComputedWeight(make, codes.shape, scale.dtype, ("dequantized", *keys, axis, block))


def _float8(codes: Weight, scale: Weight, axis: int, block: int) -> Weight:
    """The matrix ``[N, K]`` that knows how it is stored; ``[K, N]``, with its scales one a column
    or one a block of a column, is one transposed."""
    if (axis == 1) != (block > 0):
        turned = scale.transposed() if block else scale
        return _float8(codes.transposed(), turned, 1 - axis, block).transposed()
    (rows, columns), single = codes.shape, scale.numel == 1
    down, across = (rows, columns) if single else (1, block or columns)
    attrs = {"block_rows": down, "block_columns": across,
             "in_features": columns, "out_features": rows}  # fmt: skip
    scales = scale.reshaped((1 if single else rows, -(-columns // across)))
    return CodedWeight("linear_float8", {"codes": codes, "scales": scales}, attrs)


def _spread(scales: Tensor, shape: tuple[int, ...], axis: int, block: int) -> Tensor:
    """Scales as they broadcast over codes of ``shape``."""
    if scales.numel() == 1:
        return scales.reshape(())
    if block:
        return scales.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
    return scales.reshape([-1 if i == axis else 1 for i in range(len(shape))])


RULES: tuple[type[Rule], ...] = (FuseDequantize,)
