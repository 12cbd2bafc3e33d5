"""Exporters' detours around an op become the op.

reshape(transpose(reshape(x, [-1, a, b]), [0, 2, 1]))  => transpose(x), the last two swapped
SequenceAt(SplitToSequence(x, n), i)                   => slice(x, i n, (i + 1) n)
softmax(x, dim, dtype)                                 => softmax(cast(x, dtype), dim)
type_as(x, y)                                          => cast(x, dtype of y)
"""

from __future__ import annotations

from typing import Any

import torch

from ..core.errors import Refusal
from ..core.view import Node, Operand, Value, View
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule
from ..rewrite.shapes import same_shape


class FuseShapedTranspose(Rule):
    """reshape(transpose(reshape(x, [-1, a, b]), [0, 2, 1]), [..., b, a]) => transpose(x)"""

    name = "fuse-shaped-transpose"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.reshape(p.transpose(p.reshape(x, rest=True), perm=(0, 2, 1)), rest=True)

    def where(self, match: Match) -> None:
        view = match.view
        swapped = view.tensor(match.root)
        before, result = match.type("x").shape, view.type(view.result(match.root)).shape
        middle = view.type(swapped).shape
        if before is None or len(before) < 3:
            match.refuse(f"x {match.type('x')} is of fewer than three known dimensions")
        assert before is not None
        turned = (*before[:-2], before[-1], before[-2])
        if not same_shape(result, turned) or not same_shape((middle or ())[-2:], turned[-2:]):
            match.refuse(f"the result {result} is not known to be x {before} transposed")

    def replace(self, build: Build, **bound: Operand) -> Value:
        rank = build.match.type("x").rank
        assert rank is not None
        return build.transpose(bound["x"], perm=(*range(rank - 2), rank - 1, rank - 2))


class FuseSequenceAt(Rule):
    """SequenceAt(SplitToSequence(x, n), i) => slice(x, i n, (i + 1) n)"""

    name = "fuse-sequence-at"

    def pattern(self, p: Any, parts: Any, index: Any) -> Any:
        return p.native("SequenceAt", parts, index)

    def where(self, match: Match) -> None:
        view = match.view
        maker = _split(match)
        operands = view.operands(maker)
        size = view.number(operands[1]) if len(operands) == 2 else None
        if size is None or not view.attrs(maker).get("keepdims", 1):
            match.refuse("the parts of SplitToSequence are not all of one known size")
        index = match.scalar("index")
        width = _split_width(view, maker)
        if index < 0 or width is None or (index + 1) * float(size or 0) > width:
            match.refuse(f"part {index:g} is not known to be whole")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view = build.view
        maker = _split(build.match)
        x, number = view.tensor(maker), view.operands(maker)[1]
        size, index = int(view.number(number) or 0), int(build.match.scalar("index"))
        dim = view.attrs(maker).get("axis", 0) % (view.type(x).rank or 1)
        return build.slice(x, index * size, (index + 1) * size, dim=dim, step=1)


def _split(match: Match) -> Node:
    maker = match.view.producer(match.value("parts"))
    if maker is None or match.view.native_op(maker) != "SplitToSequence":
        raise Refusal("the sequence is not made by SplitToSequence", match.root)
    return maker


def _split_width(view: View, maker: Node) -> int | None:
    shape = view.type(view.tensor(maker)).shape
    width = None if shape is None else shape[view.attrs(maker).get("axis", 0)]
    return width if isinstance(width, int) else None


class FuseWideSoftmax(Rule):
    """softmax(x, dim, dtype) => softmax(cast(x, dtype), dim)"""

    name = "fuse-wide-softmax"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.native("aten.softmax.int", x)

    def where(self, match: Match) -> None:
        attrs = match.view.attrs(match.root)
        if not isinstance(attrs.get("arg2", attrs.get("dtype")), torch.dtype):
            match.refuse("the softmax names no dtype")

    def replace(self, build: Build, **bound: Operand) -> Value:
        attrs = build.view.attrs(build.match.root)
        wide = build.cast(bound["x"], dtype=attrs.get("arg2", attrs.get("dtype")))
        dim, rank = attrs["arg1"], build.match.type("x").rank
        assert isinstance(dim, int) and rank is not None
        return build.softmax(wide, dim=dim % rank)


class FuseTypeAs(Rule):
    """type_as(x, y) => cast(x, dtype of y)"""

    name = "fuse-type-as"

    def pattern(self, p: Any, x: Any, y: Any) -> Any:
        return p.native("aten.type_as.default", x, y)

    def where(self, match: Match) -> None:
        if match.type("y").dtype is None:
            match.refuse("the dtype of y is not known")

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.cast(bound["x"], dtype=build.match.type("y").dtype)


RULES: tuple[type[Rule], ...] = (
    FuseShapedTranspose, FuseSequenceAt, FuseWideSoftmax, FuseTypeAs,
)  # fmt: skip
