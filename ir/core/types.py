"""Tensor types: a dtype and a shape whose dimensions are integers or symbolic names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Dim = int | str
"""A dimension: a number, or the text of an expression such as ``"seq"`` or ``"seq + 1"``."""

UNKNOWN_DIM = "?"
"""The dimension of which nothing is known; it equals no other dimension, itself included."""

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.bool: "bool",
    torch.complex64: "c64",
}
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The floats that a model may be taken in, by the names of ``--dtype`` and of the manifest."""
TAKEN = FLOATS | {"fp64": torch.float64}
"""Those that a manifest may name: in Python a model may be taken in f64 too, which is not
repeated."""
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Type:
    """The type of a value. ``dtype`` or ``shape`` is ``None`` where the graph does not say.

    >>> str(Type(torch.float32, ("batch", "seq", 384)))
    'f32[batch, seq, 384]'
    """

    dtype: torch.dtype | None
    shape: tuple[Dim, ...] | None

    def __str__(self) -> str:
        dtype = "?" if self.dtype is None else DTYPE_NAMES.get(self.dtype, str(self.dtype))
        dims = "*" if self.shape is None else ", ".join(str(d) for d in self.shape)
        return f"{dtype}[{dims}]"

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def numel(self) -> int | None:
        """Number of elements, or ``None`` where a dimension is symbolic."""
        if self.shape is None:
            return None
        numbers = [d for d in self.shape if isinstance(d, int)]
        return math.prod(numbers) if len(numbers) == len(self.shape) else None

    def with_shape(self, shape: Sequence[Dim] | None) -> Type:
        return Type(self.dtype, None if shape is None else tuple(shape))


UNKNOWN = Type(None, None)


def mentions(dim: Dim, symbol: str) -> bool:
    """Whether a dimension is a symbol, or an expression with it."""
    return isinstance(dim, str) and re.search(rf"(?<!\w){re.escape(symbol)}(?!\w)", dim) is not None


def substitute(dim: Dim, symbol: str, by: str) -> Dim:
    """The dimension with a symbol replaced by an expression."""
    if not mentions(dim, symbol):
        return dim
    if dim == symbol:
        return by
    return re.sub(rf"(?<!\w){re.escape(symbol)}(?!\w)", f"({by})", str(dim))


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are known to be equal."""
    return a == b and a != UNKNOWN_DIM


def unify_dim(a: Dim, b: Dim) -> Dim:
    """The more precise of two descriptions of one dimension: a number wins over a name."""
    if isinstance(a, int) and isinstance(b, int) and a != b:
        raise ValueError(f"dimensions {a} and {b} contradict each other")
    if isinstance(a, int):
        return a
    if isinstance(b, int):
        return b
    return b if a == UNKNOWN_DIM else a


def unify(a: Type, b: Type) -> Type:
    """The most precise type that agrees with both; ``ValueError`` where they contradict."""
    if a.dtype is not None and b.dtype is not None and a.dtype != b.dtype:
        raise ValueError(f"types {a} and {b} differ in dtype")
    dtype = a.dtype if a.dtype is not None else b.dtype
    if a.shape is None or b.shape is None:
        return Type(dtype, b.shape if a.shape is None else a.shape)
    if len(a.shape) != len(b.shape):
        raise ValueError(f"types {a} and {b} differ in rank")
    return Type(dtype, tuple(unify_dim(x, y) for x, y in zip(a.shape, b.shape, strict=True)))


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


def broadcast(*shapes: tuple[Dim, ...] | None) -> tuple[Dim, ...] | None:
    """The shape that numpy broadcasting gives; ``None`` where one of them is unknown."""
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes):
        return None
    rank = max((len(s) for s in known), default=0)
    out: list[Dim] = []
    for i in range(rank):
        column = [s[i - rank + len(s)] for s in known if i - rank + len(s) >= 0]
        wide = [d for d in column if d != 1]
        numbers = {d for d in wide if isinstance(d, int)}
        if len(numbers) > 1:
            raise ValueError(f"shapes {shapes} do not broadcast")
        if numbers:
            out.append(numbers.pop())
        elif not wide:
            out.append(1)
        elif len(set(wide)) == 1:
            out.append(wide[0])
        else:
            out.append(UNKNOWN_DIM)
    return tuple(out)


def parse_type(text: str) -> Type:
    """The inverse of ``str(Type)``; ``ValueError`` on anything else."""
    head, bracket, tail = text.partition("[")
    if not bracket or not tail.endswith("]"):
        raise ValueError(f"not a type: {text!r}")
    if head != "?" and head not in DTYPES:
        raise ValueError(f"unknown dtype {head!r} in {text!r}")
    dtype = None if head == "?" else DTYPES[head]
    body = tail[:-1].strip()
    if body == "*":
        return Type(dtype, None)
    dims = [d.strip() for d in _split(body)] if body else []
    return Type(dtype, tuple(int(d) if d.lstrip("-").isdigit() else d for d in dims))


def _split(body: str) -> list[str]:
    """The parts between commas; those within ``Max(a, b)`` do not count."""
    parts, depth = [""], 0
    for sign in body:
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts
