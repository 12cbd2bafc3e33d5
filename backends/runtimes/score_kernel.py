"""Scores of tokens as passes spell them out become one op, where a kernel computes that.

mul(last(cumsum(softmax(q kᵀ · scale))), 1/heads)    => token_scores(q, k), each head with its keys
mean(softmax(reshape(q) kᵀ · scale), heads)          => token_scores(q, k), heads that share keys

See ``moves.attention_scores``, which writes both; hidden keys may have the lowest number.
"""

from __future__ import annotations

from typing import Any

import torch

from ...ir.core.view import Operand, Value, is_value
from ...ir.moves.attention_scores import HIDDEN
from ...ir.rewrite.pattern import Match
from ...ir.rewrite.rule import Build, Rule
from ...ir.vocab import END


def _weights(p: Any, q: Any, k: Any, scale: Any, mask: Any, low: Any) -> Any:
    logits = p.mul(p.matmul(q, p.transpose(k, perm=(0, 1, 3, 2))), scale)
    return p.softmax(p.one_of(p.where(mask, logits, low), logits), dim=3)


class _Scores(Rule):
    """What both forms share: what they may be made of, and what stands for them."""

    def where(self, match: Match) -> None:
        match.scalar("scale")
        shapes = [match.type(name).shape or () for name in ("q", "k")]
        if any(len(shape) != 4 for shape in shapes):
            match.refuse("queries and keys are not [rows, heads, tokens, width]")
        if "mask" not in match.bindings:
            return
        mask = match.type("mask")
        if mask.dtype != torch.bool or (mask.shape or ())[1:3] != (1, 1):
            match.refuse(f"the mask is {mask}, not one truth value a key")
        if match.scalar("low") > HIDDEN:
            match.refuse("hidden keys count")

    def replace(self, build: Build, **bound: Operand) -> Value:
        mask = bound.get("mask")
        operands = [self.queries(build.match), bound["k"], *([mask] if is_value(mask) else [])]
        return build.token_scores(*operands, scale=build.match.scalar("scale"))

    def queries(self, match: Match) -> Value:
        """[rows, heads, 1, width]"""
        return match.value("q")


class FuseHeadScores(_Scores):
    """mul(last(cumsum(softmax(q kᵀ · scale))), 1/heads) => token_scores(q, k)"""

    name = "fuse-head-scores"

    def pattern(
        self, p: Any, q: Any, k: Any, scale: Any, mask: Any, low: Any, share: Any
    ) -> Any:
        heads = p.squeeze(_weights(p, q, k, scale, mask, low), dims=(2,))
        last = p.slice(p.cumsum(heads, dim=1), -1, END, dim=1)
        return p.mul(p.squeeze(last, dims=(1,)), share)

    def where(self, match: Match) -> None:
        super().where(match)
        (_, heads, queries, _), (_, groups, _, _) = (match.type(n).shape or () for n in "qk")
        if not isinstance(heads, int) or (groups, queries) != (heads, 1):
            match.refuse(f"{match.type('q')} is not one query of each head of {match.type('k')}")
        if abs(match.scalar("share") * int(heads) - 1) > 1e-6:
            match.refuse("it is not the mean of the heads")


class FuseGroupScores(_Scores):
    """mean(softmax(reshape(q) kᵀ · scale), heads) => token_scores(q, k)"""

    name = "fuse-group-scores"

    def pattern(self, p: Any, q: Any, k: Any, scale: Any, mask: Any, low: Any) -> Any:
        return p.mean(_weights(p, q, k, scale, mask, low), dims=(1, 2), keepdim=False)

    def where(self, match: Match) -> None:
        super().where(match)
        shape = match.view.type(self.queries(match)).shape or ()
        joined = match.type("q").shape or ()
        heads = [n for n in (*joined[1:3], *shape[1:2]) if isinstance(n, int)]
        if len(shape) != 4 or shape[2] != 1 or len(heads) != 3 or heads[0] * heads[1] != heads[2]:
            match.refuse("its queries are not one of each head, those together that share keys")

    def queries(self, match: Match) -> Value:
        node = match.view.producer(match.value("q"))
        if node is None or match.view.op(node) != "reshape":
            match.refuse("its queries are not put together by a reshape")
        assert node is not None
        return match.view.tensor(node)


RULES: tuple[type[Rule], ...] = (FuseHeadScores, FuseGroupScores)
