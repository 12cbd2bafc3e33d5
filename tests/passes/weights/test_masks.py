"""Masks that look at inputs, on graphs of both kinds: what is chosen, what is made up, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.statistics import Gram, Mean, Square, Statistic, Statistics
from graphwright.ir.run.sweep import sweep
from graphwright.passes.weights.dsnot import group_of_mask, refined
from graphwright.passes.weights.low_rank import Whitening
from graphwright.passes.weights.mask_pass import ZEROS_ARE_STORED, Ratio
from graphwright.passes.weights.sparse_plus_low_rank import split
from graphwright.passes.weights.wanda import Wanda

from ..calibrated import many, optimize, rel

KINDS = ("fx", "onnx")
METHODS = ("wanda", "sparsegpt", "magnitude,dsnot")
Graphs = Callable[..., View]
Inputs = dict[str, torch.Tensor]
FOUR = Ratio(2, 4)


def inputs_of(features: int, count: int = 400, seed: int = 0) -> torch.Tensor:
    """Correlated inputs of unequal size with means of their own."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(features // 8, features, generator=rng) / features**0.5
    noise = 0.1 * torch.randn(count, features, generator=rng)
    x = torch.randn(count, features // 8, generator=rng) @ mix + noise + 0.1
    return x * torch.logspace(-0.3, 0.3, features)


def statistics_of(x: torch.Tensor, *kinds: type[Statistic]) -> Statistics:
    statistics = [kind() for kind in kinds]
    for statistic in statistics:
        statistic.see(x)
    return Statistics(statistics)


def random_weight(rows: int = 12, columns: int = 32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


# --- the formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"sparsity": 0.6}, {"pattern": "2:4"}])
def test_wanda_drops_the_lowest_scores_of_a_row(how: dict[str, Any]) -> None:
    x, weight = inputs_of(32), random_weight()
    masked = Wanda(**how).fit(weight, statistics_of(x, Square), "here").operands["weight"]
    assert masked is not None
    scores = weight.abs() * x.norm(dim=0)
    width = 4 if "pattern" in how else 32
    stays, scores = (masked != 0).reshape(-1, width), scores.reshape(-1, width)
    assert bool((stays.sum(1) == (2 if width == 4 else 13)).all())
    lost = torch.where(stays, 0.0, scores).amax(1)
    assert bool((lost < torch.where(stays, scores, torch.inf).amin(1)).all())
    assert torch.equal(masked[masked != 0], weight[masked != 0]), "what stays is as it was"


def test_wanda_over_the_whole_matrix() -> None:
    """The rows differ in size: the small ones lose more."""
    x, weight = inputs_of(32), random_weight() * torch.logspace(-1, 1, 12)[:, None]
    how = Wanda(sparsity=0.5, compare="matrix")
    masked = how.fit(weight, statistics_of(x, Square), "here").operands["weight"]
    assert masked is not None
    stays, scores = masked != 0, weight.abs() * x.norm(dim=0)
    assert int(stays.sum()) == 192 and int(stays[0].sum()) < 4 < 28 < int(stays[-1].sum())
    assert bool(scores[~stays].max() < scores[stays].min())
    with pytest.raises(BadInput, match="compare=matrix is for a share"):
        Wanda(compare="matrix")


def test_wanda_with_equal_inputs_is_magnitude_by_row() -> None:
    x, weight = torch.ones(5, 32), random_weight()
    masked = Wanda(pattern="2:4").fit(weight, statistics_of(x, Square), "").operands["weight"]
    expected = gw.passes.Magnitude().fit(weight, Statistics(), "").operands["weight"]
    assert masked is not None and expected is not None and torch.equal(masked, expected)


def test_sparsegpt_without_correlation_is_magnitude() -> None:
    """With ``S = I`` nothing can be made up for."""
    weight = random_weight()
    gram = Gram()
    gram.matrix, gram.count = torch.eye(32).double(), 32
    stored = gw.passes.SparseGPT(sparsity=0.5).fit(weight, Statistics([gram]), "")
    expected = gw.passes.Magnitude(sparsity=0.5).fit(weight, Statistics(), "")
    assert stored.operands["weight"] is not None and expected.operands["weight"] is not None
    assert torch.equal(stored.operands["weight"], expected.operands["weight"])


@pytest.mark.parametrize("columns", [32, 300])
@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_sparsegpt_makes_up_for_what_goes(how: dict[str, Any], columns: int) -> None:
    x, weight = inputs_of(columns, 2000), random_weight(12, columns)
    statistics = statistics_of(x, Gram, Square)
    errors = []
    for method in (gw.passes.SparseGPT, gw.passes.Wanda, gw.passes.Magnitude):
        stored = method(**how).fit(weight, statistics, "")
        masked = stored.operands["weight"]
        assert masked is not None and stored.sparsity == 0.5
        errors.append(float((x @ (weight - masked).T).norm() / (x @ weight.T).norm()))
    assert errors[0] < 0.8 * errors[1] and errors[1] < errors[2]


def test_sparsegpt_passes_on_as_obs_does() -> None:
    """One input of two goes: the other is the least squares of what is left."""
    x = inputs_of(8, 50)[:, :2].double()
    weight = torch.tensor([[0.1, 0.8], [0.9, -1.1], [0.2, 1.0]])
    stored = gw.passes.SparseGPT(pattern="1:2").fit(weight, statistics_of(x, Gram), "")
    masked = stored.operands["weight"]
    assert masked is not None
    for row, source in zip(masked, weight, strict=True):
        if row[0] == 0:
            best = torch.linalg.lstsq(x[:, 1:], (x @ source.double())[:, None]).solution
            assert float(row[1]) == pytest.approx(float(best), abs=0.02), "but for the damping"
    assert bool((masked[:, 0] == 0).any())


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_sparsegpt_of_inputs_that_span_nothing(bad: float) -> None:
    """All inputs equal, or all but one dead: damping decides, and the numbers are finite."""
    x = torch.full((6, 32), bad)
    x[:, 3] = 1
    stored = gw.passes.SparseGPT().fit(random_weight(), statistics_of(x, Gram), "")
    assert stored.operands["weight"] is not None
    assert bool(torch.isfinite(stored.operands["weight"]).all()) and stored.sparsity == 0.5
    assert stored.note == "fewer calibration tokens than inputs"


@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_dsnot_brings_the_expected_loss_of_each_row_down(pattern: str) -> None:
    x, source = inputs_of(32), random_weight(40)
    how = {"pattern": pattern} if pattern else {"sparsity": 0.5}
    masked = gw.passes.Magnitude(**how).fit(source, Statistics(), "").operands["weight"]
    assert masked is not None
    statistics = statistics_of(x, Mean, Square)
    mean = statistics[Mean].mean

    def refine(cycles: int, tolerance: float = 0.0) -> torch.Tensor:
        return refined(source, masked, mean, statistics[Square], cycles, tolerance)

    lost = [(source - pruned).double() @ mean for pruned in (masked, refine(1), refine(30))]
    assert bool((lost[1].abs() <= lost[0].abs()).all() and (lost[2].abs() <= lost[1].abs()).all())
    assert float(lost[2].norm()) < 0.3 * float(lost[0].norm())
    pruned = refine(30)
    assert torch.equal(pruned[pruned != 0], source[pruned != 0]), "weights never change"
    assert torch.equal((pruned == 0).sum(1), (masked == 0).sum(1)), "as many zeros in each row"
    if pattern:
        assert bool(((pruned == 0).reshape(-1, 4).sum(1) == 2).all())
    assert torch.equal(refine(30, tolerance=1e6), masked), "rows that lose little stay"


def test_the_pattern_of_a_mask_is_seen() -> None:
    weight = random_weight()
    for pattern, expected in (("2:4", FOUR), ("1:2", Ratio(1, 2)), ("3:8", Ratio(3, 8))):
        stored = gw.passes.Magnitude(pattern=pattern).fit(weight, Statistics(), "")
        assert stored.operands["weight"] is not None
        assert group_of_mask(stored.operands["weight"]) == expected
    share = gw.passes.Magnitude(sparsity=0.5).fit(weight, Statistics(), "").operands["weight"]
    assert share is not None and group_of_mask(share) is None
    assert group_of_mask(weight) is None


# --- on graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_masks_of_a_graph(
    method: str, kind: str, toy_graph: Graphs, toy_inputs: Inputs, no_reads: Any
) -> None:
    source = toy_graph(kind)
    expected = sweep(source, toy_inputs)
    with no_reads():
        planned = gw.plan(source, method).passes[-1][1]
    done = optimize(source, method, toy_inputs)
    result = done.report.passes[-1].result
    assert [(s.name, s.bytes_after) for s in planned.sites] == [
        (s.name, s.bytes_after) for s in result.sites
    ]
    assert {site.sparsity for site in result.sites} == {0.5}
    assert planned.notes[-1] == result.notes[-1] == ZEROS_ARE_STORED
    trivial = optimize(source, "magnitude", toy_inputs)
    error = rel(expected, sweep(done.graph, toy_inputs))
    assert 0.05 < error < 1.05 * rel(expected, sweep(trivial.graph, toy_inputs))
    behind = f"{method},quantize{{bits=4}},eora{{rank=40 factors=float32}}"
    whole = optimize(source, behind, toy_inputs)
    assert rel(expected, sweep(whole.graph, toy_inputs)) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_both_graphs_get_one_mask(method: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    outputs = [
        sweep(optimize(toy_graph(kind), method, toy_inputs).graph, toy_inputs) for kind in KINDS
    ]
    assert rel(*outputs) < 1e-5


def test_a_mask_sees_what_was_masked_before_it(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    """``down`` reads what masked ``gate`` and ``up`` give; by itself it is masked otherwise."""

    def down(recipe: str) -> torch.Tensor:
        graph = optimize(toy_graph("fx"), recipe, toy_inputs).graph
        (weight,) = (w.read() for name, w in graph.weights().items() if name == "down.weight")
        return weight

    assert not torch.equal(down("wanda"), down("wanda{include=[down]}"))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_rows_that_are_no_multiple(method: str, graph: View, toy_inputs: Inputs) -> None:
    step = optimize(graph, f"{method}{{pattern=8:16}}", toy_inputs).report.passes[0]
    assert step.result.refused == [("down", "its 40 inputs are no multiple of 16")]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("dsnot", "none before it masks weights: put one in front of it, such as wanda"),
        ("dsnot,wanda", "put it behind wanda"),
        ("wanda{include=[up]},dsnot{include=[down]}", "at its sites"),
        ("wanda,quantize,dsnot", "would both change the same sites, and dsnot has to come first"),
        ("magnitude,wanda", "would both mask the same sites"),
        ("wanda,sparsegpt", "would both mask the same sites"),
    ],
)  # fmt: skip
def test_orders_that_cannot_be(
    recipe: str, reason: str, graph: View, toy_inputs: Inputs
) -> None:
    with pytest.raises(BadInput, match=reason):
        optimize(graph, recipe, toy_inputs)


def test_dsnot_leaves_what_no_mask_has_touched(graph: View, toy_inputs: Inputs) -> None:
    recipe = "wanda{include=[up]},dsnot"
    planned = gw.plan(graph, recipe).passes[1][1]
    done = optimize(graph, recipe, toy_inputs).report.passes[1].result
    reason = "its weight is the source's own: there is no mask to refine"
    assert done.refused == planned.refused
    assert done.refused == [(name, reason) for name in ("gate", "down", "head")]
    assert done.sites[0].note.endswith("of 640 zeros moved")


@pytest.mark.parametrize("recipe", ["wanda", "sparsegpt", "magnitude,dsnot"])
def test_without_data(recipe: str, graph: View) -> None:
    with pytest.raises(BadInput, match="calibration"):
        gw.optimize(graph, recipe)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"cycles": 0}, "cycles=0 must be at least 1"),
     ({"tolerance": -1.0}, "tolerance=-1.0 must not be negative")],
)  # fmt: skip
def test_options_of_dsnot(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        gw.passes.DSnoT(**options)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_weights_that_are_not_finite(
    method: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    def spoil(toy: Any) -> None:
        toy.down.weight[1, 2] = torch.inf

    with pytest.raises(BadInput, match="NaN or infinite"):
        gw.optimize(toy_graph("fx", spoil), method, samples=[toy_inputs], calibration=many())


# --- with a low-rank path ------------------------------------------------------------------------

BOTH = "sparse-plus-low-rank{sparsity=0.6 rank=4}"


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_plus_low_rank(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs, no_reads: Any
) -> None:
    source = toy_graph(kind)
    with no_reads():
        planned = gw.plan(source, BOTH).passes[0][1]
    done = optimize(source, BOTH, toy_inputs)
    result = done.report.passes[0].result
    assert [(s.name, s.bytes_after) for s in planned.sites] == [
        (s.name, s.bytes_after) for s in result.sites
    ]
    assert all(s.sparsity == pytest.approx(0.6, abs=0.02) for s in result.sites)
    expected = sweep(source, toy_inputs)
    composed = optimize(source, "wanda{sparsity=0.6},eora{rank=4}", toy_inputs)
    error = rel(expected, sweep(done.graph, toy_inputs))
    assert error < rel(expected, sweep(composed.graph, toy_inputs))
    ran = gw.compile(done.graph, backend="onnxruntime")(**toy_inputs)
    assert rel(sweep(done.graph, toy_inputs), ran) < 1e-5
    small = optimize(source, f"{BOTH},quantize{{bits=8}}", toy_inputs)
    assert rel(expected, sweep(small.graph, toy_inputs)) < error + 0.03


@pytest.mark.parametrize(("ratio", "share"), [(FOUR, None), (None, 0.5)])
def test_each_round_is_kept_if_it_is_better(ratio: Ratio | None, share: float | None) -> None:
    x, weight = inputs_of(32), random_weight(24)
    statistics = statistics_of(x, Gram, Square)
    inputs, square = Whitening(statistics[Gram].matrix), statistics[Square]
    errors = []
    for rounds in (1, 2, 8):
        parts = split(weight, square, inputs, 4, rounds, ratio, share)
        composed = parts.sparse + parts.up @ parts.down
        error = float((x @ (weight - composed).T).norm() / (x @ weight.T).norm())
        assert parts.left == pytest.approx(error, rel=1e-3)
        assert float((parts.sparse == 0).float().mean()) == 0.5
        errors.append(error)
    assert errors[2] <= errors[1] <= errors[0] and errors[2] < 0.95 * errors[0]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("sparse-plus-low-rank{rank=0}", "rank=0 must be at least 1"),
        ("sparse-plus-low-rank{rounds=0}", "rounds=0 must be at least 1"),
        ("sparse-plus-low-rank,eora", "would both correct the same sites"),
        ("wanda,sparse-plus-low-rank", "would both mask the same sites"),
        ("sparse-plus-low-rank{pattern=8:16 include=[down]}", "40 inputs are no multiple of 16"),
    ],
)
def test_what_cannot_be_split(
    recipe: str, reason: str, graph: View, toy_inputs: Inputs
) -> None:
    with pytest.raises(BadInput, match=reason):
        optimize(graph, recipe, toy_inputs)
