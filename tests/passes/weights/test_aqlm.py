"""Additive codes: each step lowers the error, the search is exact, the artifact, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.statistics import Gram, Statistics
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.weights.additive import (
    Additive,
    fitted,
    improve_books,
    improve_codes,
    improve_scales,
    started,
)
from graphwright.passes.weights.aqlm import AQLM
from graphwright.passes.weights.feedback import Feedback, rounded_with_feedback
from graphwright.passes.weights.quantizers import rtn
from torch import Tensor

from ...models import translated
from ..calibrated import correlated, matrix, optimize, rel

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]
Inputs = dict[str, Tensor]
RECIPE = "aqlm{rounds=1 beam=2}"


def error(weight: Tensor, stored: Tensor, gram: Tensor) -> float:
    gap = (weight - stored).double()
    return float(((gap @ gram.double()) * gap).sum())


# --- the formula ---------------------------------------------------------------------------------


def test_no_step_raises_the_error() -> None:
    weight, x = matrix(40, 48), correlated(300, 48)
    metric = x.T @ x
    form = started(weight, books=3, entries=16)
    errors = [error(weight, form.dense(), metric)]
    for _ in range(3):
        improve_books(form, weight, metric)
        errors.append(error(weight, form.dense(), metric))
        improve_codes(form, weight, metric, beam=3)
        errors.append(error(weight, form.dense(), metric))
        improve_scales(form, weight, metric)
        errors.append(error(weight, form.dense(), metric))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]


def test_the_search_is_that_of_all_choices() -> None:
    """With a beam as wide as all pairs of codes, each group gets the best pair there is, the groups
    before it chosen already: tried one by one in float64."""
    weight, x = matrix(3, 16), correlated(100, 16)
    metric = (x.T @ x) / 100
    form = started(weight, books=2, entries=4)
    tried = Additive(form.codes.clone(), form.books, form.scales)
    improve_codes(form, weight, metric, beam=16)
    for group in range(2):
        for row in range(3):
            costs = {}
            for pair in [(a, b) for a in range(4) for b in range(4)]:
                tried.codes[:, row, group] = torch.tensor(pair)
                costs[pair] = error(weight[row], tried.dense()[row], metric)
            best = min(costs, key=costs.__getitem__)
            assert tuple(form.codes[:, row, group].tolist()) == best
            tried.codes[:, row, group] = torch.tensor(best)


def test_scales_and_codebooks_are_least_squares() -> None:
    weight, x = matrix(12, 16), correlated(100, 16)
    metric = (x.T @ x) / 100
    form = started(weight, books=1, entries=2)
    for _ in range(20):
        improve_books(form, weight, metric)
    improve_scales(form, weight, metric)
    improve_books(form, weight, metric)
    least = error(weight, form.dense(), metric)
    rng = torch.Generator().manual_seed(2)
    for _ in range(20):
        step = 1e-2 * torch.randn(form.books.shape, generator=rng)
        moved = Additive(form.codes, form.books + step, form.scales)
        assert error(weight, moved.dense(), metric) > least


def test_it_beats_feedback_at_equal_bits() -> None:
    """Its baseline: 2 bits with error feedback in groups of 64, 2.31 bits a weight; here 2.19."""
    weight, x = matrix(256, 256), correlated(1024, 256)
    gram = (x.T @ x).double()
    form = fitted(weight, gram, books=4, entries=16, beam=2, rounds=3)
    start = rtn(weight, 2, 64, symmetric=False)
    by = Feedback.of(gram, 0.01, act_order=True)
    base = rounded_with_feedback(weight, start, by)
    assert error(weight, form.dense(), gram) < 0.8 * error(weight, base.dequantized(), gram)
    bits = 8 * (2 * 256 * 32 + 4 * 16 * 8 * 2 + 2 * 256) / 256**2
    assert bits < 8 * base.nbytes / 256**2


def test_rows_of_zeros_and_odd_widths_are_kept() -> None:
    weight, gram = matrix(9, 45), Gram()
    weight[4] = 0
    gram.see(correlated(200, 45))
    stored = AQLM(rounds=2).fit(weight, Statistics([gram]), "here")
    out = stored.outputs(torch.eye(45), None)
    assert out.shape == (45, 9) and not bool(out[:, 4].any())
    assert stored.rel_l2 == pytest.approx(
        float(torch.linalg.norm(out.T - weight) / torch.linalg.norm(weight)), rel=1e-4
    )


# --- on graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sites_bytes_and_the_artifact(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs, no_reads: Any, tmp_path: Path
) -> None:
    graph = toy_graph(kind)
    with no_reads():
        planned = gw.plan(graph, RECIPE)
    result = optimize(graph, RECIPE, toy_inputs)
    (step,) = result.report.passes
    assert step.bytes_after == planned.artifact_bytes
    books, by_name = 4 * 16 * 8 * 2, {s.name: s for s in step.result.sites}
    assert by_name["up"].bytes_after == 2 * 40 * 4 + books + 2 * 40
    assert set(by_name) == {"gate", "up", "down", "head"}
    gw.export(result.graph, tmp_path / "out", report=result.report)
    again = gw.load(str(tmp_path / "out" / "model.onnx"))
    assert [x.name for x in recognize(again).linears if x.quantized] == [
        x.name for x in recognize(result.graph).linears
    ]
    assert {again.op(x.node) for x in recognize(again).linears} == {"linear_aqlm"}
    expected = sweep(result.graph, toy_inputs)
    for optimized in (True, False):
        run = gw.compile(tmp_path / "out", backend="onnxruntime", optimize=optimized)
        outputs = {name: torch.as_tensor(x) for name, x in run(**toy_inputs).items()}
        assert rel(expected, outputs) < 1e-5
    assert rel(expected, sweep(again, toy_inputs)) < 1e-5


def test_both_kinds_give_the_same_and_a_path_behind_it_helps(
    toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    source = toy_graph("fx")
    expected = sweep(source, toy_inputs)
    fx, onnx = (optimize(toy_graph(kind), RECIPE, toy_inputs).graph for kind in KINDS)
    assert rel(sweep(fx, toy_inputs), sweep(onnx, toy_inputs)) < 1e-4
    repaired = optimize(source, f"{RECIPE},eora{{rank=8}}", toy_inputs).graph
    plain = rel(expected, sweep(fx, toy_inputs))
    assert rel(expected, sweep(repaired, toy_inputs)) < 0.8 * plain


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [("bits=0", "bits=0 must be 1 to 4"), ("bits=5", "bits=5 must be 1 to 4"),
     ("vectors=32", "vectors=32 must be 16 or 256"), ("beam=0", "beam=0 must be 1 to 16"),
     ("rounds=-1", "rounds=-1 must not be negative")],
)  # fmt: skip
def test_options_out_of_range(options: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        gw.Recipe.parse(f"aqlm{{{options}}}")


def test_weights_that_are_not_finite_and_stored_ones(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    graph = toy_graph("fx", lambda toy: toy.down.weight[3, 4].fill_(torch.inf))
    with pytest.raises(BadInput, match=r"^down: 1 of 1280 weights are NaN or infinite"):
        optimize(graph, RECIPE, toy_inputs)
    twice = "quantize{include=up},aqlm{rounds=0 beam=1}"
    (refused,) = optimize(toy_graph("fx"), twice, toy_inputs).report.passes[1].result.refused
    assert refused == ("up", "its weight is quantized already, to 4 bits")
    with pytest.raises(BadInput, match="aqlm needs calibration data"):
        gw.optimize(toy_graph("fx"), "aqlm", samples=[toy_inputs])


def test_other_sums_of_picked_rows_are_no_such_linears() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(32, 8))

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return x @ self.table[ids].sum(0).flatten(1).T

    inputs = {"x": torch.ones(3, 16), "ids": torch.ones(2, 5, 2, dtype=torch.int64)}
    view = translated(gw.trace(Module(), (), inputs))
    canonicalize(view)
    ops = [view.op(node) for node in view.nodes()]
    assert "matmul" in ops and "linear_aqlm" not in ops
