"""Attention of joined heads, with sinks, and with masks in other places: raised on both kinds, or
refused for a reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure

B, H, S, T, D = 2, 3, 5, 7, 4
LEAST = torch.finfo(torch.float32).min
SIZES = {
    "q": (B, H, S, D), "k": (B, H, T, D), "v": (B, H, T, D), "bias": (B * H, 1, T),
    "mask": (B, 1, S, T), "sink": (1, H, 1, 1),
}  # fmt: skip


def joined(g: Any, x: Any, rows: int, last: int) -> Any:
    return g.op("reshape", x, B * H, rows, last)


def parted(g: Any, x: Any, last: int) -> Any:
    return g.op("reshape", x, B, H, S, last)


def swapped(g: Any, x: Any, rank: int) -> Any:
    perm = (*range(rank - 2), rank - 1, rank - 2)
    return g.op("transpose", x, perm=perm)


def folded_scores(g: Any) -> Any:
    return g.op("matmul", joined(g, g.q, S, D), swapped(g, joined(g, g.k, T, D), 3))


def folded_sum(g: Any, weights: Any) -> Any:
    return parted(g, g.op("matmul", weights, joined(g, g.v, T, D)), D)


def bloom(g: Any) -> Any:
    """Positions are added to joined heads, the mask to parted ones."""
    scores = g.op("add", g.op("mul", folded_scores(g), 0.5), g.bias)
    masked = g.op("add", parted(g, scores, T), g.mask)
    return folded_sum(g, joined(g, g.op("softmax", masked, dim=3), S, T))


def xglm(g: Any) -> Any:
    """Parted for the mask alone, bounded, and the softmax of joined heads."""
    masked = g.op("add", parted(g, folded_scores(g), T), g.mask)
    bounded = g.op("maximum", masked, g.least)
    weights = g.op("softmax", joined(g, bounded, S, T), dim=2)
    return folded_sum(g, joined(g, parted(g, weights, T), S, T))


def swapped_before(g: Any) -> Any:
    """Keys that were swapped before they were joined, and a fill where a condition holds."""
    kt = g.op("reshape", swapped(g, g.k, 4), B * H, D, T)
    scores = parted(g, g.op("matmul", joined(g, g.q, S, D), kt), T)
    filled = g.op("where", g.op("gt", g.mask, 0.0), LEAST, scores)
    return folded_sum(g, joined(g, g.op("softmax", filled, dim=3), S, T))


def plain(g: Any, masked: Callable[[Any, Any], Any]) -> Any:
    scores = masked(g, g.op("matmul", g.q, swapped(g, g.k, 4)))
    return g.op("matmul", g.op("softmax", scores, dim=3), g.v)


def scaled_behind(g: Any) -> Any:
    """CodeGen's: the mask is divided too."""
    return plain(g, lambda g, x: g.op("div", g.op("add", x, g.mask), 2.0))


def filled_and_added(g: Any) -> Any:
    """GPT-Neo's: a condition of its own within another mask."""
    visible = g.op("gt", g.mask, -0.5)
    return plain(g, lambda g, x: g.op("add", g.op("where", visible, x, LEAST), g.mask))


def filled_over_added(g: Any) -> Any:
    """MPT's: a bias, and what is filled over it."""
    hidden = g.op("gt", g.mask, 0.5)
    bias = g.op("reshape", g.bias, B, H, 1, T)
    return plain(g, lambda g, x: g.op("where", hidden, -math.inf, g.op("add", x, bias)))


def sink_scores(g: Any, scores: Any) -> Any:
    return g.op("concat", scores, g.op("expand", g.sink, B, H, S, 1), dim=3)


def sink(g: Any, masked: bool = True) -> Any:
    scores = g.op("mul", g.op("matmul", g.q, swapped(g, g.k, 4)), 0.5)
    logits = sink_scores(g, g.op("add", scores, g.mask) if masked else scores)
    logits = g.op("sub", logits, g.op("amax", logits, dims=(3,), keepdim=True))
    kept = g.op("slice", g.op("softmax", logits, dim=3), 0, -1, dim=3)
    return g.op("matmul", kept, g.v)


def made(draft: Any, make: Callable[[Any], Any]) -> View:
    g = draft(**SIZES)
    g.least = g.weight("least", torch.tensor(LEAST))
    return g.finish(make(g))


@pytest.mark.parametrize(
    "make",
    [bloom, xglm, swapped_before, scaled_behind, filled_and_added, filled_over_added, sink,
     lambda g: sink(g, masked=False)],
)  # fmt: skip
def test_it_is_read_with_what_is_added_as_its_mask(draft: Any, make: Any) -> None:
    view = made(draft, make)
    rng = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(size, generator=rng) for name, size in SIZES.items()}
    inputs["mask"][0, 0, 1, 2] = LEAST
    inputs["mask"][1, 0, 3, :4] = LEAST
    inputs = {name: inputs[name] for name in view.input_names()}
    (expected,) = sweep(view, inputs).values()
    canonicalize(view)
    check_structure(view)
    counts = Counter(view.op(node) for node in view.nodes())
    assert counts["sdpa"] == 1 and not counts["softmax"] + counts["matmul"]
    torch.testing.assert_close(*sweep(view, inputs).values(), expected, rtol=1e-5, atol=1e-5)
    assert canonicalize(view.copy()).total == 0


def mixed(g: Any) -> Any:
    """Heads and rows change places on the way: the same sizes in another order."""
    turned = g.op("reshape", g.op("transpose", g.q, perm=(0, 2, 1, 3)), B * H, S, D)
    scores = g.op("matmul", turned, swapped(g, joined(g, g.k, T, D), 3))
    masked = g.op("add", parted(g, scores, T), g.mask)
    return folded_sum(g, joined(g, g.op("softmax", masked, dim=3), S, T))


def two_sinks(g: Any) -> Any:
    scores = sink_scores(g, sink_scores(g, g.op("matmul", g.q, swapped(g, g.k, 4))))
    kept = g.op("slice", g.op("softmax", scores, dim=3), 0, -1, dim=3)
    return g.op("matmul", kept, g.op("concat", g.v, g.op("slice", g.v, 0, 1, dim=2), dim=2))


def first_cut(g: Any) -> Any:
    logits = sink_scores(g, g.op("matmul", g.q, swapped(g, g.k, 4)))
    kept = g.op("slice", g.op("softmax", logits, dim=3), 1, T + 1, dim=3)
    return g.op("matmul", kept, g.v)


def enlarged(g: Any) -> Any:
    """The least number times 2 is minus infinity, which means another thing."""
    return plain(g, lambda g, x: g.op("mul", g.op("add", x, g.mask), 2.0))


@pytest.mark.parametrize(
    ("make", "rule", "reason"),
    [
        (mixed, "fuse-folded-heads", "more than heads are joined"),
        (two_sinks, "fuse-sink-attention", "the softmax is of `concat`"),
        (first_cut, "fuse-sink-attention", "more or less than the last weight is cut off"),
        (enlarged, "fuse-attention", "masked logits are multiplied by 2"),
    ],
)
def test_it_is_refused(draft: Any, make: Any, rule: str, reason: str) -> None:
    view = made(draft, make)
    assert reason in canonicalize(view).refusals[rule].reason
    assert sum(view.op(node) == "softmax" for node in view.nodes()) == 1
