"""Scores of tokens as moves write them become the op that has a kernel, with the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphwright.backends.runtimes.score_kernel import RULES
from graphwright.ir.fx.view import FxView
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.moves.attention_scores import attention_row
from graphwright.ir.rewrite.driver import RewriteReport, rewrite
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import difference

ROWS, HEADS, TOKENS, WIDTH = 2, 6, 5, 8


class Attend(torch.nn.Module):
    def forward(self, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
        )


def scored(groups: int, mask: torch.Tensor, row: Any = "last") -> tuple[FxView, tuple[Any, ...]]:
    rng = torch.Generator().manual_seed(0)
    heads = (HEADS, groups, groups)
    parts = tuple(torch.randn(ROWS, n, TOKENS, WIDTH, generator=rng) for n in heads)
    view = trace(Attend(), (*parts, mask), dynamic_shapes={})
    (site,) = (node for node in view.nodes() if view.op(node) == "sdpa")
    view.set_outputs({"scores": attention_row(view, site, row)})
    return view, (*parts, mask)


def fused(view: FxView) -> RewriteReport:
    return rewrite(view, [rule() for rule in RULES])


def seen() -> torch.Tensor:
    return torch.rand(ROWS, 1, 1, TOKENS, generator=torch.Generator().manual_seed(1)) > 0.3


@pytest.mark.parametrize("row", ["first", "last"])
@pytest.mark.parametrize("groups", [HEADS, 2])
def test_one_op_stands_for_them(groups: int, row: str) -> None:
    view, args = scored(groups, seen(), row)
    inputs = dict(zip(view.input_names(), args, strict=True))
    before = sweep(view, inputs)["scores"]
    assert fused(view).total == 1
    ops = {view.op(node) for node in view.nodes() if view.users(view.results(node)[0])}
    assert "token_scores" in {view.op(node) for node in view.nodes()} and "softmax" not in ops
    assert difference(before, sweep(view, inputs)["scores"]).rel_l2 < 1e-6


def test_a_mask_that_is_added_stays() -> None:
    view, _ = scored(HEADS, torch.zeros(ROWS, 1, 1, TOKENS))
    assert fused(view).total == 0


def test_a_mask_of_each_head_stays() -> None:
    view, _ = scored(HEADS, seen().expand(ROWS, HEADS, 1, TOKENS).clone())
    report = fused(view)
    assert not report.total and "not one truth value a key" in str(report.refusals)
