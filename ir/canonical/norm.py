"""Decomposed norms become ``rms_norm`` and ``layer_norm``.

reciprocal(sqrt(x)), div(1, sqrt(x))              => rsqrt(x)
w · (x · rsqrt(mean(x²) + eps))                   => rms_norm(x, w)
w · cast(x32 · rsqrt(mean(x32²) + eps))           => rms_norm(x, w), x32 = cast(x, float32)
w · (x - mean(x)) / sqrt(var(x) + eps) + b             => layer_norm(x, w, b)
"""

from __future__ import annotations

from typing import Any

import torch

from ..core.view import Operand, Value, is_value
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule


class FuseReciprocalSqrt(Rule):
    """reciprocal(sqrt(x)) => rsqrt(x)"""

    name = "fuse-reciprocal-sqrt"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.reciprocal(p.sqrt(x))

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.rsqrt(bound["x"])


class FuseOneOverSqrt(Rule):
    """div(1, sqrt(x)) => rsqrt(x)"""

    name = "fuse-one-over-sqrt"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.div(1.0, p.sqrt(x))

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.rsqrt(bound["x"])


def _mean_square(p: Any, x: Any) -> Any:
    return p.mean(p.one_of(p.pow(x, 2.0), p.mul(x, x)), dims=(-1,), keepdim=True)


def _over_root(p: Any, x: Any, square: Any) -> Any:
    """x · rsqrt(square), x / sqrt(square)"""
    return p.one_of(p.mul(x, p.rsqrt(square)), p.div(x, p.sqrt(square)))


def _need_row(match: Match, name: str, of: str = "x") -> None:
    """A scale or shift must be one vector as long as the last dimension of x."""
    width = match.last_dim(of)
    if match.type(name).shape != (width,):
        match.refuse(f"{name} {match.type(name)} is not a vector of {width}")


def _refuse_centred(match: Match) -> None:
    view, node = match.view, match.view.producer(match.value("x"))
    if node is None or view.op(node) != "sub":
        return
    taken = view.operands(node)[1]
    mean = view.producer(taken) if is_value(taken) else None
    if mean is not None and view.op(mean) == "mean":
        match.refuse("x is centred: this is part of a layer norm")


class FuseRMSNorm(Rule):
    """mul(w, mul(x, rsqrt(add(mean(pow(x, 2), -1), eps)))) => rms_norm(x, w, eps)"""

    name = "fuse-rms-norm"

    def pattern(self, p: Any, x: Any, w: Any, eps: Any) -> Any:
        return p.mul(_over_root(p, x, p.add(_mean_square(p, x), eps)), w)

    def where(self, match: Match) -> None:
        match.scalar("eps")
        _need_row(match, "w")
        _refuse_centred(match)

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.rms_norm(bound["x"], bound["w"], eps=build.match.scalar("eps"))


class FuseWideRMSNorm(Rule):
    """mul(w, cast(mul(x32, rsqrt(add(mean(pow(x32, 2), -1), eps))))) => rms_norm(x, w, eps)"""

    name = "fuse-wide-rms-norm"

    def pattern(self, p: Any, x: Any, w: Any, eps: Any) -> Any:
        wide = p.cast(x, dtype=torch.float32)
        return p.mul(p.cast(_over_root(p, wide, p.add(_mean_square(p, wide), eps))), w)

    def where(self, match: Match) -> None:
        match.scalar("eps")
        _need_row(match, "w")
        dtypes = {match.type("x").dtype, match.type("w").dtype}
        if dtypes != {match.view.type(match.view.result(match.root)).dtype}:
            match.refuse("x, w and the result differ in dtype")

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.rms_norm(bound["x"], bound["w"], eps=build.match.scalar("eps"))


class FuseLayerNorm(Rule):
    """add(mul(div(d, sqrt(add(mean(pow(d, 2)), eps))), w), b) => layer_norm(x, w, b)"""

    name = "fuse-layer-norm"

    def pattern(self, p: Any, x: Any, w: Any, b: Any, eps: Any) -> Any:
        centred = p.sub(x, p.mean(x, dims=(-1,), keepdim=True))
        normed = _over_root(p, centred, p.add(_mean_square(p, centred), eps))
        return p.add(p.mul(normed, w), b)

    def where(self, match: Match) -> None:
        match.scalar("eps")
        _need_row(match, "w")
        _need_row(match, "b")

    def replace(self, build: Build, **bound: Operand) -> Value:
        eps = build.match.scalar("eps")
        return build.layer_norm(bound["x"], bound["w"], bound["b"], dims=1, eps=eps)


RULES: tuple[type[Rule], ...] = (
    FuseReciprocalSqrt, FuseOneOverSqrt, FuseRMSNorm, FuseWideRMSNorm, FuseLayerNorm,
)  # fmt: skip
