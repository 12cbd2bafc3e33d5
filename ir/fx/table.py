"""From ATen to the vocabulary: how each native form is read.

A reader turns a node's arguments into ``(operands, attributes)``; it returns ``None`` where this
use of the native op means more than the vocabulary says, and the node is then ``native``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..core.view import NATIVE
from ..vocab import END

aten = torch.ops.aten

Reading = tuple[tuple[Any, ...], dict[str, Any]]
Reader = Callable[[Node], Reading | None]


def rank_of(node: Any) -> int | None:
    """Rank of the tensor that a node makes, if its type is known."""
    val = node.meta.get("val") if isinstance(node, Node) else None
    return val.dim() if isinstance(val, torch.Tensor) else None


def _dtype_of(node: Any) -> torch.dtype | None:
    val = node.meta.get("val") if isinstance(node, Node) else None
    return val.dtype if isinstance(val, torch.Tensor) else None


def _argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def _strip(operands: Sequence[Any]) -> tuple[Any, ...]:
    end = len(operands)
    while end and operands[end - 1] is None:
        end -= 1
    return tuple(operands[:end])


def _plain(node: Node) -> Reading | None:
    return _strip(node.args), {}


def _binary(node: Node) -> Reading | None:
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    return node.args, {}


def is_integral(operand: Any) -> bool:
    """Whether an operand is a whole number or a tensor of them."""
    if not isinstance(operand, Node):
        return isinstance(operand, int)
    val = operand.meta.get("val")
    return isinstance(val, torch.Tensor) and not val.is_floating_point() and not val.is_complex()


def _div(node: Node) -> Reading | None:
    """ATen divides integers into floats where the vocabulary truncates, as ONNX does."""
    if len(node.args) != 2:
        return None
    if all(is_integral(o) for o in node.args) != (node.kwargs.get("rounding_mode") == "trunc"):
        return None
    return node.args, {}


def _boolean(node: Node) -> Reading | None:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.dtype != torch.bool:
        return None
    return node.args, {}


def _first(node: Node) -> Reading | None:
    return node.args[:1], {}


def _dropout(node: Node) -> Reading | None:
    return None if _argument(node, 2, "train") else (node.args[:1], {})


def _dims(node: Node, dims: Any) -> tuple[int, ...]:
    rank = rank_of(node.args[0])
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    return tuple(d % rank if rank else d for d in dims)


def _reduce(node: Node) -> Reading | None:
    if node.kwargs.get("dtype") is not None or len(node.args) > 3:
        return None
    dims = _dims(node, _argument(node, 1, "dim", ()))
    return node.args[:1], {"dims": dims, "keepdim": bool(_argument(node, 2, "keepdim", False))}


def _one_dim(node: Node) -> Reading | None:
    # _softmax's third argument asks for a wider result of half-precision input.
    if _argument(node, 2, "dtype") not in (None, False, _dtype_of(node.args[0])):
        return None
    return node.args[:1], {"dim": _dims(node, _argument(node, 1, "dim"))[0]}


def _gelu(node: Node) -> Reading | None:
    return node.args[:1], {"approximate": node.kwargs.get("approximate", "none")}


def _clamp(node: Node) -> Reading | None:
    low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
    if isinstance(low, Node) or isinstance(high, Node):
        return None
    return node.args[:1], {"min": low, "max": high}


def _to_copy(node: Node) -> Reading | None:
    dtype = node.kwargs.get("dtype")
    if dtype is None or node.kwargs.get("memory_format") is not None:
        return None
    return node.args[:1], {"dtype": dtype}


def _to_dtype(node: Node) -> Reading | None:
    return node.args[:1], {"dtype": node.args[1]}


def _layer_norm(node: Node) -> Reading | None:
    shape = node.args[1]
    weight, bias = _argument(node, 2, "weight"), _argument(node, 3, "bias")
    eps = _argument(node, 4, "eps", 1e-5)
    return _strip((node.args[0], weight, bias)), {"dims": len(shape), "eps": float(eps)}  # type: ignore[arg-type]


def _rms_norm(node: Node) -> Reading | None:
    eps = _argument(node, 3, "eps")
    if eps is None or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return None
    return _strip((node.args[0], _argument(node, 2, "weight"))), {"eps": float(eps)}


def _sdpa(node: Node) -> Reading | None:
    if _argument(node, 4, "dropout_p", 0.0):
        return None
    causal = bool(_argument(node, 5, "is_causal", False))
    attrs = {
        "scale": node.kwargs.get("scale"),
        "causal": causal,
        "gqa": bool(node.kwargs.get("enable_gqa", False)),
        "softcap": None,
    }
    return _strip((*node.args[:3], _argument(node, 3, "attn_mask"))), attrs


def _shape_operands(node: Node) -> Reading | None:
    return (node.args[0], *node.args[1]), {}  # type: ignore[misc]


def _transpose(node: Node) -> Reading | None:
    rank = rank_of(node.args[0])
    if rank is None:
        return None
    perm = list(range(rank))
    if node.target is aten.permute.default:
        perm = [d % rank for d in node.args[1]]  # type: ignore[operator, union-attr, misc]
    elif rank == 2 and len(node.args) == 1:
        perm = [1, 0]
    elif len(node.args) == 3:
        a, b = (int(d) % rank for d in node.args[1:])  # type: ignore[arg-type]
        perm[a], perm[b] = b, a
    return node.args[:1], {"perm": tuple(perm)}


def _unsqueeze(node: Node) -> Reading | None:
    rank = rank_of(node.args[0])
    if rank is None:
        return None
    return node.args[:1], {"dims": (node.args[1] % (rank + 1),)}  # type: ignore[operator]


def _squeeze(node: Node) -> Reading | None:
    return node.args[:1], {"dims": _dims(node, node.args[1])}


def _concat(node: Node) -> Reading | None:
    parts = node.args[0]
    rank = rank_of(parts[0])  # type: ignore[index]
    dim = _argument(node, 1, "dim", 0)
    return tuple(parts), {"dim": dim % rank if rank else dim}  # type: ignore[arg-type]


def _slice(node: Node) -> Reading | None:
    dim = _dims(node, _argument(node, 1, "dim", 0))[0]
    start, end = _argument(node, 2, "start"), _argument(node, 3, "end")
    start = 0 if start is None else start
    end = END if end is None else end
    return (node.args[0], start, end), {"dim": dim, "step": _argument(node, 4, "step", 1)}


def _indexed(node: Node) -> Reading | None:
    dim = _dims(node, node.args[1])[0]
    return (node.args[0], node.args[2]), {"dim": dim}


def _split(node: Node) -> Reading | None:
    dim = _dims(node, _argument(node, 2, "dim", 0))[0]
    sizes = node.args[1]
    if isinstance(sizes, int):
        total = node.args[0].meta["val"].shape[dim]  # type: ignore[union-attr]
        if not isinstance(total, int):
            return None
        sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
    if not all(isinstance(s, int) for s in sizes):  # type: ignore[union-attr]
        return None
    return node.args[:1], {"sizes": tuple(sizes), "dim": dim}  # type: ignore[arg-type]


def _topk(node: Node) -> Reading | None:
    attrs = {
        "k": node.args[1],
        "dim": _dims(node, _argument(node, 2, "dim", -1))[0],
        "largest": bool(_argument(node, 3, "largest", True)),
        "sorted": bool(_argument(node, 4, "sorted", True)),
    }
    return None if isinstance(attrs["k"], Node) else (node.args[:1], attrs)


def _arange(node: Node) -> Reading | None:
    args = {1: (0, *node.args, 1), 2: (*node.args, 1), 3: node.args}[len(node.args)]
    return tuple(args), {"dtype": node.kwargs.get("dtype") or torch.int64}


def _size(node: Node) -> Reading | None:
    return node.args[:1], {"dim": _dims(node, node.args[1])[0]}


def _embedding(node: Node) -> Reading | None:
    return node.args[:2], {}


def _conv(node: Node) -> Reading | None:
    x, weight, bias = node.args[:3] if len(node.args) > 2 else (*node.args, None)
    rank = rank_of(x)
    if rank is None:
        return None
    values = [_argument(node, 3, "stride", 1), _argument(node, 4, "padding", 0),
              _argument(node, 5, "dilation", 1)]  # fmt: skip
    if any(isinstance(v, str) for v in values):
        return None
    groups = _argument(node, 6, "groups", 1)
    if node.target is aten.convolution.default:
        if node.args[6]:
            return None
        groups = node.args[8]
    wide = [tuple(v) * (rank - 2 if len(v) == 1 else 1) if isinstance(v, list | tuple)
            else (v,) * (rank - 2) for v in values]  # fmt: skip
    stride, padding, dilation = wide
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return _strip((x, weight, bias)), attrs


_PARTIAL = frozenset({
    _binary, _div, _boolean, _dropout, _reduce, _one_dim, _clamp, _to_copy, _rms_norm, _sdpa,
    _transpose, _unsqueeze, _split, _topk, _conv,
})  # fmt: skip

READERS: dict[Any, tuple[str, Reader, bool]] = {}
"""Native target to vocabulary op, reader, and whether that reader may answer ``None``."""


def _register(reader: Reader, **names: Sequence[Any]) -> None:
    for op, targets in names.items():
        for target in targets:
            READERS[target] = (op, reader, reader in _PARTIAL)


_WHERE = [getattr(aten.where, name) for name in ("self", "ScalarOther", "ScalarSelf", "Scalar")]


def _fill() -> None:
    _register(_div, div=[aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode,
                         aten.div.Scalar_mode])  # fmt: skip
    for op in ("add", "sub", "mul"):
        _register(_binary, **{op: [getattr(aten, op).Tensor, getattr(aten, op).Scalar]})
    for op in ("eq", "ne", "lt", "le", "gt", "ge"):
        _register(_binary, **{op: [getattr(aten, op).Tensor, getattr(aten, op).Scalar]})
    pows = [aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar]
    _register(_binary, pow=pows, maximum=[aten.maximum.default], minimum=[aten.minimum.default])
    _register(_boolean, logical_and=[aten.bitwise_and.Tensor, aten.__and__.Tensor],
              logical_or=[aten.bitwise_or.Tensor, aten.__or__.Tensor],
              logical_not=[aten.bitwise_not.default])  # fmt: skip
    _register(_binary, logical_and=[aten.logical_and.default],
              logical_or=[aten.logical_or.default])  # fmt: skip
    for op in ("neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "erf", "tanh", "sigmoid",
               "sin", "cos", "floor", "relu", "silu", "logical_not", "isnan"):  # fmt: skip
        _register(_plain, **{op: [getattr(aten, op).default]})
    _register(_first, identity=[aten.clone.default, aten.alias.default, aten.detach.default,
                                aten.contiguous.default, aten.lift_fresh_copy.default])  # fmt: skip
    _register(_dropout, identity=[aten.dropout.default])
    _register(_gelu, gelu=[aten.gelu.default])
    _register(_clamp, clamp=[aten.clamp.default, aten.clamp_min.default])
    _register(_to_copy, cast=[aten._to_copy.default])
    _register(_to_dtype, cast=[aten.to.dtype])
    _register(_plain, where=_WHERE, linear=[aten.linear.default],
              matmul=[aten.matmul.default, aten.mm.default, aten.bmm.default])  # fmt: skip
    _register(_reduce, mean=[aten.mean.dim, aten.mean.default], amax=[aten.amax.default],
              sum=[aten.sum.dim_IntList, aten.sum.default], amin=[aten.amin.default])  # fmt: skip
    _register(_one_dim, softmax=[aten.softmax.int, aten._softmax.default],
              cumsum=[aten.cumsum.default])  # fmt: skip
    _register(_layer_norm, layer_norm=[aten.layer_norm.default])
    _register(_rms_norm, rms_norm=[aten.rms_norm.default])
    _register(_sdpa, sdpa=[aten.scaled_dot_product_attention.default])
    views = [aten.view.default, aten.reshape.default, aten._unsafe_view.default]
    _register(_shape_operands, expand=[aten.expand.default], reshape=views)
    _register(_transpose, transpose=[aten.t.default, aten.transpose.int, aten.permute.default,
                                     aten.numpy_T.default])  # fmt: skip
    _register(_unsqueeze, unsqueeze=[aten.unsqueeze.default])
    _register(_squeeze, squeeze=[aten.squeeze.dim, aten.squeeze.dims])
    _register(_concat, concat=[aten.cat.default])
    _register(_slice, slice=[aten.slice.Tensor])
    _register(_indexed, gather=[aten.gather.default], index_select=[aten.index_select.default])
    _register(_split, split=[aten.split.Tensor, aten.split_with_sizes.default])
    _register(_topk, topk=[aten.topk.default])
    _register(_arange, arange=[aten.arange.default, aten.arange.start, aten.arange.start_step])
    _register(_size, size=[aten.sym_size.int])
    _register(_embedding, embedding=[aten.embedding.default])
    _register(_conv, conv=[aten.conv1d.default, aten.conv2d.default, aten.convolution.default])


_fill()


def own_op(target: Any) -> str:
    """The name of an op of ours, ``native`` for every other target."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "graphwright":
        return target._opname
    return NATIVE


def is_plain(value: Any) -> bool:
    """Whether an argument is a constant that ``attrs`` of a native node can show."""
    if isinstance(value, list | tuple):
        return all(isinstance(v, int | float) for v in value)
    return isinstance(value, int | float | bool | str | torch.dtype | None)
