"""Softmax attention becomes ``sdpa``, rotary positions become ``rope``.

matmul(softmax(q kᵀ · scale + mask), v)           => sdpa(q, k, v, mask, scale)
x · cos + concat(-x₂, x₁) · sin                   => rope(x, cos, sin)
reshape(transpose(reshape(x)))                    => transpose(x), the last two dimensions swapped

The scale may stand on q, on kᵀ, on both (its root each) or on the logits. Repeating key and value
heads stays outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .errors import Refusal
from .pattern import Match
from .rule import Build, Rule
from .shapes import same_shape
from .view import Node, Operand, Value, View

_NEVER = -1e30
"""What is added to masked logits must be below this to be as good as minus infinity."""


@dataclass(frozen=True, slots=True)
class _Logits:
    q: Value
    kt: Value
    scale: float
    mask: Value | None
    where: tuple[Value, float] | None
    """Condition and fill, where masked logits are replaced instead of added to."""


class RaiseAttention(Rule):
    """matmul(softmax(add(mul(matmul(q, kᵀ), scale), mask)), v) => sdpa(q, k, v, mask, scale)"""

    name = "raise-attention"

    def pattern(self, p: Any, logits: Any, v: Any) -> Any:
        return p.matmul(p.softmax(logits, dim=-1), v)

    def where(self, match: Match) -> None:
        found = read_logits(match.view, match.value("logits"), match.root)
        _check_shapes(match.view, found, match.value("v"), match.root)

    def replace(self, build: Build, **bound: Operand) -> Value:
        found = read_logits(build.view, bound["logits"], build.match.root)
        k = _last_two_swapped(build, found.kt)
        operands = [found.q, k, bound["v"]]
        mask = _mask(build, found)
        if mask is not None:
            operands.append(mask)
        return build.sdpa(*operands, scale=_round_scale(build.view, found), causal=False)


class RaiseGuardedAttention(RaiseAttention):
    """matmul(where(isnan(p), 0, p), v) => sdpa(q, k, v, mask, scale), p the softmax"""

    name = "raise-guarded-attention"

    def pattern(self, p: Any, logits: Any, v: Any) -> Any:
        weights = p.softmax(logits, dim=-1)
        return p.matmul(p.where(p.isnan(weights), 0.0, weights), v)


class RaiseWideAttention(RaiseAttention):
    """matmul(cast(softmax(cast(logits))), v) => sdpa(q, k, v, mask, scale), as sdpa computes it"""

    name = "raise-wide-attention"

    def pattern(self, p: Any, logits: Any, v: Any) -> Any:
        weights = p.softmax(p.cast(logits, dtype=torch.float32), dim=-1)
        return p.matmul(p.cast(weights), v)


def read_logits(view: View, value: Value, root: Node) -> _Logits:
    """Take logits apart into q, kᵀ, scale and mask. Raises ``Refusal`` where they are none."""
    mask: Value | None = None
    replaced: tuple[Value, float] | None = None
    node = _only_for_this(view, value, root)
    op = view.op(node)
    if op == "add":
        value, mask = _scores_and_mask(view, node)
    elif op == "where":
        condition, a, b = view.operands(node)
        number = view.number(b)
        if number is None:
            raise Refusal("where: masked logits are not replaced by a number", root)
        value, replaced = a, (condition, float(number))
    value, scale = _unscaled(view, value)
    node = _only_for_this(view, value, root)
    if view.op(node) != "matmul":
        raise Refusal(f"the softmax is of `{view.op(node)}`, not of a product of matrices", root)
    left, right = view.operands(node)
    q, on_q = _unscaled(view, left)
    kt, on_k = _unscaled(view, right)
    return _Logits(q, kt, scale * on_q * on_k, mask, replaced)


def _only_for_this(view: View, value: Value, root: Node) -> Node:
    node = view.producer(value)
    if node is None:
        raise Refusal("the softmax is of an input or a constant, not of a product", root)
    if len(view.users(value)) > 1 or view.is_output(value):
        raise Refusal(f"the logits {view.name(value)} are also used elsewhere", root)
    return node


def _scores_and_mask(view: View, node: Node) -> tuple[Value, Value]:
    a, b = view.operands(node)
    for scores, mask in ((a, b), (b, a)):
        inner, _ = _unscaled(view, scores)
        maker = None if isinstance(inner, int | float | None) else view.producer(inner)
        if maker is not None and view.op(maker) == "matmul" and view.number(mask) is None:
            return scores, mask
    raise Refusal("neither operand of the added mask is a product of matrices", node)


def _unscaled(view: View, value: Operand) -> tuple[Value, float]:
    """A value without the number that it is multiplied or divided by, and that number."""
    node = None if isinstance(value, int | float | None) else view.producer(value)
    op = None if node is None else view.op(node)
    if op not in ("mul", "div"):
        return value, 1.0
    a, b = view.operands(node)
    number = view.number(b)
    if number is not None and number != 0:
        return a, float(number) if op == "mul" else 1 / float(number)
    number = view.number(a) if op == "mul" else None
    return (value, 1.0) if number is None else (b, float(number))


def _check_shapes(view: View, found: _Logits, v: Value, root: Node) -> None:
    q, kt, values = (view.type(x) for x in (found.q, found.kt, v))
    if q.rank is None or q.rank != kt.rank or q.rank != values.rank:
        raise Refusal(f"q {q}, kᵀ {kt} and v {values} differ in rank", root)
    if q.rank < 3:
        raise Refusal(f"q {q} has no batch dimension", root)
    assert q.shape is not None and kt.shape is not None
    if not isinstance(q.shape[-1], int):
        raise Refusal(f"the head dimension of q {q} is not known", root)
    if isinstance(kt.shape[-2], int) and kt.shape[-2] != q.shape[-1]:
        raise Refusal(f"q {q} and kᵀ {kt} do not fit", root)
    if q.dtype is None or not q.dtype.is_floating_point:
        raise Refusal(f"q {q} is not known to hold floats", root)
    if found.where is not None and found.where[1] > _NEVER:
        raise Refusal(f"masked logits become {found.where[1]:g}, which sdpa cannot express", root)


def _mask(build: Build, found: _Logits) -> Value | None:
    """The mask of sdpa: boolean for minus infinity, else added as it stands.

    A row that is masked as a whole is uniform under the least finite number and 0 under minus
    infinity, so the one is not taken for the other.
    """
    view = build.view
    if found.where is not None:
        condition, fill = found.where
        return condition if fill == -math.inf else build.where(condition, 0.0, fill)
    maker = None if found.mask is None else view.producer(found.mask)
    if maker is None or view.op(maker) != "where":
        return found.mask
    condition, kept, fill_ = view.operands(maker)
    boolean = view.number(kept) == 0 and view.number(fill_) == -math.inf
    return condition if boolean else found.mask


def _round_scale(view: View, found: _Logits) -> float:
    """The usual 1/√(head dim) to its last digit, where the graph's roots of it lost some."""
    width = (view.type(found.q).shape or (1,))[-1]
    usual = 1 / math.sqrt(width) if isinstance(width, int) else found.scale
    return usual if math.isclose(usual, found.scale, rel_tol=1e-6) else found.scale


def _last_two_swapped(build: Build, value: Value) -> Value:
    """``value`` with its last two dimensions swapped; a transposition before it is joined."""
    view = build.view
    rank = view.type(value).rank
    assert rank is not None
    perm = (*range(rank - 2), rank - 1, rank - 2)
    maker = view.producer(value)
    if maker is None or view.op(maker) != "transpose":
        return build.transpose(value, perm=perm)
    before = view.attrs(maker)["perm"]
    joined = tuple(before[d] for d in perm)
    source: Value = view.operands(maker)[0]
    return source if joined == tuple(range(rank)) else build.transpose(source, perm=joined)


class RaiseWideSoftmax(Rule):
    """softmax(x, dim, dtype) => softmax(cast(x, dtype), dim)"""

    name = "raise-wide-softmax"

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


class RaiseRope(Rule):
    """add(mul(x, cos), mul(concat(neg(x₂), x₁), sin)) => rope(x, cos, sin)"""

    name = "raise-rope"

    def pattern(self, p: Any, x: Any, cos: Any, sin: Any, half: Any, end: Any) -> Any:
        low = p.slice(x, 0, half, dim=-1, step=1)
        high = p.slice(x, half, end, dim=-1, step=1)
        return p.add(p.mul(x, cos), p.mul(p.concat(p.neg(high), low, dim=-1), sin))

    def where(self, match: Match) -> None:
        width = match.last_dim("x")
        if match.scalar("half") * 2 != width:
            match.refuse(f"x is cut at {match.scalar('half'):g} of {width}, not in half")
        if match.scalar("end") < width:
            match.refuse(f"the second half ends at {match.scalar('end'):g} of {width}")

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.rope(bound["x"], bound["cos"], bound["sin"])


class RaiseShapedTranspose(Rule):
    """reshape(transpose(reshape(x, [-1, a, b]), [0, 2, 1]), [..., b, a]) => transpose(x)"""

    name = "raise-shaped-transpose"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.reshape(p.transpose(p.reshape(x, rest=True), perm=(0, 2, 1)), rest=True)

    def where(self, match: Match) -> None:
        view = match.view
        swapped = view.operands(match.root)[0]
        before, result = match.type("x").shape, view.type(view.result(match.root)).shape
        middle = view.type(swapped).shape
        if before is None or len(before) < 3:
            match.refuse(f"x {match.type('x')} is of fewer than three known dimensions")
        assert before is not None
        wanted = (*before[:-2], before[-1], before[-2])
        if not same_shape(result, wanted) or not same_shape((middle or ())[-2:], wanted[-2:]):
            match.refuse(f"the result {result} is not known to be x {before} transposed")

    def replace(self, build: Build, **bound: Operand) -> Value:
        rank = build.match.type("x").rank
        assert rank is not None
        return build.transpose(bound["x"], perm=(*range(rank - 2), rank - 1, rank - 2))


class RaiseSequenceAt(Rule):
    """SequenceAt(SplitToSequence(x, n), i) => slice(x, i n, (i + 1) n)"""

    name = "raise-sequence-at"

    def pattern(self, p: Any, parts: Any, index: Any) -> Any:
        return p.native("SequenceAt", parts, index)

    def where(self, match: Match) -> None:
        view = match.view
        maker = view.producer(match.value("parts"))
        if maker is None or view.native_op(maker) != "SplitToSequence":
            match.refuse("the sequence is not made by SplitToSequence")
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
        maker = view.producer(bound["parts"])
        x, number = view.operands(maker)
        size, index = int(view.number(number) or 0), int(build.match.scalar("index"))
        dim = view.attrs(maker).get("axis", 0) % (view.type(x).rank or 1)
        return build.slice(x, index * size, (index + 1) * size, dim=dim, step=1)


def _split_width(view: View, maker: Node) -> int | None:
    shape = view.type(view.operands(maker)[0]).shape
    width = None if shape is None else shape[view.attrs(maker).get("axis", 0)]
    return width if isinstance(width, int) else None


RULES: tuple[type[Rule], ...] = (
    RaiseShapedTranspose, RaiseSequenceAt, RaiseWideSoftmax, RaiseRope,
    RaiseGuardedAttention, RaiseWideAttention, RaiseAttention,
)  # fmt: skip
