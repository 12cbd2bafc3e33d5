"""Linears made two by way of fewer features: ranks, the formulas, what goes behind, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.statistics import Gram
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.low_rank import wholes
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.weights.low_rank import Whitening, spectrum
from graphwright.passes.weights.welore import normalised, ranks_for

from ..calibrated import many, optimize, rel

KINDS = ("fx", "onnx")
RECIPES = ("low-rank{ratio=0.5}", "low-rank{rank=8 whiten=gram}", "welore{target=0.4}")
Graphs = Callable[..., View]
Inputs = dict[str, torch.Tensor]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_linears_of_one(
    recipe: str, kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    source = toy_graph(kind)
    factored = optimize(source, recipe, toy_inputs)
    result = factored.report.passes[0].result
    assert [site.name for site in result.sites] == ["gate", "up", "down", "head"]
    before = {linear.name: linear for linear in recognize(source).linears}
    for name, whole in wholes(recognize(factored.graph)).items():
        (site,) = (s for s in result.sites if s.name == name)
        linear = whole.linear
        assert len(whole.nodes) == 2 and site.note.startswith("rank ")
        assert (linear.out_features, linear.in_features) == site.shape
        weight = source.weight(before[name].weight)
        assert weight is not None
        error = (whole.matrix(factored.graph) - weight.read()).norm() / weight.read().norm()
        assert site.rel_l2 == pytest.approx(float(error), rel=1e-4)
        assert site.bytes_after == 4 * int(site.note.split()[1]) * sum(site.shape)
    step = factored.report.passes[0]
    assert step.bytes_after < step.bytes_before and step.macs_after < step.macs_before
    assert step.error is not None and 0.05 < step.error.rel_l2 < 1


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_computes_what_the_graph_does(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    factored = optimize(toy_graph(kind), "low-rank{rank=8},quantize{bits=4}", toy_inputs)
    run = gw.compile(factored.graph, backend="onnxruntime")
    assert rel(sweep(factored.graph, toy_inputs), run(**toy_inputs)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("between", ["", "quantize{bits=4},"])
@pytest.mark.parametrize("propagate", ["compensated", "dense"])
def test_eora_compensates_the_linear_that_was_one(
    propagate: str, between: str, kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    source = toy_graph(kind)
    expected = sweep(source, toy_inputs)
    base = f"low-rank{{rank=6}},{between}clean{{optional=true}}"
    plain = optimize(source, base, toy_inputs)
    errors = [rel(expected, sweep(plain.graph, toy_inputs))]
    for rank in (6, 40):
        eora = f"eora{{rank={rank} factors=float32 propagate={propagate}}}"
        repaired = optimize(source, f"{base},{eora}", toy_inputs)
        errors.append(rel(expected, sweep(repaired.graph, toy_inputs)))
        assert [s.name for s in repaired.report.passes[-1].result.sites] == [
            "gate", "up", "down", "head"
        ]  # fmt: skip
    assert errors[2] < 1e-4 < errors[1] < 0.8 * errors[0]
    site, former = repaired.report.passes[-1].result.sites[0], plain.report.passes[-2].result.sites
    stored = sum(s.bytes_after for s in former if s.name.partition(".")[0] == "gate")
    assert site.bytes_before == stored


def test_what_follows_sees_the_compensated_linear(
    toy_graph: Graphs, toy_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a path of full rank ``down`` reads what it reads in the source."""
    inputs: list[torch.Tensor] = []
    add = Gram.add

    def watched(self: Gram, *parts: torch.Tensor) -> None:
        inputs.append(parts[0])
        add(self, *parts)

    monkeypatch.setattr(Gram, "add", watched)
    optimize(toy_graph("fx"), "low-rank{rank=4},eora{rank=40 factors=float32}", toy_inputs)
    repaired = [x for x in inputs if x.shape[1] == 40]
    inputs.clear()
    optimize(toy_graph("fx"), "quantize{bits=8},eora{rank=4 propagate=dense}", toy_inputs)
    torch.testing.assert_close(repaired, [x for x in inputs if x.shape[1] == 40])


@pytest.mark.parametrize(
    "recipe", ["low-rank{ratio=0.5}", "low-rank{rank=8 whiten=gram},quantize{bits=8}",
               "low-rank,magnitude{pattern=1:2}", "low-rank{rank=8},quantize,eora{rank=4}"]
)  # fmt: skip
def test_the_plan_is_what_happens(
    recipe: str, graph: View, no_reads: Any, toy_inputs: Inputs
) -> None:
    with no_reads():
        planned = gw.plan(graph, recipe)
    done = optimize(graph, recipe, toy_inputs).report.passes
    for (_, before), after in zip(planned.passes, done, strict=True):
        assert [(s.name, s.bytes_before, s.bytes_after) for s in before.sites] == [
            (s.name, s.bytes_before, s.bytes_after) for s in after.result.sites
        ]
        assert before.refused == after.result.refused
    assert [linear.name for linear in recognize(graph).linears] == ["gate", "up", "down", "head"]


# --- the formulas --------------------------------------------------------------------------------


def test_whitened_truncation_leaves_the_tail_of_the_singular_values() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=rng)
    x = torch.randn(500, 40, generator=rng) @ torch.diag(torch.linspace(0.05, 3, 40))
    gram = Whitening(x.double().T @ x.double())
    whole = torch.linalg.norm(x @ weight.T)
    errors = []
    for whitening in (gram, None):
        svd = spectrum(weight, weight, whitening)
        down, up = svd.factors(8)
        errors.append(float(torch.linalg.norm(x @ (weight - up @ down).T) / whole))
    assert errors[0] == pytest.approx(spectrum(weight, weight, gram).relative_error(8), rel=1e-3)
    assert errors[0] < 0.9 * errors[1], "less than what the SVD of the weights leaves"


def test_the_target_of_welore_is_met_by_the_least_threshold(graph: View) -> None:
    linears = recognize(graph).linears
    rng = torch.Generator().manual_seed(0)
    heights = {}
    for i, linear in enumerate(linears):
        decay = torch.diag(torch.exp(-torch.arange(min(32, linear.out_features)) * 0.05 * (i + 1)))
        weight = torch.randn(linear.out_features, len(decay), generator=rng) @ decay
        heights[linear.name] = normalised(weight @ torch.randn(len(decay), 32, generator=rng), "")
    sizes = {x.name: x.out_features * x.in_features for x in linears}
    sides = {x.name: x.out_features + x.in_features for x in linears}

    def gone(ranks: dict[str, int]) -> float:
        saved = sum(sizes[name] - rank * sides[name] for name, rank in ranks.items())
        return saved / sum(sizes.values())

    shares = []
    for target in (0.05, 0.2, 0.5, 0.8):
        ranks = ranks_for(heights, linears, target)
        assert all(rank * sides[name] < sizes[name] for name, rank in ranks.items())
        kappas = [float(heights[name][rank - 1]) for name, rank in ranks.items()]
        lower = {
            name: int((h >= min(kappas) - 1e-9).sum()) for name, h in heights.items()
            if int((h >= min(kappas) - 1e-9).sum()) * sides[name] < sizes[name]
        }  # fmt: skip
        assert gone(ranks) >= target and gone(lower) <= gone(ranks)
        shares.append(gone(ranks))
    assert shares == sorted(shares) and shares[0] < 0.15
    by_decay = ranks_for(heights, linears, 0.5)
    assert by_decay["down"] < by_decay["up"] < by_decay["gate"], "what falls off sooner loses more"


def test_a_matrix_that_stays_whole(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    def orthogonal(toy: Any) -> None:
        torch.nn.init.orthogonal_(toy.gate.weight)

    factored = optimize(toy_graph("fx", orthogonal), "welore{target=0.2}", toy_inputs)
    result = factored.report.passes[0].result
    reason = "two factors of its rank would take no fewer numbers than its matrix"
    assert ("gate", reason) in result.refused
    assert {site.name for site in result.sites} == {"up", "down", "head"}


def test_a_matrix_of_zeros(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    def empty(toy: Any) -> None:
        toy.down.weight.zero_()

    for recipe in ("low-rank", "low-rank{whiten=gram}"):
        factored = optimize(toy_graph("fx", empty), recipe, toy_inputs)
        (site,) = (s for s in factored.report.passes[0].result.sites if s.name == "down")
        assert site.rel_l2 == 0.0


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("low-rank{ratio=0.3 rank=4}", "give ratio= or rank=, not both"),
        ("low-rank{ratio=1}", "ratio=1.0 must be above 0 and below 1"),
        ("low-rank{rank=0}", "rank=0 must be at least 1"),
        ("welore{target=0}", "target=0.0 must be above 0 and below 1"),
        ("welore{target=0.99}", "target=0.99 cannot be reached: rank 1 everywhere leaves 0.0"),
        ("low-rank,welore", "both leave linears of low rank at the same sites"),
        ("quantize,low-rank", "would both change the same sites, and low-rank has to come first"),
        ("low-rank{rank=30}", "two factors of its rank would take no fewer numbers"),
    ],
)
def test_what_cannot_be(recipe: str, reason: str, graph: View, toy_inputs: Inputs) -> None:
    with pytest.raises(BadInput, match=reason):
        optimize(graph, recipe, toy_inputs)


def test_a_factor_is_left_alone(graph: View, toy_inputs: Inputs) -> None:
    recipe = "low-rank{include=[up]},low-rank{exclude=[head]}"
    result = optimize(graph, recipe, toy_inputs).report.passes[1].result
    reason = "it is a factor of a linear of low rank already"
    assert result.refused == [("up.low_rank.in", reason), ("up.low_rank.out", reason)]
    assert [site.name for site in result.sites] == ["gate", "down"]


@pytest.mark.parametrize(
    "recipe", ["low-rank{ratio=0.3", "low-rank{whiten=gram", "welore{target=0.2"]
)
def test_weights_that_are_not_finite(
    recipe: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    def spoil(toy: Any) -> None:
        toy.up.weight[3, 4] = torch.nan

    recipe += " include=[up]}"
    with pytest.raises(BadInput, match="up: its weight is not finite"):
        gw.optimize(toy_graph("fx", spoil), recipe, samples=[toy_inputs], calibration=many())
