"""Type rules of the vocabulary: operand types and attributes to result types.

An operand is a ``Type``, a Python number (a scalar of the FX graph) or ``None`` (absent). A rule
answers as much as it knows: a dimension that it cannot name is ``UNKNOWN_DIM``. It raises
``ValueError`` where operands contradict each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.types import UNKNOWN_DIM, Dim, Type, broadcast, same_dim

Types = tuple[Type, ...]
Attrs = Mapping[str, Any]


def _tensors(operands: Sequence[Any]) -> list[Type]:
    return [o for o in operands if isinstance(o, Type)]


def _promote(operands: Sequence[Any]) -> torch.dtype | None:
    tensors = _tensors(operands)
    dtypes = [t.dtype for t in tensors]
    if not dtypes or None in dtypes:
        return None
    result = dtypes[0]
    ranked = [t for t in tensors if t.rank != 0] or tensors
    known = [t.dtype for t in ranked if t.dtype is not None]
    result = known[0]
    for dtype in known[1:]:
        result = torch.promote_types(result, dtype)
    if any(isinstance(o, float) for o in operands) and not result.is_floating_point:
        return torch.get_default_dtype()
    return result


def same(operands: Sequence[Any], attrs: Attrs) -> Types:
    return (operands[0],)


def elementwise(operands: Sequence[Any], attrs: Attrs) -> Types:
    shape = broadcast(*(t.shape for t in _tensors(operands)))
    return (Type(_promote(operands), shape),)


def comparison(operands: Sequence[Any], attrs: Attrs) -> Types:
    return (Type(torch.bool, broadcast(*(t.shape for t in _tensors(operands)))),)


def where(operands: Sequence[Any], attrs: Attrs) -> Types:
    shape = broadcast(*(t.shape for t in _tensors(operands)))
    return (Type(_promote(operands[1:]), shape),)


def cast(operands: Sequence[Any], attrs: Attrs) -> Types:
    return (Type(attrs["dtype"], operands[0].shape),)


def _dims(dims: Sequence[int], rank: int) -> set[int]:
    return {d % rank for d in dims} if rank else set()


def reduction(operands: Sequence[Any], attrs: Attrs) -> Types:
    x = operands[0]
    if x.shape is None:
        return (x,)
    dims = _dims(attrs["dims"], len(x.shape)) or set(range(len(x.shape)))
    if attrs["keepdim"]:
        return (x.with_shape([1 if i in dims else d for i, d in enumerate(x.shape)]),)
    return (x.with_shape([d for i, d in enumerate(x.shape) if i not in dims]),)


def matmul(operands: Sequence[Any], attrs: Attrs) -> Types:
    a, b = operands
    dtype = _promote(operands)
    if a.shape is None or b.shape is None:
        return (Type(dtype, None),)
    left = a.shape if len(a.shape) > 1 else (1, *a.shape)
    right = b.shape if len(b.shape) > 1 else (*b.shape, 1)
    _same_inner(left[-1], right[-2], "matmul")
    batch = broadcast(left[:-2], right[:-2]) or ()
    tail = ([left[-2]] if len(a.shape) > 1 else []) + ([right[-1]] if len(b.shape) > 1 else [])
    return (Type(dtype, (*batch, *tail)),)


def _same_inner(a: Dim, b: Dim, op: str, which: str = "inner") -> None:
    if isinstance(a, int) and isinstance(b, int) and a != b:
        raise ValueError(f"{op}: {which} dimensions {a} and {b} differ")


def linear(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, weight = operands[:2]
    if x.shape is None or weight.shape is None:
        return (Type(x.dtype, None),)
    _same_inner(x.shape[-1], weight.shape[-1], "linear")
    return (x.with_shape((*x.shape[:-1], weight.shape[0])),)


def conv(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, weight = operands[:2]
    if x.shape is None or weight.shape is None:
        return (Type(x.dtype, None),)
    if isinstance(x.shape[1], int):
        _same_inner(x.shape[1] // attrs["groups"], weight.shape[1], "conv", "channel")
    out: list[Dim] = [x.shape[0], weight.shape[0]]
    for i, size in enumerate(x.shape[2:]):
        if not isinstance(size, int):
            out.append(UNKNOWN_DIM)
            continue
        reach = attrs["dilation"][i] * (weight.shape[2 + i] - 1) + 1
        out.append((size + 2 * attrs["padding"][i] - reach) // attrs["stride"][i] + 1)
    return (x.with_shape(out),)


def embedding(operands: Sequence[Any], attrs: Attrs) -> Types:
    weight, ids = operands
    if weight.shape is None or ids.shape is None:
        return (Type(weight.dtype, None),)
    return (Type(weight.dtype, (*ids.shape, *weight.shape[1:])),)


def sdpa(operands: Sequence[Any], attrs: Attrs) -> Types:
    q, k, v = operands[:3]
    if q.shape is None or k.shape is None or v.shape is None:
        return (q,)
    _same_inner(q.shape[-1], k.shape[-1], "sdpa")
    _same_inner(k.shape[-2], v.shape[-2], "sdpa", "token")
    return (q.with_shape((*q.shape[:-1], v.shape[-1])),)


def reshape(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, *dims = operands
    if not all(isinstance(d, int) for d in dims):
        known = all(isinstance(d, int) or (isinstance(d, Type) and d.rank == 0) for d in dims)
        shape = [d if isinstance(d, int) and d > 0 else UNKNOWN_DIM for d in dims]
        return (x.with_shape(shape if known else None),)
    total = x.numel
    if total is None:
        return (x.with_shape([UNKNOWN_DIM if d == -1 else d for d in dims]),)
    rest = math.prod(d for d in dims if d != -1)
    if total % max(rest, 1) if -1 in dims else rest != total:
        raise ValueError(f"reshape: {x} has not the elements of {dims}")
    return (x.with_shape([total // max(rest, 1) if d == -1 else d for d in dims]),)


def expand(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, *dims = operands
    if x.shape is None or not all(isinstance(d, int) for d in dims):
        return (x.with_shape(None),)
    offset = len(dims) - len(x.shape)
    shape = [
        (x.shape[i - offset] if i >= offset and d in (-1, 1) else d) for i, d in enumerate(dims)
    ]
    return (x.with_shape(shape),)


def transpose(operands: Sequence[Any], attrs: Attrs) -> Types:
    x = operands[0]
    return (x if x.shape is None else x.with_shape([x.shape[i] for i in attrs["perm"]]),)


def unsqueeze(operands: Sequence[Any], attrs: Attrs) -> Types:
    x = operands[0]
    if x.shape is None:
        return (x,)
    rank = len(x.shape) + len(attrs["dims"])
    ones, rest = _dims(attrs["dims"], rank), iter(x.shape)
    return (x.with_shape([1 if i in ones else next(rest) for i in range(rank)]),)


def squeeze(operands: Sequence[Any], attrs: Attrs) -> Types:
    x = operands[0]
    if x.shape is None:
        return (x,)
    gone = _dims(attrs["dims"], len(x.shape))
    return (x.with_shape([d for i, d in enumerate(x.shape) if i not in gone or d != 1]),)


def concat(operands: Sequence[Any], attrs: Attrs) -> Types:
    shapes = [x.shape for x in operands]
    if None in shapes:
        return (operands[0].with_shape(None),)
    dim = attrs["dim"] % len(shapes[0])
    for shape in shapes[1:]:
        rest = [(a, b) for i, (a, b) in enumerate(zip(shapes[0], shape, strict=True)) if i != dim]
        for a, b in rest:
            _same_inner(a, b, "concat", "the other")
    sizes = [s[dim] for s in shapes]
    total: Dim = sum(sizes) if all(isinstance(s, int) for s in sizes) else UNKNOWN_DIM
    out = list(shapes[0])
    out[dim] = total
    return (operands[0].with_shape(out),)


def slice_(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, start, end = operands
    if x.shape is None:
        return (x,)
    dim = attrs["dim"] % len(x.shape)
    out = list(x.shape)
    size = x.shape[dim]
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        out[dim] = len(range(*slice(start, end, attrs["step"]).indices(size)))
    elif not (isinstance(end, int) and end >= 1 << 31 and attrs["step"] == 1):
        out[dim] = UNKNOWN_DIM
    elif start == -1:
        out[dim] = 1  # the last of something: no dimension here is empty
    elif start != 0:
        named = isinstance(start, int) and start > 0 and size != UNKNOWN_DIM
        out[dim] = f"{size} - {start}" if named else UNKNOWN_DIM
    return (x.with_shape(out),)


def gather(operands: Sequence[Any], attrs: Attrs) -> Types:
    return (Type(operands[0].dtype, operands[1].shape),)


def index_select(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, index = operands
    if x.shape is None or index.shape is None:
        return (x.with_shape(None),)
    dim = attrs["dim"] % len(x.shape)
    return (x.with_shape((*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])),)


def split(operands: Sequence[Any], attrs: Attrs) -> Types:
    x = operands[0]
    if x.shape is None:
        return (x,) * len(attrs["sizes"])
    dim = attrs["dim"] % len(x.shape)
    size = x.shape[dim]
    if isinstance(size, int) and sum(attrs["sizes"]) != size:
        raise ValueError(f"split: {attrs['sizes']} do not add up to {size}")
    return tuple(x.with_shape((*x.shape[:dim], s, *x.shape[dim + 1 :])) for s in attrs["sizes"])


def topk(operands: Sequence[Any], attrs: Attrs) -> Types:
    x = operands[0]
    if x.shape is None:
        return x, Type(torch.int64, None)
    out = list(x.shape)
    size = out[attrs["dim"] % len(out)]
    if isinstance(size, int) and attrs["k"] > size:
        raise ValueError(f"topk: k={attrs['k']} of {size}")
    out[attrs["dim"] % len(out)] = attrs["k"]
    return x.with_shape(out), Type(torch.int64, tuple(out))


def arange(operands: Sequence[Any], attrs: Attrs) -> Types:
    if all(isinstance(o, int) for o in operands):
        return (Type(attrs["dtype"], (len(range(*operands)),)),)
    return (Type(attrs["dtype"], (UNKNOWN_DIM,)),)


def size(operands: Sequence[Any], attrs: Attrs) -> Types:
    return (Type(torch.int64, ()),)


def agree(a: Type, b: Type) -> bool:
    """Whether two types contradict each other nowhere."""
    if a.dtype is not None and b.dtype is not None and a.dtype != b.dtype:
        return False
    if a.shape is None or b.shape is None:
        return True
    if len(a.shape) != len(b.shape):
        return False
    return all(
        same_dim(x, y) or not (isinstance(x, int) and isinstance(y, int))
        for x, y in zip(a.shape, b.shape, strict=True)
    )
