"""Sums, norms, pools and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx_ir import Value

from ....ir.core.errors import Refusal
from ....ir.fx.read import GETITEM
from .emit import Emit, Form, aten


def _vector_norm(
    e: Emit, x: Value, order: float = 2, dim: Any = None, keepdim: bool = False, *_: Any
) -> Value:
    """norm(x, 2) => sqrt(sum(x x)), of half precision in f32: a square is out of range soon"""
    if order != 2:
        raise Refusal(f"a norm of order {order}", e.node)
    dims = _all_dims(e, x, dim)
    x = e.cast_to(x, torch.promote_types(e.dtype, torch.float32))
    return e.cast_to(e.sqrt(e.sum(e.mul(x, x), dims=dims, keepdim=bool(keepdim))), e.dtype)


def _all_dims(e: Emit, x: Value, dim: Any) -> tuple[int, ...]:
    rank = e.rank(x)
    dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return tuple(d % rank for d in dims)


def _any(reduction: str) -> Form:
    """any(x) => amax(x), all(x) => amin(x), of what is not zero"""

    def form(e: Emit, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
        bits = e.cast_to(e.cast_to(x, torch.bool), torch.int32)
        best = e.build(reduction, bits, dims=_all_dims(e, x, dim), keepdim=bool(keepdim))
        # Of nothing, the greatest is the least number that there is.
        return e.cast_to(e.gt(best, 0), e.dtype)

    return form


def _arg(op_type: str) -> Form:
    def form(e: Emit, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        if dim is None:
            return e.native(op_type, [e.reshape(x, -1)], {"axis": 0, "keepdims": 0})
        return e.native(op_type, [x], {"axis": dim, "keepdims": int(keepdim)})

    return form


def _addmm(e: Emit, b: Value, x: Value, w: Value, beta: float = 1, alpha: float = 1) -> Value:
    """addmm(b, x, w) => add(matmul(x, w), b)"""
    if (beta, alpha) != (1, 1):
        raise Refusal(f"addmm with beta={beta} and alpha={alpha}", e.node)
    return e.add(e.matmul(x, w), b)


def _first_alone(e: Emit) -> None:
    """Refuse unless nothing but the first of the node's results is read."""
    items = [user for user in e.node.users if user.target is GETITEM]
    if any(item.users and item.args[1] != 0 for item in items):
        raise Refusal("results beside the first are read", e.node)


def _batch_norm(
    e: Emit, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value,
    momentum: float, eps: float,
) -> tuple[Value]:  # fmt: skip
    _first_alone(e)
    if weight is None or bias is None:
        raise Refusal("batch_norm without weight or bias", e.node)
    inputs = [x, weight, bias, mean, var]
    return (e.native("BatchNormalization", inputs, {"epsilon": eps}),)


def _batch_norm_of(
    e: Emit, x: Value, weight: Value | None, bias: Value | None, mean: Value | None,
    var: Value | None, training: bool, momentum: float, eps: float, *_: Any,
) -> Value:  # fmt: skip
    if mean is None or var is None:
        return _batch_norm_of_itself(e, x, weight, bias, True, momentum, eps)[0]
    if training:
        raise Refusal("batch_norm that takes its statistics from the batch", e.node)
    return _batch_norm(e, x, weight, bias, mean, var, momentum, eps)[0]


def _batch_norm_of_itself(
    e: Emit, x: Value, weight: Value | None, bias: Value | None, training: bool, momentum: float,
    eps: float,
) -> tuple[Value]:  # fmt: skip
    """Of a channel's own mean and variance, as BiT standardizes weights (arXiv 1903.10520)."""
    _first_alone(e)
    rank = e.rank(x)
    dims = tuple(axis for axis in range(rank) if axis != 1)
    centred = e.sub(x, e.mean(x, dims=dims, keepdim=True))
    var = e.mean(e.mul(centred, centred), dims=dims, keepdim=True)
    normed = e.div(centred, e.sqrt(e.add(var, eps)))
    for op, scale in (("mul", weight), ("add", bias)):
        if scale is not None:
            normed = e.build(op, normed, e.reshape(scale, 1, -1, *[1] * (rank - 2)))
    return (normed,)


def _isin(
    e: Emit, x: Value, among: Value, assume_unique: bool = False, invert: bool = False
) -> Value:
    """isin(x, among) => any(x[..., None] == among)"""
    equal = e.eq(e.unsqueeze(x, dims=(e.rank(x),)), e.reshape(among, -1))
    found = _any("amax")(e, equal, [e.rank(x)])
    return e.logical_not(found) if invert else found


def _native_layer_norm(
    e: Emit, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value]:
    _first_alone(e)
    return (e.layer_norm(x, weight, bias, dims=len(shape), eps=eps),)


def _mean_pool(e: Emit, x: Value, size: Sequence[int]) -> Value:
    """adaptive_avg_pool2d(x, [1, 1]) => mean(x, the last two)"""
    if list(size) != [1, 1]:
        raise Refusal(f"adaptive pooling to {list(size)}", e.node)
    rank = e.rank(x)
    return e.mean(x, dims=(rank - 2, rank - 1), keepdim=True)


def _convolution(
    e: Emit, x: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int,
) -> Value:  # fmt: skip
    if not transposed:
        raise Refusal("a convolution of an unknown rank", e.node)
    return _conv_transpose(e, x, weight, bias, stride, padding, output_padding, groups, dilation)


def _conv_same(
    e: Emit, x: Value, weight: Value, bias: Value | None = None, stride: Sequence[int] = (1,),
    padding: str = "valid", dilation: Sequence[int] = (1,), groups: int = 1,
) -> Value:  # fmt: skip
    """What of ``padding="same"`` the vocabulary does not say: one zero more behind than before."""
    if padding != "same":
        raise Refusal(f"a convolution of an unknown rank with padding={padding!r}", e.node)
    space = e.rank(x) - 2
    wide = list(dilation) * (space if len(dilation) == 1 else 1)
    # ONNX Runtime takes no dilations beside auto_pad=SAME_UPPER, which says the same.
    zeros = [d * (int(size) - 1) for d, size in zip(wide, e.shape(weight)[2:], strict=True)]
    pads = [each // 2 for each in zeros] + [each - each // 2 for each in zeros]
    attrs = {"pads": pads, "dilations": wide, "group": groups}
    return e.native("Conv", [x, weight] if bias is None else [x, weight, bias], attrs)


def _conv_transpose(
    e: Emit, x: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], groups: int, dilation: Sequence[int],
) -> Value:  # fmt: skip
    space = e.rank(x) - 2

    def wide(sizes: Sequence[int]) -> list[int]:
        return list(sizes) * (space if len(sizes) == 1 else 1)

    attrs = {
        "strides": wide(stride), "dilations": wide(dilation), "group": groups,
        "pads": wide(padding) * 2, "output_padding": wide(output_padding),
    }  # fmt: skip
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return e.native("ConvTranspose", inputs, attrs)


FORMS: dict[Any, Form] = {
    aten.linalg_vector_norm.default: _vector_norm,
    aten.any.default: _any("amax"),
    aten.any.dim: _any("amax"),
    aten.all.default: _any("amin"),
    aten.all.dim: _any("amin"),
    aten.argmax.default: _arg("ArgMax"),
    aten.argmin.default: _arg("ArgMin"),
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm_of_itself,
    aten.isin.Tensor_Tensor: _isin,
    aten.native_layer_norm.default: _native_layer_norm,
    aten.adaptive_avg_pool2d.default: _mean_pool,
    aten._adaptive_avg_pool2d.default: _mean_pool,
    aten.batch_norm.default: _batch_norm_of,
    aten.convolution.default: _convolution,
    aten.conv1d.padding: _conv_same,
    aten.conv2d.padding: _conv_same,
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
}
