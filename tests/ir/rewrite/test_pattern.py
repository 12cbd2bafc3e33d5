"""Patterns match by meaning, on either graph kind, and say why they do not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import Refusal
from graphwright.ir.rewrite.pattern import Matcher, PatternBuilder, Var, inner_ops, pattern_depth

aten = torch.ops.aten
Drafts = Callable[..., Any]


def matcher(pattern: Callable[..., Any]) -> Matcher:
    names = list(inspect.signature(pattern).parameters)[1:]
    return Matcher(pattern(PatternBuilder(), *(Var(name) for name in names)))


def silu(p: Any, x: Any) -> Any:
    return p.mul(x, p.sigmoid(x))


def refusal(view: Any, pattern: Callable[..., Any], root: Any) -> str:
    pattern_matcher = matcher(pattern)
    assert pattern_matcher.match(view, view.producer(root)) is None
    return pattern_matcher.refusal(view).reason


def match(view: Any, pattern: Callable[..., Any], root: Any) -> Any:
    pattern_matcher = matcher(pattern)
    result = pattern_matcher.match(view, view.producer(root))
    assert result is not None, pattern_matcher.refusal(view).reason
    return result


# --- structure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_commutative_operands_match_in_both_orders(draft: Drafts, swapped: bool) -> None:
    d = draft()
    gate = d.op("sigmoid", d.x)
    root = d.op("mul", gate, d.x) if swapped else d.op("mul", d.x, gate)
    view = d.finish(root)
    bindings = match(view, silu, root)
    assert bindings["x"] is d.x
    assert bindings.nodes == [view.producer(root), view.producer(gate)]


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_every_order_of_nested_commutative_operands(
    draft: Drafts, outer: bool, inner: bool
) -> None:
    d = draft(x=(3, 5), y=(3, 5), z=(3, 5))
    pair = (d.y, d.op("neg", d.z))
    a = d.op("add", *(reversed(pair) if inner else pair))
    pair = (d.op("neg", d.y), a)
    root = d.op("mul", *(reversed(pair) if outer else pair))
    view = d.finish(root)
    bindings = match(view, lambda p, u, v: p.mul(p.neg(u), p.add(u, p.neg(v))), root)
    assert bindings["u"] is d.y
    assert bindings["v"] is d.z


def test_an_early_choice_is_taken_back_where_a_later_part_does_not_fit(draft: Drafts) -> None:
    """``add`` takes u = x first; only u = y lets the second ``mul`` operand fit."""
    d = draft()
    root = d.op("mul", d.op("add", d.x, d.y), d.op("exp", d.y))
    view = d.finish(root)
    bindings = match(view, lambda p, u, v: p.mul(p.add(u, v), p.exp(u)), root)
    assert (bindings["u"], bindings["v"]) == (d.y, d.x)


def test_the_order_of_other_operands_counts(draft: Drafts) -> None:
    d = draft()
    root = d.op("sub", d.op("sigmoid", d.x), d.x)
    view = d.finish(root)
    assert refusal(view, lambda p, x: p.sub(x, p.sigmoid(x)), root) == (
        "expected `sigmoid`, got the input x at depth 1"
    )


def test_a_repeated_variable_binds_one_operand(draft: Drafts) -> None:
    d = draft()
    root = d.op("mul", d.x, d.op("sigmoid", d.y))
    view = d.finish(root)
    reason = refusal(view, silu, root)
    assert reason == "expected the same x as before, got the input y at depth 2"


def test_a_shared_part_of_a_pattern_is_one_node(draft: Drafts) -> None:
    def pattern(p: Any, x: Any) -> Any:
        gate = p.sigmoid(x)
        return p.sub(p.neg(gate), p.exp(gate))

    d = draft(outputs=2)
    gate = d.op("sigmoid", d.x)
    shared = d.op("sub", d.op("neg", gate), d.op("exp", gate))
    twice = d.op("sub", d.op("neg", d.op("sigmoid", d.x)), d.op("exp", d.op("sigmoid", d.x)))
    view = d.finish(shared, twice)
    assert len(match(view, pattern, shared).nodes) == 4
    assert refusal(view, pattern, twice) == "expected the same node, got `sigmoid` at depth 2"


def test_one_of_takes_the_first_that_fits(draft: Drafts) -> None:
    def pattern(p: Any, x: Any) -> Any:
        return p.mul(x, p.one_of(p.sigmoid(x), p.reciprocal(p.add(p.exp(p.neg(x)), 1.0))))

    d = draft(outputs=3)
    plain = d.op("mul", d.x, d.op("sigmoid", d.x))
    longhand = d.op("add", d.op("exp", d.op("neg", d.x)), 1.0)
    written = d.op("mul", d.x, d.op("reciprocal", longhand))
    neither = d.op("mul", d.x, d.op("tanh", d.x))
    view = d.finish(plain, written, neither)
    assert len(match(view, pattern, plain).nodes) == 2
    assert len(match(view, pattern, written).nodes) == 5
    assert refusal(view, pattern, neither) == "expected `sigmoid`, got `tanh` at depth 1"


def test_depth_and_inner_ops_of_a_pattern() -> None:
    p = PatternBuilder()
    x = Var("x")
    pattern = p.mul(x, p.one_of(p.sigmoid(x), p.reciprocal(p.add(p.exp(x), 1.0))))
    assert pattern_depth(pattern) == 4
    assert inner_ops(pattern) == {"sigmoid", "reciprocal", "add", "exp"}


def test_an_unknown_op_is_named_when_the_pattern_is_written() -> None:
    with pytest.raises(AttributeError, match="no op 'sigmod'"):
        _ = PatternBuilder().sigmod


# --- numbers and attributes ----------------------------------------------------------------------


def squared(p: Any, x: Any) -> Any:
    return p.pow(x, 2.0)


@pytest.mark.parametrize("exponent", [2, 2.0, torch.tensor(2.0), torch.tensor([[2.0]])])
def test_a_number_matches_a_number_or_a_constant_of_one_element(
    draft: Drafts, exponent: Any
) -> None:
    d = draft()
    if isinstance(exponent, torch.Tensor):
        exponent = d.weight("two", exponent)
    root = d.op("pow", d.x, exponent)
    assert match(d.finish(root), squared, root)["x"] is d.x


def test_another_number_or_a_long_constant_is_refused(draft: Drafts) -> None:
    d = draft(outputs=3)
    cubed = d.op("pow", d.x, d.weight("three", torch.tensor(3.0)))
    many = d.op("pow", d.x, d.weight("twos", torch.full((5,), 2.0)))
    computed = d.op("pow", d.x, d.y)
    view = d.finish(cubed, many, computed)
    expected = "expected the number 2, got the {} at depth 1"
    assert refusal(view, squared, cubed) == expected.format("constant three")
    assert refusal(view, squared, many) == expected.format("constant twos")
    assert refusal(view, squared, computed) == expected.format("input y")


def test_scalar_reads_a_bound_number_and_refuses_a_tensor(draft: Drafts) -> None:
    d = draft(outputs=2)
    shifted = d.op("add", d.x, 0.125)
    plain = d.op("add", d.x, d.y)
    view = d.finish(shifted, plain)
    bindings = match(view, lambda p, x, eps: p.add(x, eps), shifted)
    assert bindings.scalar("eps") == 0.125
    bindings = match(view, lambda p, x, eps: p.add(x, eps), plain)
    with pytest.raises(Refusal, match="eps is not a constant number"):
        bindings.scalar("eps")


def test_negative_dimensions_count_from_the_last_of_the_operand(draft: Drafts) -> None:
    d = draft(outputs=3, x=(1, 5, 123))
    last = d.op("mean", d.x, dims=(2,), keepdim=True)
    first = d.op("mean", d.x, dims=(0,), keepdim=True)
    weights = d.op("softmax", d.x, dim=2)
    view = d.finish(last, first, weights)

    def mean(p: Any, x: Any) -> Any:
        return p.mean(x, dims=(-1,), keepdim=True)

    match(view, mean, last)
    assert refusal(view, mean, first) == ("expected `mean` with dims=(-1,), got (0,) at depth 0")
    match(view, lambda p, x: p.softmax(x, dim=-1), weights)
    assert "with dim=-2, got 2" in refusal(view, lambda p, x: p.softmax(x, dim=-2), weights)


def test_an_attribute_may_be_a_predicate(draft: Drafts) -> None:
    def at_least_one(dim: int) -> bool:
        return dim >= 1

    d = draft(outputs=2)
    rows, columns = d.op("softmax", d.x, dim=0), d.op("softmax", d.x, dim=1)
    view = d.finish(rows, columns)
    match(view, lambda p, x: p.softmax(x, dim=at_least_one), columns)
    assert refusal(view, lambda p, x: p.softmax(x, dim=at_least_one), rows) == (
        "expected `softmax` with dim=at_least_one, got 0 at depth 0"
    )


def test_optional_operands_count_unless_the_rest_is_left_open(draft: Drafts) -> None:
    d = draft(outputs=2)
    w, b = d.weight("w", torch.ones(7, 5)), d.weight("b", torch.ones(7))
    plain, biased = d.op("linear", d.x, w), d.op("linear", d.x, w, b)
    view = d.finish(plain, biased)
    match(view, lambda p, x, w: p.linear(x, w), plain)
    match(view, lambda p, x, w: p.linear(x, w, rest=True), biased)
    match(view, lambda p, x, w, b: p.linear(x, w, b), biased)
    assert refusal(view, lambda p, x, w: p.linear(x, w), biased) == (
        "expected `linear` of 2 operands, got `linear` at depth 0"
    )
    assert refusal(view, lambda p, x, w, b: p.linear(x, w, b, rest=True), plain) == (
        "expected `linear` of 3 operands, got `linear` at depth 0"
    )


def test_a_native_node_matches_by_its_own_name(draft: Drafts) -> None:
    d = draft(x=(3, 5), y=(5, 7), z=(7,))
    if d.kind == "fx":
        name, operands = "aten.addmm.default", (d.z, d.x, d.y)
    else:
        name, operands = "Gemm", (d.x, d.y, d.z)
    product = d.native(aten.addmm.default, "Gemm", *operands)
    root = d.op("relu", product)
    view = d.finish(root)
    bindings = match(view, lambda p, a, b, c: p.relu(p.native(name, a, b, c)), root)
    assert [bindings[v] for v in "abc"] == list(operands)
    reason = refusal(view, lambda p, a, b: p.relu(p.matmul(a, b)), root)
    assert reason == f"expected `matmul`, got `{name}` at depth 1"


def test_only_the_first_of_several_results_is_matched(draft: Drafts) -> None:
    d = draft(outputs=1, x=(3, 6))
    first = d.op("split", d.x, sizes=(2, 4), dim=1)
    producer = d.view.producer(first)
    root = d.op("neg", d.view.results(producer)[1])
    view = d.finish(root)
    assert refusal(view, lambda p, x: p.neg(p.split(x)), root) == (
        "expected the first result of `split`, got `split` at depth 1"
    )


# --- leaks ---------------------------------------------------------------------------------------


def test_an_intermediate_used_elsewhere_refuses(draft: Drafts) -> None:
    d = draft(outputs=2)
    gate = d.op("sigmoid", d.x)
    root, other = d.op("mul", d.x, gate), d.op("exp", gate)
    view = d.finish(root, other)
    assert refusal(view, silu, root) == (
        f"the intermediate {view.name(gate)} is also used by {view.name(view.producer(other))}"
    )


def test_an_intermediate_that_the_graph_returns_refuses(draft: Drafts) -> None:
    d = draft(outputs=2)
    gate = d.op("sigmoid", d.x)
    root = d.op("mul", d.x, gate)
    view = d.finish(root, gate)
    assert refusal(view, silu, root) == (
        f"the intermediate {view.name(gate)} is an output of the graph"
    )


def test_operands_of_the_match_may_be_used_elsewhere(draft: Drafts) -> None:
    d = draft(outputs=3)
    x = d.op("tanh", d.x)
    root = d.op("mul", x, d.op("sigmoid", x))
    view = d.finish(root, x, d.op("exp", root))
    assert match(view, silu, root)["x"] is x


# --- the nearest miss ----------------------------------------------------------------------------


def test_the_refusal_tells_the_deepest_point_reached(draft: Drafts) -> None:
    def rms_norm(p: Any, x: Any, w: Any) -> Any:
        mean = p.mean(p.mul(x, x), dims=(-1,), keepdim=True)
        return p.mul(w, p.mul(x, p.rsqrt(p.add(mean, 1e-6))))

    d = draft()
    mean = d.op("mean", d.op("mul", d.x, d.x), dims=(1,), keepdim=True)
    scale = d.op("reciprocal", d.op("sqrt", d.op("add", mean, 1e-6)))
    root = d.op("mul", d.weight("w", torch.ones(5)), d.op("mul", d.x, scale))
    view = d.finish(root)
    assert refusal(view, rms_norm, root) == "expected `rsqrt`, got `reciprocal` at depth 2"


def test_a_missing_and_a_numeric_operand_are_described(draft: Drafts) -> None:
    d = draft(outputs=1)
    root = d.op("sub", d.x, 0.5)
    view = d.finish(root)
    reason = refusal(view, lambda p, x, y: p.sub(x, p.exp(y)), root)
    if d.kind == "fx":
        assert reason == "expected `exp`, got the number 0.5 at depth 1"
    else:
        assert reason == "expected `exp`, got the constant const at depth 1"
