"""Every spelling of a linear becomes ``linear(x, weight [out, in], bias)``."""

from __future__ import annotations

from typing import Any

from .pattern import Match, Op, PatternBuilder
from .rule import Build, Rule
from .view import Operand, Value


def transposed_weight(build: Build, weight: Operand) -> Value:
    """The weight value that holds a constant [in, out] matrix as [out, in]; nothing is read."""
    view = build.view
    handle = view.weight(weight)
    assert handle is not None
    name = view.name(weight)
    return view.add_weight(name[:-2] if name.endswith(".T") else f"{name}.T", handle.transposed())


def _matrix(match: Match, name: str) -> None:
    if len(match.weight(name).shape) != 2:
        match.refuse(f"{name} is no matrix but {list(match.weight(name).shape)}")


class RaiseTransposedMatMul(Rule):
    """matmul(x, transpose(w)) => linear(x, w)"""

    name = "raise-transposed-matmul"

    def pattern(self, p: PatternBuilder, x: Any, w: Any) -> Op:  # type: ignore[override]
        return p.matmul(x, p.transpose(w, perm=(1, 0)))

    def where(self, match: Match) -> None:
        _matrix(match, "w")

    def replace(self, build: Build, x: Operand, w: Operand) -> Value:  # type: ignore[override]
        return build.linear(x, w)


class RaiseMatMul(Rule):
    """matmul(x, w) => linear(x, wᵀ), w a constant matrix"""

    name = "raise-matmul"

    def pattern(self, p: PatternBuilder, x: Any, w: Any) -> Op:  # type: ignore[override]
        return p.matmul(x, w)

    def where(self, match: Match) -> None:
        _matrix(match, "w")
        if match.view.weight(match["x"]) is not None:
            match.refuse("both operands are constants")

    def replace(self, build: Build, x: Operand, w: Operand) -> Value:  # type: ignore[override]
        return build.linear(x, transposed_weight(build, w))


class RaiseBias(Rule):
    """add(linear(x, w), b) => linear(x, w, b), b a constant vector"""

    name = "raise-bias"

    def pattern(self, p: PatternBuilder, x: Any, w: Any, b: Any) -> Op:  # type: ignore[override]
        return p.add(p.linear(x, w), b)

    def where(self, match: Match) -> None:
        rows = match.type("w").shape
        shape = match.weight("b").shape
        if rows is None or shape != (rows[0],):
            match.refuse(f"b is no bias of {rows} but {list(shape)}")

    def replace(  # type: ignore[override]
        self, build: Build, x: Operand, w: Operand, b: Operand
    ) -> Value:
        return build.linear(x, w, b)


class RaiseAddmm(Rule):
    """aten.addmm(b, x, w) => linear(x, wᵀ, b)"""

    name = "raise-addmm"

    def pattern(self, p: PatternBuilder, b: Any, x: Any, w: Any) -> Op:  # type: ignore[override]
        return p.native("aten.addmm.default", b, x, w)

    def where(self, match: Match) -> None:
        attrs = match.view.attrs(match.root)
        if attrs.get("alpha", 1) != 1 or attrs.get("beta", 1) != 1:
            match.refuse("alpha or beta is not 1")
        if _constant_matrix(match) is None:
            match.refuse("w is neither a constant matrix nor one transposed")
        if len(match.weight("b").shape) != 1:
            match.refuse("b is no vector")

    def replace(  # type: ignore[override]
        self, build: Build, b: Operand, x: Operand, w: Operand
    ) -> Value:
        turned = _untransposed(build.match)
        return build.linear(x, transposed_weight(build, w) if turned is None else turned, b)


def _untransposed(match: Match) -> Value | None:
    """The constant behind ``w = transpose(constant)``."""
    node = match.view.producer(match["w"])
    if node is None or match.view.op(node) != "transpose":
        return None
    inner = match.view.operands(node)[0]
    return inner if match.view.weight(inner) is not None else None


def _constant_matrix(match: Match) -> Value | None:
    if match.view.weight(match["w"]) is not None:
        return match["w"]
    return _untransposed(match)


class RaiseGemm(Rule):
    """Gemm(x, w, b) => linear(x, w or wᵀ, b)"""

    name = "raise-gemm"

    def pattern(self, p: PatternBuilder, x: Any, w: Any) -> Op:  # type: ignore[override]
        return p.native("Gemm", x, w, rest=True)

    def where(self, match: Match) -> None:
        _matrix(match, "w")
        attrs = match.view.attrs(match.root)
        if attrs.get("transA", 0):
            match.refuse("Gemm transposes x")
        if attrs.get("alpha", 1.0) != 1.0:
            match.refuse(f"Gemm scales by alpha={attrs['alpha']}")
        bias = match.view.operands(match.root)[2:]
        if bias and attrs.get("beta", 1.0) != 1.0:
            match.refuse(f"Gemm scales its bias by beta={attrs['beta']}")
        if bias and len(match.view.type(bias[0]).shape or ()) != 1:
            match.refuse("the bias of Gemm is no vector")

    def replace(self, build: Build, x: Operand, w: Operand) -> Value:  # type: ignore[override]
        view, root = build.view, build.match.root
        bias = view.operands(root)[2:3]
        weight = w if view.attrs(root).get("transB", 0) else transposed_weight(build, w)
        return build.linear(x, weight, *bias)


class RaisePointwiseConv(Rule):
    """conv(x, w [out, in, 1, ...]) => transpose(linear(transpose(x), w), back)"""

    name = "raise-pointwise-conv"

    def pattern(self, p: PatternBuilder, x: Any, w: Any) -> Op:  # type: ignore[override]
        return p.conv(x, w, rest=True)

    def where(self, match: Match) -> None:
        shape, attrs = match.weight("w").shape, match.view.attrs(match.root)
        if any(size != 1 for size in shape[2:]):
            match.refuse(f"the kernel covers {list(shape[2:])} points")
        if attrs["groups"] != 1 or any(attrs["padding"]) or any(s != 1 for s in attrs["stride"]):
            match.refuse("the convolution has groups, a stride or padding")

    def replace(self, build: Build, x: Operand, w: Operand) -> Value:  # type: ignore[override]
        view, rank = build.view, len(build.match.weight("w").shape)
        bias = view.operands(build.match.root)[2:3]
        handle = build.match.weight("w")
        matrix = view.add_weight(f"{view.name(w)}.matrix", handle.reshaped(handle.shape[:2]))
        last = build.transpose(x, perm=(0, *range(2, rank), 1))
        return build.transpose(build.linear(last, matrix, *bias), perm=(0, rank - 1, *range(1, rank - 1)))


RULES: tuple[type[Rule], ...] = (
    RaiseTransposedMatMul, RaiseMatMul, RaiseBias, RaiseAddmm, RaiseGemm, RaisePointwiseConv,
)  # fmt: skip
