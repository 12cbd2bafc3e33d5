"""Softmax attention becomes ``sdpa``, rotary positions become ``rope``.

matmul(softmax(q kᵀ · scale + mask), v)           => sdpa(q, k, v, mask, scale)
matmul(softmax(c · tanh(q kᵀ · scale / c) + mask), v) => sdpa(q, k, v, mask, scale, softcap c)
x · cos + concat(-x₂, x₁) · sin                   => rope(x, cos, sin)

The cap is that of Gemma 2 (arXiv 2408.00118). How logits may be spelled is in ``logits``. The mask
holds what is added besides: a bias of each head (ALiBi, arXiv 2108.12409), products with positions
(DeBERTa, arXiv 2006.03654). Repeating key and value heads stays outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..core.errors import Refusal
from ..core.view import Node, Operand, Value, View
from ..core.weights import ComputedWeight
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule
from .logits import Logits, read_logits, usual_scale


class FuseAttention(Rule):
    """matmul(softmax(add(mul(matmul(q, kᵀ), scale), mask)), v) => sdpa(q, k, v, mask, scale)"""

    name = "fuse-attention"

    def pattern(self, p: Any, logits: Any, v: Any) -> Any:
        return p.matmul(p.softmax(logits, dim=-1), v)

    def where(self, match: Match) -> None:
        logits = read_logits(match.view, match.value("logits"), match.root)
        if logits.forms:
            match.refuse("the product is reshaped before the softmax, but its weights are not")
        check_shapes(match.view, logits, match.value("v"), match.root)

    def replace(self, build: Build, **bound: Operand) -> Value:
        logits = read_logits(build.view, build.match.value("logits"), build.match.root)
        return attend(build, logits, logits.q, bound["v"])


def attend(build: Build, logits: Logits, q: Value, v: Operand, *, gqa: bool = False) -> Value:
    """The ``sdpa`` of logits that were read."""
    mask = mask_of(build, logits, [step.value for step in logits.steps])
    return weighed(build, logits, (q, last_two_swapped(build, logits.kt), v), mask, gqa=gqa)


def weighed(
    build: Build, logits: Logits, qkv: Sequence[Operand], mask: Value | None, *, gqa: bool = False
) -> Value:
    """The ``sdpa`` with the scale and the cap of logits that were read."""
    operands = [*qkv, *([] if mask is None else [mask])]
    scale = usual_scale(build.view, logits)
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


def mask_of(
    build: Build, logits: Logits, values: Sequence[Value | None], *, boolean: bool = True
) -> Value | None:
    """The mask of sdpa: ``boolean`` for minus infinity, else added as it stands; ``values`` are
    those of the steps.

    A row that is masked as a whole is uniform under the least finite number and 0 under minus
    infinity, so the one is not taken for the other.
    """
    mask: Value | None = None
    only = boolean and len(logits.steps) == 1
    for step, value in zip(logits.steps, values, strict=True):
        if step.kind == "add":
            assert value is not None
            part = value if step.number == 1 else build.mul(value, step.number)
            part = condition_of(build.view, part) if only else part
            mask = part if mask is None else build.add(part, mask)
        elif step.kind == "least":
            mask = None if mask is None else build.clamp(mask, min=step.number)
        elif only and step.number == -math.inf:
            mask = value if step.kind == "keep" else build.logical_not(value)
        else:
            before = zero(build, logits.q) if mask is None else mask
            kept = (before, step.number) if step.kind == "keep" else (step.number, before)
            mask = build.where(value, *kept)
    return mask


def condition_of(view: View, mask: Value) -> Value:
    """The condition behind a mask of 0 and minus infinity, else the mask."""
    maker = view.producer(mask)
    if maker is None or view.op(maker) != "where":
        return mask
    _, kept, fill = view.operands(maker)
    plain = view.number(kept) == 0 and view.number(fill) == -math.inf
    return view.tensor(maker) if plain else mask


def zero(build: Build, like: Value) -> Value:
    """0 in the dtype of a value."""
    dtype = build.view.type(like).dtype
    assert dtype is not None
    zero = ComputedWeight(lambda: torch.zeros((), dtype=dtype), (), dtype, ("zero", dtype))
    return build.view.add_weight("zero", zero)


def last_two_swapped(build: Build, value: Value) -> Value:
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
