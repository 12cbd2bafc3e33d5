"""Softmax attention becomes ``sdpa``, rotary positions become ``rope``.

matmul(softmax(q kᵀ · scale + mask), v)           => sdpa(q, k, v, mask, scale)
matmul(softmax(c · tanh(q kᵀ · scale / c) + mask), v) => sdpa(q, k, v, mask, scale, softcap c)
x · cos + concat(-x₂, x₁) · sin                   => rope(x, cos, sin)

The cap is that of Gemma 2 (arXiv 2408.00118). The scale may stand on q, on kᵀ, on both (its root
each) or on the logits. Repeating key and value heads stays outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import Refusal
from ..core.view import Node, Operand, Value, View, is_value
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule

_NEVER = -1e30
"""What is added to masked logits must be below this to be as good as minus infinity."""


@dataclass(frozen=True, slots=True)
class Logits:
    q: Value
    kt: Value
    scale: float
    masks: tuple[Value, ...]
    where: tuple[Value, float] | None
    """Condition and fill, where masked logits are replaced instead of added to."""
    softcap: float | None
    apart: Value | None = None
    """The product reshaped, where it is not that itself which is masked."""


class FuseAttention(Rule):
    """matmul(softmax(add(mul(matmul(q, kᵀ), scale), mask)), v) => sdpa(q, k, v, mask, scale)"""

    name = "fuse-attention"

    def pattern(self, p: Any, logits: Any, v: Any) -> Any:
        return p.matmul(p.softmax(logits, dim=-1), v)

    def where(self, match: Match) -> None:
        logits = read_logits(match.view, match.value("logits"), match.root)
        if logits.apart is not None:
            match.refuse("the product is reshaped before the softmax, but its weights are not")
        check_shapes(match.view, logits, match.value("v"), match.root)

    def replace(self, build: Build, **bound: Operand) -> Value:
        logits = read_logits(build.view, build.match.value("logits"), build.match.root)
        return attend(build, logits, logits.q, bound["v"])


def attend(build: Build, logits: Logits, q: Value, v: Operand, *, gqa: bool = False) -> Value:
    """The ``sdpa`` of logits that were read."""
    operands = [q, _last_two_swapped(build, logits.kt), v]
    mask = _mask(build, logits)
    if mask is not None:
        operands.append(mask)
    scale = _round_scale(build.view, logits)
    return build.sdpa(*operands, scale=scale, causal=False, gqa=gqa, softcap=logits.softcap)


class FuseGuardedAttention(FuseAttention):
    """matmul(where(isnan(p), 0, p), v) => sdpa(q, k, v, mask, scale), p the softmax"""

    name = "fuse-guarded-attention"

    def pattern(self, p: Any, logits: Any, v: Any) -> Any:
        weights = p.softmax(logits, dim=-1)
        return p.matmul(p.where(p.isnan(weights), 0.0, weights), v)


class FuseWideAttention(FuseAttention):
    """matmul(cast(softmax(cast(logits))), v) => sdpa(q, k, v, mask, scale), as sdpa computes it"""

    name = "fuse-wide-attention"

    def pattern(self, p: Any, logits: Any, v: Any) -> Any:
        weights = p.softmax(p.cast(logits, dtype=torch.float32), dim=-1)
        return p.matmul(p.cast(weights), v)


def read_logits(view: View, value: Value, root: Node) -> Logits:
    """Take logits apart into q, kᵀ, scale, cap and mask. ``Refusal`` where they are none."""
    masks: list[Value] = []
    replaced: tuple[Value, float] | None = None
    node = _only_for_this(view, value, root)
    while view.op(node) == "add":
        value, mask = _scores_and_mask(view, node)
        masks.append(mask)
        node = _only_for_this(view, value, root)
    if view.op(node) == "where" and not masks:
        number = view.number(view.operands(node)[2])
        if number is None:
            raise Refusal("where: masked logits are not replaced by a number", root)
        value, replaced = view.tensor(node, 1), (view.tensor(node, 0), float(number))
    node, apart = _only_for_this(view, value, root), None
    if view.op(node) == "reshape":
        apart, value = value, view.tensor(node)
    value, scale = _unscaled(view, value)
    node = _only_for_this(view, value, root)
    cap = None
    if view.op(node) == "tanh":
        if scale <= 0:
            raise Refusal(f"tanh times {scale:g} is not a cap of the logits", root)
        value, cap = view.tensor(node), scale
        value, divided = _unscaled(view, value)
        value, before = _unscaled(view, value)
        scale *= divided * before
        node = _only_for_this(view, value, root)
    if view.op(node) != "matmul":
        raise Refusal(f"the softmax is of `{view.op(node)}`, not of a product of matrices", root)
    q, on_q = _unscaled(view, view.tensor(node, 0))
    kt, on_k = _unscaled(view, view.tensor(node, 1))
    return Logits(q, kt, scale * on_q * on_k, tuple(masks), replaced, cap, apart)


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
        if not is_value(scores) or not is_value(mask) or view.number(mask) is not None:
            continue
        maker = view.producer(_joined(view, scores))
        if maker is None:
            continue
        if _is_product(view, maker) or (view.op(maker) == "add" and _holds_product(view, maker)):
            return scores, mask
    raise Refusal("neither operand of the added mask is a product of matrices", node)


def _holds_product(view: View, node: Node) -> bool:
    """Whether one of two summands is a product of matrices: the scores, with a mask added."""
    summands = [_joined(view, o) for o in view.operands(node) if is_value(o)]
    products = [view.producer(value) for value in summands]
    return any(p is not None and _is_product(view, p) for p in products)


def _joined(view: View, scores: Value) -> Value:
    """Scores without the number that they are multiplied by, nor a reshape that parts the heads."""
    node = view.producer(scores)
    inner = view.tensor(node) if node is not None and view.op(node) == "reshape" else scores
    return _unscaled(view, inner)[0]


def _is_product(view: View, node: Node) -> bool:
    """Whether a node is a product of matrices, or the tanh that caps one."""
    return view.op(node) in ("matmul", "tanh")


def _unscaled(view: View, value: Value) -> tuple[Value, float]:
    """A value without the number that it is multiplied or divided by, and that number."""
    node = view.producer(value)
    op = None if node is None else view.op(node)
    if node is None or op not in ("mul", "div"):
        return value, 1.0
    a, b = view.operands(node)
    number = view.number(b)
    if is_value(a) and number is not None and number != 0:
        return a, float(number) if op == "mul" else 1 / float(number)
    number = view.number(a) if op == "mul" else None
    return (b, float(number)) if is_value(b) and number is not None else (value, 1.0)


def check_shapes(view: View, logits: Logits, v: Value, root: Node) -> None:
    q, kt, values = (view.type(x) for x in (logits.q, logits.kt, v))
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
    if logits.where is not None and logits.where[1] > _NEVER:
        raise Refusal(f"masked logits become {logits.where[1]:g}, which sdpa cannot express", root)


def _mask(build: Build, logits: Logits) -> Value | None:
    """The mask of sdpa: boolean for minus infinity, else added as it stands.

    A row that is masked as a whole is uniform under the least finite number and 0 under minus
    infinity, so the one is not taken for the other.
    """
    view = build.view
    if logits.where is not None:
        condition, fill = logits.where
        return condition if fill == -math.inf else build.where(condition, 0.0, fill)
    if not logits.masks:
        return None
    first, *rest = logits.masks
    for mask in rest:
        first = build.add(mask, first)
    maker = view.producer(first)
    if rest or maker is None or view.op(maker) != "where":
        return first
    _, kept, fill_ = view.operands(maker)
    boolean = view.number(kept) == 0 and view.number(fill_) == -math.inf
    return view.tensor(maker) if boolean else first


def _round_scale(view: View, logits: Logits) -> float:
    """The usual 1/√(head dim) to its last digit, where the graph's roots of it lost some."""
    width = (view.type(logits.q).shape or (1,))[-1]
    usual = 1 / math.sqrt(width) if isinstance(width, int) else logits.scale
    return usual if math.isclose(usual, logits.scale, rel_tol=1e-6) else logits.scale


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
    source = view.tensor(maker)
    return source if joined == tuple(range(rank)) else build.transpose(source, perm=joined)


class FuseRope(Rule):
    """add(mul(x, cos), mul(concat(neg(x₂), x₁), sin)) => rope(x, cos, sin)"""

    name = "fuse-rope"

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


RULES: tuple[type[Rule], ...] = (
    FuseRope, FuseGuardedAttention, FuseWideAttention, FuseAttention,
)  # fmt: skip
