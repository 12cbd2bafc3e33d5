"""Attention with shared keys, as artifacts spell it: what looks like it and is not stays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.run.sweep import sweep

B, H, KV, S, T, D = 2, 4, 2, 3, 5, 8
SIZES = {"q": (B, H, S, D), "k": (B, KV, T, D), "v": (B, KV, T, D), "mask": (B, 1, S, T)}
BOTH = {**SIZES, "other": SIZES["mask"]}


def together(g: Any, x: Any, last: int) -> Any:
    return g.op("reshape", x, B, KV, H // KV * S, last)


def logits(g: Any, rows: tuple[int, ...] = (B, H, S, T)) -> Any:
    kt = g.op("transpose", g.k, perm=(0, 1, 3, 2))
    product = g.op("matmul", g.op("mul", together(g, g.q, D), 0.25), kt)
    return g.op("reshape", product, *rows)


def weighted(g: Any, scores: Any) -> Any:
    weights = together(g, g.op("softmax", scores, dim=3), T)
    return g.op("reshape", g.op("matmul", weights, g.v), B, H, S, D)


def plain(g: Any) -> Any:
    return weighted(g, g.op("add", logits(g), g.mask))


def swapped_heads(g: Any) -> Any:
    """The same sizes in another order: rows of several heads are mixed."""
    scores = g.op("transpose", logits(g, (B, S, H, T)), perm=(0, 2, 1, 3))
    return weighted(g, scores)


def guarded(g: Any, of: str = "mask", other: float = 0.0) -> Any:
    column = g.op("slice", g.op("softmax", getattr(g, of), dim=3), 0, 1, dim=3)
    empty = g.op("isnan", column)
    safe = g.op("where", empty, other, g.mask)
    return g.op("where", empty, 0.0, weighted(g, g.op("add", logits(g), safe)))


@pytest.mark.parametrize("make", [plain, guarded])
def test_it_is_read(draft: Any, make: Any) -> None:
    g = draft(**SIZES)
    view = g.finish(make(g))
    rng = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(size, generator=rng) for name, size in SIZES.items()}
    inputs["mask"][0, 0, 1, 2] = -math.inf
    inputs["mask"][1, 0, 2] = -math.inf if make is guarded else 0.0
    (expected,) = sweep(view, inputs).values()
    canonicalize(view)
    (site,) = view.nodes()
    assert view.op(site) == "sdpa" and view.attrs(site)["gqa"]
    (actual,) = sweep(view, inputs).values()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "rule", "reason"),
    [
        (swapped_heads, "fuse-shared-keys", "the softmax is of `transpose`"),
        (lambda g: guarded(g, other=-1.0), "fuse-empty-rows", "chosen by another condition"),
        (lambda g: guarded(g, of="other"), "fuse-empty-rows", "not the rows of which all keys"),
    ],
)
def test_it_is_refused(draft: Any, make: Any, rule: str, reason: str) -> None:
    g = draft(**BOTH)
    view = g.finish(make(g))
    assert reason in canonicalize(view).refusals[rule].reason
    assert sum(view.op(node) == "sdpa" for node in view.nodes()) == (rule == "fuse-empty-rows")
