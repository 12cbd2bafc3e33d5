"""Spellings of attention, rotary positions, norms and linears: those that are raised, and those
that are refused for a reason; on both graph kinds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.moves.attention_scores import attention_row
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from graphwright.ir.structure.recognize import recognize

QKV = (2, 3, 5, 8)
RNG = torch.Generator().manual_seed(0)


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RNG)


def ops(view: View) -> Counter[str]:
    return Counter(view.op(node) for node in view.nodes())


def the(view: View, op: str) -> Any:
    (node,) = (n for n in view.nodes() if view.op(n) == op)
    return node


def swapped(g: Any, x: Any) -> Any:
    return g.op("transpose", x, perm=(0, 1, 3, 2))


def attend(g: Any, logits: Any, guard: bool = False) -> Any:
    weights = g.op("softmax", logits, dim=3)
    if guard:
        weights = g.op("where", g.op("isnan", weights), 0.0, weights)
    return g.op("matmul", weights, g.v)


def on_both(g: Any) -> Any:
    root = 0.25**0.5
    q, kt = g.op("mul", g.q, root), g.op("mul", swapped(g, g.k), root)
    return attend(g, g.op("matmul", q, kt), guard=True)


def before_the_transposition(g: Any) -> Any:
    return attend(g, g.op("matmul", g.op("div", g.q, 4.0), swapped(g, g.k)))


def on_logits(g: Any) -> Any:
    return attend(g, g.op("div", g.op("matmul", g.q, swapped(g, g.k)), 4.0))


def merged_transposition(g: Any) -> Any:
    heads = g.op("transpose", g.k, perm=(0, 2, 1, 3))
    kt = g.op("transpose", g.op("transpose", heads, perm=(0, 2, 1, 3)), perm=(0, 1, 3, 2))
    return attend(g, g.op("mul", g.op("matmul", g.q, kt), 0.25))


@pytest.mark.parametrize(
    "make", [on_both, before_the_transposition, on_logits, merged_transposition]
)
def test_the_scale_may_stand_anywhere(draft: Any, make: Callable[[Any], Any]) -> None:
    g = draft(q=QKV, k=QKV, v=QKV)
    view = g.finish(make(g))
    inputs = {n: tensor(*QKV) for n in "qkv"}
    (expected,) = sweep(view, inputs).values()
    canonicalize(view)
    check_structure(view)
    assert ops(view) == Counter({"sdpa": 1})
    assert view.attrs(the(view, "sdpa"))["scale"] == pytest.approx(0.25, rel=1e-6)
    torch.testing.assert_close(*sweep(view, inputs).values(), expected, rtol=1e-5, atol=1e-5)


def product(g: Any) -> Any:
    return g.op("matmul", g.q, swapped(g, g.k))


def as_the_library_does(g: Any) -> Any:
    """Gemma 2's: the scale, then the cap."""
    scores = g.op("div", g.op("mul", product(g), 0.25), 1.5)
    return g.op("mul", g.op("tanh", scores), 1.5)


def in_one_number(g: Any) -> Any:
    return g.op("mul", g.op("tanh", g.op("mul", product(g), 0.25 / 1.5)), 1.5)


@pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])
@pytest.mark.parametrize("make", [as_the_library_does, in_one_number])
def test_capped_logits(draft: Any, make: Callable[[Any], Any], masked: bool) -> None:
    g = draft(q=QKV, k=QKV, v=QKV, m=(5, 5))
    logits = make(g)
    view = g.finish(attend(g, g.op("add", logits, g.m) if masked else logits))
    inputs = {n: 3 * tensor(*QKV) for n in "qkv"} | {"m": tensor(5, 5)}
    (expected,) = sweep(view, inputs).values()
    canonicalize(view)
    check_structure(view)
    assert ops(view) == Counter({"sdpa": 1})
    attrs = view.attrs(the(view, "sdpa"))
    assert attrs["scale"] == pytest.approx(0.25, rel=1e-6)
    assert attrs["softcap"] == pytest.approx(1.5, rel=1e-6)
    torch.testing.assert_close(*sweep(view, inputs).values(), expected, rtol=1e-5, atol=1e-5)
    assert canonicalize(view.copy()).total == 0


@pytest.mark.parametrize("row", ["first", "last"])
def test_a_row_of_capped_attention_is_capped(draft: Any, row: Any) -> None:
    g = draft(outputs=2, q=QKV, k=QKV, v=QKV)
    attention = g.op("sdpa", g.q, g.k, g.v, scale=0.5, softcap=1.5)
    paid = attention_row(g.view, g.view.producer(attention), row)
    view = g.finish(attention, paid)
    inputs = {n: 3 * tensor(*QKV) for n in "qkv"}
    logits = 1.5 * torch.tanh(inputs["q"] @ inputs["k"].mT * 0.5 / 1.5)
    expected = logits.softmax(-1).mean(1)[:, 0 if row == "first" else -1]
    actual = list(sweep(view, inputs).values())[1]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_usual_scale_is_exact(draft: Any) -> None:
    g = draft(q=QKV, k=QKV, v=QKV)
    root = float(torch.tensor(8**-0.25))
    logits = g.op("matmul", g.op("mul", g.q, root), g.op("mul", swapped(g, g.k), root))
    view = g.finish(attend(g, logits))
    canonicalize(view)
    assert view.attrs(the(view, "sdpa"))["scale"] == 1 / math.sqrt(8)


@pytest.mark.parametrize("replaced", [False, True], ids=["added", "replaced"])
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
def test_masks_keep_their_meaning(draft: Any, fill: float, replaced: bool) -> None:
    """Minus infinity becomes a boolean mask; the least number does not: it differs on rows that
    are masked as a whole."""
    g = draft(q=QKV, k=QKV, v=QKV, m=(5, 5))
    scores = g.op("matmul", g.q, swapped(g, g.k))
    kept = g.op("gt", g.m, 0.0)
    if replaced:
        logits = g.op("where", kept, scores, fill)
    else:
        zero = g.weight("zero", torch.zeros(()))
        logits = g.op("add", scores, g.op("where", kept, zero, fill))
    view = g.finish(attend(g, logits, guard=True))
    inputs = {n: tensor(*QKV) for n in "qkv"} | {"m": tensor(5, 5)}
    inputs["m"][2] = -1.0
    (expected,) = sweep(view, inputs).values()
    canonicalize(view)
    mask = view.operands(the(view, "sdpa"))[3]
    assert (view.type(mask).dtype == torch.bool) == (fill == -math.inf)
    torch.testing.assert_close(*sweep(view, inputs).values(), expected, rtol=1e-5, atol=1e-5)


def test_two_masks_are_added(draft: Any) -> None:
    """T5's: a position bias and a mask, one after the other."""
    g = draft(q=QKV, k=QKV, v=QKV, b=(1, 3, 5, 5), m=(5, 5))
    scores = g.op("add", g.op("matmul", g.q, swapped(g, g.k)), g.b)
    view = g.finish(attend(g, g.op("add", g.m, scores)))
    inputs = {n: tensor(*QKV) for n in "qkv"} | {"b": tensor(1, 3, 5, 5), "m": tensor(5, 5)}
    (expected,) = sweep(view, inputs).values()
    canonicalize(view)
    assert ops(view) == Counter({"sdpa": 1, "add": 1})
    torch.testing.assert_close(*sweep(view, inputs).values(), expected, rtol=1e-5, atol=1e-5)


def soft_fill(g: Any) -> Any:
    scores = g.op("matmul", g.q, swapped(g, g.k))
    return attend(g, g.op("where", g.op("gt", g.q, 0.0), scores, -1e4))


def shared_logits(g: Any) -> Any:
    logits = g.op("matmul", g.q, swapped(g, g.k))
    return g.op("add", attend(g, logits), g.op("mean", logits, dims=(3,), keepdim=True))


def turned_over(g: Any) -> Any:
    return attend(g, g.op("mul", g.op("tanh", product(g)), -2.0))


def no_product(g: Any) -> Any:
    return attend(g, g.op("exp", g.q))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (soft_fill, "masked logits become -10000, which sdpa cannot express"),
        (shared_logits, "are also used elsewhere"),
        (turned_over, "tanh times -2 is not a cap of the logits"),
        (no_product, "the softmax is of `exp`, not of a product of matrices"),
        (lambda g: attend(g, g.q), "the softmax is of an input or a constant"),
    ],
    ids=["soft-fill", "shared-logits", "turned-over", "no-product", "input"],
)
def test_attention_refuses(draft: Any, make: Callable[[Any], Any], reason: str) -> None:
    square = (2, 3, 8, 8)
    g = draft(q=square, k=square, v=square)
    view = g.finish(make(g))
    report = canonicalize(view)
    assert reason in str(report.refusals["fuse-attention"])
    assert ops(view)["softmax"] == 1


def test_attention_weights_that_are_returned_stay(draft: Any) -> None:
    g = draft(outputs=2, q=QKV, k=QKV, v=QKV)
    weights = g.op("softmax", g.op("matmul", g.q, swapped(g, g.k)), dim=3)
    view = g.finish(g.op("matmul", weights, g.v), weights)
    report = canonicalize(view)
    assert "is an output of the graph" in str(report.refusals["fuse-attention"])
    assert ops(view)["sdpa"] == 0


def turn(g: Any, cut: int, end: int) -> Any:
    low, high = g.op("slice", g.q, 0, cut, dim=3), g.op("slice", g.q, cut, end, dim=3)
    rotated = g.op("concat", g.op("neg", high), low, dim=3)
    cos, sin = g.weight("cos", tensor(5, 8)), g.weight("sin", tensor(5, 8))
    return g.op("add", g.op("mul", rotated, sin), g.op("mul", g.q, cos))


def test_rotary_that_is_not_cut_in_half_stays(draft: Any) -> None:
    g = draft(q=QKV)
    view = g.finish(turn(g, 2, 8))
    report = canonicalize(view)
    assert "x is cut at 2 of 8, not in half" in str(report.refusals["fuse-rope"])
    g = draft(q=QKV)
    view = g.finish(turn(g, 4, 1 << 40))
    inputs = {"q": tensor(*QKV)}
    (expected,) = sweep(view, inputs).values()
    canonicalize(view)
    assert ops(view) == Counter({"rope": 1})
    torch.testing.assert_close(*sweep(view, inputs).values(), expected, rtol=1e-5, atol=1e-5)


def test_a_transposition_spelled_through_shapes(draft: Any) -> None:
    for middle, last, raised in (((6, 5, 8), (2, 3, 8, 5), 1), ((10, 3, 8), (2, 5, 8, 3), 0)):
        g = draft(q=QKV)
        flat = g.op("transpose", g.op("reshape", g.q, *middle), perm=(0, 2, 1))
        view = g.finish(g.op("exp", g.op("reshape", flat, *last)))
        inputs = {"q": tensor(*QKV)}
        (expected,) = sweep(view, inputs).values()
        report = canonicalize(view)
        assert ops(view)["reshape"] == 2 * (1 - raised)
        assert torch.equal(next(iter(sweep(view, inputs).values())), expected)
        if not raised:
            assert "is not known to be x" in str(report.refusals["fuse-shaped-transpose"])


def test_the_quick_gelu_is_no_gelu_and_no_silu(draft: Any) -> None:
    g = draft(x=(3, 123))
    view = g.finish(g.op("mul", g.x, g.op("sigmoid", g.op("mul", g.x, 1.702))))
    report = canonicalize(view)
    assert report.total == 0
    assert "expected the same x as before" in str(report.refusals["fuse-silu"])


def layer(g: Any, x: Any, index: int, parallel: bool) -> Any:
    """A layer of one head: attention and a gated feed-forward, one after the other or at once."""

    def linear(name: str, value: Any, out: int = 8) -> Any:
        width = 12 if name == "down" else 8
        weight = g.weight(f"layers.{index}.{name}.weight", tensor(out, width) / 4)
        return g.op("linear", value, weight)

    def attention(value: Any) -> Any:
        heads = [g.op("reshape", linear(n, value), 2, 5, 2, 4) for n in "qkv"]
        q, k, v = (g.op("transpose", h, perm=(0, 2, 1, 3)) for h in heads)
        mixed = g.op("transpose", g.op("sdpa", q, k, v), perm=(0, 2, 1, 3))
        return linear("o", g.op("reshape", mixed, 2, 5, 8))

    def feed_forward(value: Any) -> Any:
        gate = g.op("silu", linear("gate", value, 12))
        return linear("down", g.op("mul", gate, linear("up", value, 12)))

    first = g.op("add", x, attention(g.op("tanh", x)))
    return g.op("add", first, feed_forward(g.op("tanh", x if parallel else first)))


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
def test_blocks_of_serial_and_parallel_layers(draft: Any, parallel: bool) -> None:
    g = draft(x=(2, 5, 8))
    x = g.x
    for index in range(3):
        x = layer(g, x, index, parallel)
    head = g.op("linear", g.op("tanh", x), g.weight("head.weight", tensor(7, 8)))
    view = g.finish(head)
    canonicalize(view)
    structure = recognize(view)
    assert [len(b.sub_blocks) for b in structure.blocks] == [1 if parallel else 2] * 3
    for linear in structure.linears[:-1]:
        _, index, role = linear.name.split(".")
        assert (linear.block, linear.role) == (int(index), role)
    assert (structure.linears[-1].block, structure.linears[-1].role) == (None, "head")
    site = structure.attentions[1]
    assert (site.q, site.k, site.v, site.o) == tuple(f"layers.1.{n}" for n in "qkvo")
    assert (site.heads, site.kv_heads, site.head_dim, site.block) == (2, 2, 4, 1)


def test_a_shared_weight_gives_two_names(draft: Any) -> None:
    g = draft(x=(3, 6))
    weight = g.weight("tied.weight", tensor(6, 6))
    first = g.op("linear", g.x, weight)
    view = g.finish(g.op("linear", g.op("exp", first), weight))
    names = [linear.name for linear in recognize(view).linears]
    assert len(set(names)) == 2
    assert names == [linear.name for linear in recognize(view.copy()).linears]


def test_canonicalizing_shares_the_transposed_handle_of_a_tied_weight(draft: Any) -> None:
    g = draft(x=(3, 6))
    weight = g.view.add_weight("tied.weight", MemoryWeight(tensor(6, 6)))
    first = g.op("matmul", g.x, weight)
    view = g.finish(g.op("matmul", g.op("exp", first), weight))
    canonicalize(view)
    first_, second = recognize(view).linears
    assert first_.weight is second.weight
    assert len(view.weights()) == 1
