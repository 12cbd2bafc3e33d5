"""All forms of a linear become ``linear(x, w, b)``, w [out, in].

matmul(x, wᵀ)                     => linear(x, w)
matmul(x, w)                      => linear(x, wᵀ)     the handle is transposed, no byte moves
addmm(b, x, w), Gemm(x, w, b)     => α linear(x, wᵀ) + β b, or linear(x, wᵀ, b) where both are 1
add(linear(x, w), b)              => linear(x, w, b)
baddbmm(b, x, y)                  => α matmul(x, y) + β b
linear(x, cast(w))                => linear(x, w in that dtype)     where it takes fewer bytes
conv 1x1 (x, w, b)                => transpose(linear(transpose(x), w, b))

A weight that is stored narrower than it is multiplied by stays behind its cast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import Refusal
from ..core.types import Dim
from ..core.view import Operand, Value, View, is_value
from ..core.weights import CastWeight, ComputedWeight, Weight
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule


def transposed_weight(view: View, value: Value) -> Value:
    """The weight value of the transposed handle, named so that twice gives the first name back."""
    handle = view.weight(value)
    assert handle is not None
    return view.add_weight(_flipped(view.name(value)), handle.transposed())


def _flipped(name: str) -> str:
    return name[:-2] if name.endswith(".T") else f"{name}.T"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A constant matrix that an operand is, or is the cast of."""

    value: Value
    """The constant itself."""
    handle: Weight
    """Its two dimensions; those of size 1 before them are left away."""
    dtype: torch.dtype
    """In which it is multiplied by."""

    def put(self, build: Build, *, turned: bool = False) -> Value:
        """The operand of ``linear`` that stands for it, transposed or not."""
        view, handle = build.view, self.handle.transposed() if turned else self.handle
        name = _flipped(view.name(self.value)) if turned else view.name(self.value)
        if self.dtype.itemsize < handle.dtype.itemsize:
            return view.add_weight(name, CastWeight(handle, self.dtype))
        held = view.weight(self.value)
        value = self.value if handle is held else view.add_weight(name, handle)
        return value if self.dtype == handle.dtype else build.cast(value, dtype=self.dtype)


def stored_matrix(match: Match, name: str) -> Matrix:
    """The constant matrix that a variable is bound to; ``Refusal`` where it is none."""
    view, value = match.view, match.value(name)
    dtype = view.type(value).dtype
    maker = view.producer(value)
    if maker is not None and view.op(maker) == "cast":
        value = view.tensor(maker)
    handle = view.weight(value)
    if handle is None:
        raise Refusal(f"{name} is not a constant", match.root)
    shape = handle.shape
    if len(shape) < 2:
        match.refuse(f"{name} is not a matrix: {list(shape)}")
    if math.prod(shape[:-2]) != 1:
        count = math.prod(shape[:-2])
        match.refuse(
            f"{name} is a stack of {count} matrices, {list(shape)}: a linear has one of its own"
        )
    if len(shape) > 2:
        handle = handle.reshaped(shape[-2:])
    return Matrix(value, handle, dtype or handle.dtype)


def _row(view: View, bias: Operand, width: Dim) -> Weight | None:
    """The constant that is added to each row of ``width`` numbers, if ``bias`` is one."""
    handle = view.weight(bias)
    if handle is None or handle.numel != width or handle.shape[-1:] != (width,):
        return None
    return handle


def _put_row(view: View, bias: Operand, handle: Weight) -> Operand:
    """A bias of one dimension."""
    if len(handle.shape) == 1 or not is_value(bias):
        return bias
    return view.add_weight(view.name(bias), handle.reshaped((handle.numel,)))


class FuseMatmulTransposed(Rule):
    """matmul(x, transpose(w)) => linear(x, w), w a constant or the cast of one"""

    name = "fuse-matmul-transposed"

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.matmul(x, p.transpose(w, perm=(1, 0)))

    def where(self, match: Match) -> None:
        stored_matrix(match, "w")

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.linear(bound["x"], stored_matrix(build.match, "w").put(build))


class FuseMatmul(Rule):
    """matmul(x, w) => linear(x, wᵀ), w a constant or the cast of one"""

    name = "fuse-matmul"

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.matmul(x, w)

    def where(self, match: Match) -> None:
        view = match.view
        matrix = stored_matrix(match, "w")
        if view.weight(match["x"]) is not None:
            match.refuse("x is a constant: nothing flows through this product")
        rank, w_rank = match.type("x").rank, view.type(match.value("w")).rank
        if matrix.handle is not view.weight(matrix.value) and (rank or 0) < (w_rank or 0):
            match.refuse(f"x {match.type('x')} has fewer dimensions than w")

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.linear(bound["x"], stored_matrix(build.match, "w").put(build, turned=True))


class FuseNarrowWeight(Rule):
    """linear(x, cast(w)) => linear(x, w in that dtype), which takes fewer bytes"""

    name = "fuse-narrow-weight"

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.linear(x, p.cast(w), rest=True)

    def where(self, match: Match) -> None:
        handle, dtype = match.weight("w"), match.view.type(match.view.tensor(match.root, 1)).dtype
        if dtype is None or dtype.itemsize >= handle.dtype.itemsize:
            match.refuse(f"w is stored as {handle.dtype}, in no more bytes than it is used")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, root = build.view, build.match.root
        bias = view.operands(root)[2:]
        dtype = view.attrs(view.maker(view.tensor(root, 1)))["dtype"]
        narrow = CastWeight(build.match.weight("w"), dtype)
        weight = view.add_weight(view.name(build.match.value("w")), narrow)
        return build.linear(bound["x"], weight, *bias)


class FuseBias(Rule):
    """add(linear(x, w), b) => linear(x, w, b)"""

    name = "fuse-bias"

    def pattern(self, p: Any, x: Any, w: Any, b: Any) -> Any:
        return p.add(p.linear(x, w), b)

    def where(self, match: Match) -> None:
        view, width = match.view, (match.type("w").shape or ("",))[0]
        handle = match.weight("b")
        if _row(view, match["b"], width) is None:
            match.refuse(f"b {list(handle.shape)} is not a bias of {width} outputs")
        if len(handle.shape) > 1 and len(handle.shape) > (match.type("x").rank or 0):
            match.refuse(f"b {list(handle.shape)} has more dimensions than x")

    def replace(self, build: Build, **bound: Operand) -> Value:
        handle = build.match.weight("b")
        bias = _put_row(build.view, build.match.value("b"), handle)
        return build.linear(bound["x"], bound["w"], bias)


def _affine(
    build: Build, x: Operand, weight: Value, width: int, bias: Operand, alpha: float, beta: float
) -> Value:
    """``alpha linear(x, weight) + beta bias``, in one op where both are 1 and the bias is a row."""
    bias = None if beta == 0 else bias
    row = None if bias is None else _row(build.view, bias, width)
    if alpha == 1 and bias is None:
        return build.linear(x, weight)
    if alpha == beta == 1 and row is not None:
        return build.linear(x, weight, _put_row(build.view, bias, row))
    product = build.linear(x, weight)
    scaled = product if alpha == 1 else build.mul(product, float(alpha))
    if bias is None:
        return scaled
    return build.add(scaled, bias if beta == 1 else build.mul(bias, float(beta)))


class FuseAddmm(Rule):
    """addmm(b, x, w) => α linear(x, wᵀ) + β b"""

    name = "fuse-addmm"

    def pattern(self, p: Any, b: Any, x: Any, w: Any) -> Any:
        return p.native("aten.addmm.default", b, x, w)

    def where(self, match: Match) -> None:
        _behind_transposition(match)

    def replace(self, build: Build, **bound: Operand) -> Value:
        attrs = build.view.attrs(build.match.root)
        scales = attrs.get("alpha", 1), attrs.get("beta", 1)
        matrix, turned = _behind_transposition(build.match)
        width = matrix.handle.shape[1 if turned else 0]
        weight = matrix.put(build, turned=turned)
        return _affine(build, bound["x"], weight, width, bound["b"], *scales)


class FuseBaddbmm(Rule):
    """baddbmm(b, x, y) => α matmul(x, y) + β b"""

    name = "fuse-baddbmm"

    def pattern(self, p: Any, b: Any, x: Any, y: Any) -> Any:
        return p.native("aten.baddbmm.default", b, x, y)

    def replace(self, build: Build, **bound: Operand) -> Value:
        attrs = build.view.attrs(build.match.root)
        alpha, beta = attrs.get("alpha", 1), attrs.get("beta", 1)
        product = build.matmul(bound["x"], bound["y"])
        scaled = product if alpha == 1 else build.mul(product, float(alpha))
        if beta == 0:
            return scaled
        return build.add(scaled, bound["b"] if beta == 1 else build.mul(bound["b"], float(beta)))


def _behind_transposition(match: Match) -> tuple[Matrix, bool]:
    """The matrix that ``w`` [in, out] is or is the transposition of; whether it is to be turned."""
    view, w = match.view, match.value("w")
    maker = view.producer(w)
    if maker is None or view.op(maker) != "transpose" or view.type(w).rank != 2:
        return stored_matrix(match, "w"), True
    behind = Match(view, match.root)
    behind.bindings["w"] = view.tensor(maker)
    return stored_matrix(behind, "w"), False


class FuseGemm(Rule):
    """Gemm(x, w, b) => α linear(x or xᵀ, w or wᵀ) + β b"""

    name = "fuse-gemm"

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.native("Gemm", x, w, rest=True)

    def where(self, match: Match) -> None:
        stored_matrix(match, "w")
        if match.view.weight(match["x"]) is not None:
            match.refuse("x is a constant: nothing flows through this product")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, root = build.view, build.match.root
        attrs, matrix = view.attrs(root), stored_matrix(build.match, "w")
        turned = not attrs.get("transB", 0)
        width = matrix.handle.shape[1 if turned else 0]
        x = build.transpose(bound["x"], perm=(1, 0)) if attrs.get("transA", 0) else bound["x"]
        bias = (*view.operands(root)[2:], None)[0]
        scales = attrs.get("alpha", 1.0), attrs.get("beta", 1.0)
        return _affine(build, x, matrix.put(build, turned=turned), width, bias, *scales)


class FusePointwiseConv(Rule):
    """conv(x, w, b) of kernel 1 => transpose(linear(transpose(x), w, b))"""

    name = "fuse-pointwise-conv"

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.conv(x, w, rest=True)

    def where(self, match: Match) -> None:
        shape, attrs = match.weight("w").shape, match.view.attrs(match.root)
        if any(k != 1 for k in shape[2:]):
            match.refuse(f"the kernel is {'x'.join(map(str, shape[2:]))}, not 1")
        if any(s != 1 for s in attrs["stride"]):
            match.refuse(f"the stride is {attrs['stride']}, not 1")
        if any(attrs["padding"]):
            match.refuse(f"the padding is {attrs['padding']}, not 0")
        if attrs["groups"] != 1:
            match.refuse(f"the convolution has {attrs['groups']} groups")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view = build.view
        handle = view.weight(bound["w"])
        assert handle is not None
        rank = len(handle.shape)
        name = f"{view.name(build.match.value('w'))}.matrix"
        matrix = view.add_weight(name, _as_matrix(handle))
        last = build.transpose(bound["x"], perm=(0, *range(2, rank), 1))
        product = build.linear(last, matrix, *view.operands(build.match.root)[2:])
        return build.transpose(product, perm=(0, rank - 1, *range(1, rank - 1)))


def _as_matrix(handle: Weight) -> Weight:
    shape = handle.shape[:2]
    return ComputedWeight(
        lambda: handle.read().reshape(shape), shape, handle.dtype, ("matrix", handle.key)
    )


RULES: tuple[type[Rule], ...] = (
    FuseMatmulTransposed, FuseMatmul, FuseNarrowWeight, FuseBias, FuseAddmm, FuseBaddbmm,
    FuseGemm, FusePointwiseConv,
)  # fmt: skip
