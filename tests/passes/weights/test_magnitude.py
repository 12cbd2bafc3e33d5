"""Masks by magnitude on graphs of both kinds: which weights go, what composes, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.statistics import Statistics
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.weights.magnitude import Magnitude

from ..calibrated import optimize, rel

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]
Inputs = dict[str, torch.Tensor]


def weights(view: View) -> dict[str, torch.Tensor]:
    view = view.copy()
    canonicalize(view)
    tensors = {}
    for linear in recognize(view).linears:
        handle = view.weight(linear.weight)
        assert handle is not None
        tensors[linear.name] = handle.read()
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_two_of_four_stay(kind: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    source = toy_graph(kind)
    result = gw.optimize(source, "magnitude", samples=[toy_inputs])
    before, after = weights(source), weights(result.graph)
    sites = {site.name: site for site in result.report.passes[0].result.sites}
    assert sites.keys() == before.keys() == after.keys()
    for name, masked in after.items():
        groups, old = masked.reshape(-1, 4), before[name].reshape(-1, 4)
        stays = groups != 0
        assert bool((stays.sum(1) == 2).all())
        assert torch.equal(groups[stays], old[stays]), "what stays is as it was"
        lost = torch.where(stays, 0.0, old).abs().amax(1)
        assert bool((lost <= torch.where(stays, old.abs(), torch.inf).amin(1)).all())
        predicted = float(old[~stays].norm() / old.norm())
        assert sites[name].rel_l2 == pytest.approx(predicted, rel=1e-5)
        assert sites[name].sparsity == 0.5
        assert sites[name].bytes_before == sites[name].bytes_after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("how", "zeros"), [("sparsity=0.3", 0.3), ("sparsity=0.75", 0.75), ("pattern=1:4", 0.75)]
)
def test_the_share_of_zeros(
    kind: str, how: str, zeros: float, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    recipe = f"magnitude{{{how}}}"
    result = gw.optimize(toy_graph(kind), recipe, samples=[toy_inputs])
    source = weights(toy_graph(kind))
    for name, masked in weights(result.graph).items():
        (site,) = (s for s in result.report.passes[0].result.sites if s.name == name)
        share = float((masked == 0).float().mean())
        assert site.sparsity == pytest.approx(share)
        assert abs(share - zeros) * masked.numel() < 1 + 1e-3
        if "sparsity" in how:
            kept, lost = source[name][masked != 0].abs(), source[name][masked == 0].abs()
            assert float(kept.min()) >= float(lost.max())


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_codes_keep_the_zeros(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    from graphwright.ir.vocab import dense_weight

    result = gw.optimize(toy_graph(kind), "magnitude,quantize{bits=4}", samples=[toy_inputs])
    masks = weights(gw.optimize(toy_graph(kind), "magnitude", samples=[toy_inputs]).graph)
    for linear in recognize(result.graph).linears:
        assert linear.quantized
        weight = dense_weight(result.graph, linear.node)
        assert bool((weight[masks[linear.name] == 0] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("between", ["", "quantize{bits=4},"])
def test_eora_compensates_the_mask(
    kind: str, between: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    source = toy_graph(kind)
    expected = sweep(source, toy_inputs)
    plain = optimize(source, f"magnitude,{between}clean{{optional=true}}", toy_inputs)
    repaired = optimize(source, f"magnitude,{between}eora{{rank=8}}", toy_inputs)
    whole = optimize(source, f"magnitude,{between}eora{{rank=40 factors=float32}}", toy_inputs)
    before, after, none = (
        rel(expected, sweep(optimized.graph, toy_inputs)) for optimized in (plain, repaired, whole)
    )
    assert none < 1e-4 < after < 0.7 * before
    step = repaired.report.passes[-1]
    assert step.error is not None and step.error_to_source is not None
    assert step.error_to_source.rel_l2 == pytest.approx(after, rel=1e-3)
    former = repaired.report.passes[-2].error_to_source
    assert former is not None and former.rel_l2 > step.error_to_source.rel_l2


def test_the_plan_reads_nothing(graph: View, no_reads: Any, toy_inputs: Inputs) -> None:
    with no_reads():
        planned = gw.plan(graph, "magnitude").passes[0][1]
    done = gw.optimize(graph, "magnitude", samples=[toy_inputs]).report.passes[0].result
    for before, after in zip(planned.sites, done.sites, strict=True):
        assert (before.name, before.bytes_after) == (after.name, after.bytes_after)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "50%", "half", "2:4:8"])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(BadInput, match=f"pattern={pattern} is not N:M"):
        gw.passes.Magnitude(pattern=pattern)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 50.0, float("nan")])
def test_shares_that_are_none(sparsity: float) -> None:
    with pytest.raises(BadInput, match=f"sparsity={sparsity} must be above 0 and below 1"):
        gw.passes.Magnitude(sparsity=sparsity)


def test_a_share_and_a_pattern() -> None:
    with pytest.raises(BadInput, match="give sparsity= or pattern=, not both"):
        gw.passes.Magnitude(sparsity=0.5, pattern="2:4")


def test_rows_that_are_no_multiple(graph: View, toy_inputs: Inputs) -> None:
    step = gw.optimize(graph, "magnitude{pattern=8:16}", samples=[toy_inputs]).report.passes[0]
    assert step.result.refused == [("down", "its 40 inputs are no multiple of 16")]
    assert {site.name for site in step.result.sites} == {"gate", "up", "head"}


def test_an_order_that_cannot_be(graph: View) -> None:
    for recipe, reason in (
        ("quantize,magnitude", "change the same sites, and magnitude has to come first"),
        ("magnitude,magnitude{pattern=1:4}", "would both mask the same sites"),
    ):
        with pytest.raises(BadInput, match=reason):
            gw.Recipe.parse(recipe)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_weight(kind: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    graph = toy_graph(kind)
    canonicalize(graph)
    gate, up = (x for x in recognize(graph).linears if x.name in ("gate", "up"))
    graph.set_operand(up.node, 1, gate.weight)
    graph.drop_unused_weights()
    first, second = (x.name for x in recognize(graph).linears if x.weight is gate.weight)
    recipe = "magnitude{{include=[{} {}]}}"
    both = gw.optimize(graph, recipe.format(first, second), samples=[toy_inputs])
    assert len(both.report.passes[0].result.sites) == 2
    one = gw.optimize(graph, recipe.format(first, "down"), samples=[toy_inputs])
    (refused,) = one.report.passes[0].result.refused
    reason = f"{second} holds the same weight and keeps it: choose both or neither"
    assert refused == (first, reason)


def test_a_weight_of_an_embedding(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    def tie(toy: Any) -> None:
        toy.head.weight = toy.embed.weight

    step = gw.optimize(toy_graph("fx", tie), "magnitude", samples=[toy_inputs]).report.passes[0]
    ((site, reason),) = step.result.refused
    assert site == "head" and reason.startswith("its weight is tied to an embedding")


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.1, 1), (0.3, 3), (0.7, 7), (0.26, 3)])
def test_a_share_is_rounded_once(sparsity: float, zeros: int) -> None:
    weight = torch.arange(1.0, 11.0).reshape(2, 5)
    stored = Magnitude(sparsity=sparsity).fit(weight, Statistics(), "here")
    assert stored.sparsity == pytest.approx(zeros / 10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(4, 8)
    weight[1, 2] = bad
    with pytest.raises(BadInput, match="here: 1 of 32 weights are NaN or infinite"):
        Magnitude().fit(weight, Statistics(), "here")
