"""All forms of a linear become ``linear(x, w, b)``, w [out, in].

matmul(x, wᵀ)                     => linear(x, w)
matmul(x, w)                      => linear(x, wᵀ)     the handle is transposed, no byte moves
addmm(b, x, w)                    => linear(x, wᵀ, b)
Gemm(x, w, b)                     => linear(x, w or wᵀ, b)
add(linear(x, w), b)              => linear(x, w, b)
conv 1x1 (x, w, b)                => transpose(linear(transpose(x), w, b))
"""

from __future__ import annotations

from typing import Any

from ..core.errors import Refusal
from ..core.view import Operand, Value, View
from ..core.weights import ComputedWeight, Weight
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule


def transposed_weight(view: View, value: Value) -> Value:
    """The weight value of the transposed handle, named so that twice gives the first name back."""
    name = view.name(value)
    handle = view.weight(value)
    assert handle is not None
    flipped = name[:-2] if name.endswith(".T") else f"{name}.T"
    return view.add_weight(flipped, handle.transposed())


def _need_matrix(match: Match, name: str) -> None:
    if len(match.weight(name).shape) != 2:
        match.refuse(f"{name} is not a matrix: {list(match.weight(name).shape)}")


def _stored_matrix(match: Match, name: str) -> Weight:
    """The constant matrix that an operand is, or is the cast of: a factor that is stored narrow."""
    view, value = match.view, match.value(name)
    maker = view.producer(value)
    if maker is not None and view.op(maker) == "cast":
        value = view.tensor(maker)
    handle = view.weight(value)
    if handle is None:
        raise Refusal(f"{name} is not a constant", match.root)
    if len(handle.shape) != 2:
        match.refuse(f"{name} is not a matrix: {list(handle.shape)}")
    return handle


def _need_bias(match: Match, bias: Operand, width: int) -> None:
    handle = match.view.weight(bias)
    if handle is None:
        match.refuse("b is not a constant")
    elif handle.shape != (width,):
        match.refuse(f"b {list(handle.shape)} is not a bias of {width} outputs")


class FuseMatmulTransposed(Rule):
    """matmul(x, transpose(w)) => linear(x, w), w a constant or the cast of one"""

    name = "fuse-matmul-transposed"

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.matmul(x, p.transpose(w, perm=(1, 0)))

    def where(self, match: Match) -> None:
        _stored_matrix(match, "w")

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.linear(bound["x"], bound["w"])


class FuseMatmul(Rule):
    """matmul(x, w) => linear(x, wᵀ)"""

    name = "fuse-matmul"

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.matmul(x, w)

    def where(self, match: Match) -> None:
        _need_matrix(match, "w")
        if match.view.weight(match["x"]) is not None:
            match.refuse("x is a constant: nothing flows through this product")

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.linear(bound["x"], transposed_weight(build.view, build.match.value("w")))


class FuseBias(Rule):
    """add(linear(x, w), b) => linear(x, w, b)"""

    name = "fuse-bias"

    def pattern(self, p: Any, x: Any, w: Any, b: Any) -> Any:
        return p.add(p.linear(x, w), b)

    def where(self, match: Match) -> None:
        _need_bias(match, match["b"], match.weight("w").shape[0])

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.linear(bound["x"], bound["w"], bound["b"])


class FuseAddmm(Rule):
    """addmm(b, x, w) => linear(x, wᵀ, b)"""

    name = "fuse-addmm"

    def pattern(self, p: Any, b: Any, x: Any, w: Any) -> Any:
        return p.native("aten.addmm.default", b, x, w)

    def where(self, match: Match) -> None:
        attrs = match.view.attrs(match.root)
        for factor in ("alpha", "beta"):
            if attrs.get(factor, 1) != 1:
                match.refuse(f"{factor} is {attrs[factor]}, not 1")
        weight = _matrix_behind(match)
        _need_bias(match, match["b"], weight.shape[1])

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, w = build.view, build.match.value("w")
        stored = view.weight(w) is not None
        turned = transposed_weight(view, w) if stored else view.tensor(view.maker(w))
        return build.linear(bound["x"], turned, bound["b"])


def _matrix_behind(match: Match) -> Weight:
    """The weight [in, out] that ``w`` is, or is the transposition of."""
    view, w = match.view, match.value("w")
    maker = view.producer(w)
    if maker is not None and view.op(maker) == "transpose":
        handle = view.weight(view.tensor(maker))
        if handle is not None and len(handle.shape) == 2:
            return handle.transposed()
    _need_matrix(match, "w")
    return match.weight("w")


class FuseGemm(Rule):
    """Gemm(x, w, b) => linear(x, w, b) if transB, else linear(x, wᵀ, b)"""

    name = "fuse-gemm"

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.native("Gemm", x, w, rest=True)

    def where(self, match: Match) -> None:
        attrs = match.view.attrs(match.root)
        if attrs.get("transA", 0):
            match.refuse("Gemm with transA takes its input transposed")
        if attrs.get("alpha", 1.0) != 1.0:
            match.refuse(f"Gemm with alpha={attrs['alpha']} scales the weight")
        shape = _stored_matrix(match, "w").shape
        if not attrs.get("transB", 0):
            _need_matrix(match, "w")
        bias = match.view.operands(match.root)[2:]
        if not bias:
            return
        if attrs.get("beta", 1.0) != 1.0:
            match.refuse(f"Gemm with beta={attrs['beta']} scales the bias")
        _need_bias(match, bias[0], shape[0] if attrs.get("transB", 0) else shape[1])

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, root = build.view, build.match.root
        w = build.match.value("w")
        if not view.attrs(root).get("transB", 0):
            w = transposed_weight(view, w)
        return build.linear(bound["x"], w, *view.operands(root)[2:])


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
        matrix = view.add_weight(view.name(build.match.value("w")), _as_matrix(handle))
        last = build.transpose(bound["x"], perm=(0, *range(2, rank), 1))
        product = build.linear(last, matrix, *view.operands(build.match.root)[2:])
        return build.transpose(product, perm=(0, rank - 1, *range(1, rank - 1)))


def _as_matrix(handle: Weight) -> Weight:
    shape = handle.shape[:2]
    return ComputedWeight(
        lambda: handle.read().reshape(shape), shape, handle.dtype, ("matrix", handle.key)
    )


RULES: tuple[type[Rule], ...] = (
    FuseMatmulTransposed, FuseMatmul, FuseBias, FuseAddmm, FuseGemm, FusePointwiseConv,
)  # fmt: skip
