"""``linear_nbit``: a linear whose weight is stored in 2, 3, 4 or 8 bits (layout: ``pack``).

Its ONNX forms are ``MatMulNBits`` (``matmul_nbits``), and standard ops alone (``dequantized``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.types import Type
from ..vocab.linear import linear_macs
from ..vocab.spec import Attrs, Macs
from . import dequantized, matmul_nbits
from .base import Sample, own_op
from .pack import block_of, check_format, dequantize, n_blocks, n_groups, pack, pack_zeros
from .pack import zero_bytes as row_zero_bytes
from .stored_types import stored_linear_type

NUMBERS = 1 << 22
"""Of a weight that are numbers at a time: 16 MB of them. A head of 152,000 words by 896 would be
544, which are written once to be read once."""


def linear_nbit(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
    in_features: int,
    out_features: int,
    accuracy_level: int = 0,
) -> Tensor:
    """``x @ ((codes - zeros) * scales).T + bias``, summed in float32, in the dtype of ``x``.

    x [..., K]; codes uint8 [N, blocks, bytes]; scales float [N, groups]; zeros absent (all are
    2^(bits-1)), uint8 [N, zero bytes] or float [N, groups]; bias [N]. ``accuracy_level`` is
    MatMulNBits' attribute: 0 computes in the dtype of ``x``; 4 rounds ``x`` to 8 bits in each
    stored block first (``rounded``), but for what real zero points add.
    """
    form = {"bits": bits, "group": group, "in_features": in_features}
    wide = x.float()
    coarse = rounded(wide, block_of(group, in_features)) if accuracy_level == 4 else wide
    step, parts = max(1, NUMBERS // in_features), []
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        zero, added = (None if t is None else t[rows] for t in (zeros, bias))
        parts.append(_rows(wide, coarse, codes[rows], scales[rows], zero, added, form))
    return torch.cat(parts, -1).to(x.dtype)


def _rows(
    wide: Tensor, coarse: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None,
    bias: Tensor | None, form: Mapping[str, int],
) -> Tensor:  # fmt: skip
    """Some rows of the weight, times ``coarse``; what real zero points add, times ``wide``."""
    bias = None if bias is None else bias.float()
    weight = dequantize(codes, scales, zeros, **form)
    if coarse is wide or zeros is None or not zeros.is_floating_point():
        return torch.nn.functional.linear(coarse, weight, bias)
    coded = dequantize(codes, scales, None, **form)
    y = torch.nn.functional.linear(coarse, coded, bias)
    return y + torch.nn.functional.linear(wide, weight - coded)


def rounded(x: Tensor, block: int) -> Tensor:
    """``x`` [..., K] as signed 8-bit codes times ``max |x| / 127`` of each block of columns.

    ONNX Runtime 1.31 does the same on the CPU: with it ``accuracy_level=4`` agrees to 3e-7.
    """
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -columns % block))
    blocks = padded.reshape(*x.shape[:-1], padded.shape[-1] // block, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(blocks / torch.where(scale > 0, scale, 1.0))
    return (codes * scale).reshape(padded.shape)[..., :columns]


def _dense(columns: int, operands: Sequence[Tensor | None], attrs: Attrs) -> Tensor:
    codes, scales, zeros = operands[:3]
    assert codes is not None and scales is not None
    form = {name: attrs[name] for name in ("bits", "group", "in_features")}
    return dequantize(codes, scales, zeros, **form)


def _form(attrs: Attrs) -> str:
    return f"{attrs['bits']} bits, " + (f"group {attrs['group']}" if attrs["group"] else "rows")


def operand_types(
    in_features: int,
    out_features: int,
    *,
    bits: int,
    group: int,
    zeros: Literal["none", "integer", "real"] = "none",
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Type, Type, Type | None]:
    """Types of codes, scales and zeros of a linear in this format.

    Raises ``BadInput`` where the format has no storage form.
    """
    check_format(bits, group)
    groups = n_groups(group, in_features)
    row = (n_blocks(group, in_features), block_of(group, in_features) * bits // 8)
    scales = Type(scale_dtype, (out_features, groups))
    integer = Type(torch.uint8, (out_features, row_zero_bytes(bits, groups)))
    zero = {"none": None, "integer": integer, "real": scales}[zeros]
    return Type(torch.uint8, (out_features, *row)), scales, zero


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x, codes, scales, zeros, bias = (*operands, None, None)[:5]
    real = zeros is not None and zeros.dtype != torch.uint8
    types = operand_types(
        attrs["in_features"], attrs["out_features"], bits=attrs["bits"], group=attrs["group"],
        zeros="none" if zeros is None else "real" if real else "integer",
        scale_dtype=scales.dtype,
    )  # fmt: skip
    names = ("codes", "scales", "zeros")
    stored = dict(zip(names, zip((codes, scales, zeros), types, strict=True), strict=True))
    return stored_linear_type("linear_nbit", x, stored, bias, attrs)


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        # bits, group, K, N, zeros, scale dtype, x dtype, leading shape, bias, accuracy level
        (4, 32, 64, 24, "none", torch.float32, torch.float32, (5,), False),
        (4, 16, 45, 7, "integer", torch.float16, torch.float32, (2, 3), True),
        (4, 32, 123, 5, "real", torch.float16, torch.float32, (1, 5), True),
        (4, 0, 123, 5, "none", torch.float16, torch.float32, (5,), False),
        (4, 0, 384, 3, "integer", torch.float32, torch.float32, (1, 1), False),
        (4, 0, 48, 6, "real", torch.float32, torch.float32, (3,), True),
        (4, 16, 1, 1, "none", torch.float32, torch.float32, (1,), False),
        (8, 64, 128, 9, "none", torch.float16, torch.float32, (5,), True),
        (8, 32, 45, 4, "integer", torch.float32, torch.float32, (2, 1), False),
        (8, 0, 96, 4, "integer", torch.float32, torch.float32, (5,), False),
        (8, 16, 33, 4, "real", torch.float32, torch.float32, (5,), False),
        (2, 16, 123, 5, "none", torch.float32, torch.float32, (5,), False),
        (2, 32, 64, 8, "real", torch.float32, torch.float32, (1, 2), True),
        (2, 0, 45, 3, "integer", torch.float32, torch.float32, (5,), False),
        (3, 32, 123, 5, "none", torch.float32, torch.float32, (5,), False),
        (3, 16, 80, 8, "integer", torch.float32, torch.float32, (1, 3), True),
        (3, 0, 45, 3, "real", torch.float16, torch.float32, (5,), False),
        (4, 32, 64, 16, "integer", torch.float16, torch.float16, (5,), True),
        (4, 32, 45, 16, "real", torch.float32, torch.bfloat16, (5,), True),
        (4, 32, 123, 24, "none", torch.float16, torch.float32, (2, 5), True, 4),
        (4, 16, 64, 24, "real", torch.float16, torch.float32, (5,), True, 4),
        (4, 0, 123, 24, "integer", torch.float32, torch.float32, (5,), False, 4),
        (8, 64, 128, 24, "none", torch.float16, torch.float32, (1, 5), True, 4),
        (8, 32, 45, 7, "integer", torch.float32, torch.float32, (5,), False, 4),
        (4, 0, 384, 3, "integer", torch.float16, torch.float32, (1, 1), False, 4),
        (8, 0, 96, 4, "integer", torch.float32, torch.float32, (5,), False, 4),
        (2, 64, 128, 24, "none", torch.float16, torch.float32, (1, 5), True, 4),
        (2, 32, 96, 8, "integer", torch.float32, torch.float32, (5,), False, 4),
        (2, 32, 48, 8, "real", torch.float16, torch.float32, (3,), False, 4),
        (2, 0, 128, 8, "none", torch.float16, torch.float32, (3,), False, 4),
        (2, 0, 192, 8, "integer", torch.float16, torch.float32, (3,), False, 4),
    ]
    return [_sample(seed, *case) for seed, case in enumerate(cases)]


def _sample(
    seed: int, bits: int, group: int, fan_in: int, fan_out: int, kind: str,
    scale_dtype: torch.dtype, dtype: torch.dtype, lead: tuple[int, ...], bias: bool, level: int = 0,
) -> Sample:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    groups = n_groups(group, fan_in)
    codes = torch.randint(0, 1 << bits, (fan_out, fan_in), generator=rng, dtype=torch.uint8)
    scales = (torch.rand(fan_out, groups, generator=rng) * 0.05 + 0.01).to(scale_dtype)
    scales *= torch.randint(0, 2, scales.shape, generator=rng) * 2 - 1
    zeros = None
    if kind == "integer":
        drawn = torch.randint(0, 1 << bits, (fan_out, groups), generator=rng, dtype=torch.uint8)
        zeros = pack_zeros(drawn, bits)
    if kind == "real":
        zeros = (torch.rand(fan_out, groups, generator=rng) * (1 << bits)).to(scale_dtype)
    return Sample(
        (
            torch.randn(*lead, fan_in, generator=rng).to(dtype),
            pack(codes, bits, group),
            scales,
            zeros,
            torch.randn(fan_out, generator=rng).to(dtype) if bias else None,
        ),
        {
            "bits": bits, "group": group, "in_features": fan_in, "out_features": fan_out,
            "accuracy_level": level,
        },
        f"{bits}bit-g{group}-{fan_out}x{fan_in}-{kind}-{str(dtype).removeprefix('torch.')}-l{level}",
    )


LINEAR_NBIT = own_op(
    linear_nbit, infer=_infer, record=matmul_nbits.record, samples=_samples,
    forms={
        dequantized.FORM: dequantized.record_linear,
        matmul_nbits.HALF_FORM: matmul_nbits.record_half,
    },
    heavy=True, macs=Macs(linear_macs), dense=_dense, stored_linear=_form,
)  # fmt: skip
