"""GPTQ: the textbook's codes, its error on the data, the stored form, refusals; on both kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.statistics import Gram, Statistics
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import compare
from graphwright.passes.weights.feedback import Feedback, rounded_with_feedback
from graphwright.passes.weights.gptq import GPTQ
from graphwright.passes.weights.quantizers import rtn
from torch import Tensor

from ..calibrated import correlated, many, matrix, optimize, rel

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]
Inputs = dict[str, Tensor]
FORMATS = [(4, 32, True), (3, 0, True), (2, 16, False), (8, 64, False)]


def output_error(weight: Tensor, stored: Tensor, x: Tensor) -> float:
    return float(torch.linalg.norm(x @ (weight - stored).T) / torch.linalg.norm(x @ weight.T))


# --- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
def test_it_is_least_squares_column_by_column(act_order: bool) -> None:
    """Each column is rounded; all that are left are moved to where, in float64, they make up best
    for what is fixed: the solution of the normal equations, found anew for each column."""
    weight, x = matrix(5, 150), correlated(400, 150)
    gram = (x.T @ x).double()
    start = rtn(weight, 3, 32)
    by = Feedback.of(gram, 0.01, act_order)
    dense = rounded_with_feedback(weight, start, by).dequantized()

    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(150, dtype=torch.float64)
    order = gram.diagonal().argsort(descending=True) if act_order else torch.arange(150)
    assert torch.equal(by.order, order)
    moved = weight.double().clone()
    for place, column in enumerate(order):
        rest = order[place + 1 :]
        code = (moved[:, column] / start.scales[:, column // 32].double() + 4).round().clamp(0, 7)
        value = (code - 4) * start.scales[:, column // 32].double()
        assert torch.allclose(dense[:, column].double(), value), f"column {column}"
        moved[:, column] = value
        if len(rest):
            gap = (weight.double() - moved)[:, order[: place + 1]]
            cross = damped[order[: place + 1]][:, rest]
            answer = torch.linalg.solve(damped[rest][:, rest], (gap @ cross).T).T
            moved[:, rest] = weight.double()[:, rest] + answer


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
def test_inputs_that_do_not_correlate_are_rounded_to_nearest(
    bits: int, group: int, symmetric: bool
) -> None:
    weight = matrix(6, 72)
    start = rtn(weight, bits, group, symmetric)
    for scale in (torch.ones(72), torch.logspace(-3, 3, 72)):
        by = Feedback.of(torch.diag(scale.double()), 0.01, act_order=True)
        quantized = rounded_with_feedback(weight, start, by)
        for operand, expected in zip(quantized.operands(), start.operands(), strict=True):
            assert operand is expected or torch.equal(operand, expected)
        assert quantized.rel_l2 == pytest.approx(start.rel_l2, rel=1e-5)


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
def test_the_outputs_are_nearer_and_the_form_is_that_of_rounding(
    bits: int, group: int, symmetric: bool, act_order: bool
) -> None:
    weight, x = matrix(600, 150), correlated(900, 150)
    start = rtn(weight, bits, group, symmetric)
    by = Feedback.of((x.T @ x).double(), 0.01, act_order)
    quantized = rounded_with_feedback(weight, start, by)
    plain = output_error(weight, start.dequantized(), x)
    assert output_error(weight, quantized.dequantized(), x) < 0.8 * plain
    assert quantized.rel_l2 > start.rel_l2
    assert quantized.nbytes == start.nbytes and torch.equal(quantized.scales, start.scales)


# --- Gram matrices that are hard -----------------------------------------------------------------


def test_an_input_that_is_always_zero_is_rounded_to_nearest() -> None:
    weight, x = matrix(8, 40), correlated(200, 40)
    x[:, [3, 17]] = 0
    start = rtn(weight, 4, 16)
    for damping in (0.0, 0.01):
        by = Feedback.of((x.T @ x).double(), damping, act_order=True)
        assert by.damping == damping
        dense = rounded_with_feedback(weight, start, by).dequantized()
        assert torch.equal(dense[:, [3, 17]], start.dequantized()[:, [3, 17]])
        assert output_error(weight, dense, x) < output_error(weight, start.dequantized(), x)


def test_damping_is_raised_where_there_are_fewer_tokens_than_inputs() -> None:
    weight, gram = matrix(8, 40), Gram()
    gram.see(correlated(5, 40))
    stored = GPTQ(damp=0.0, group=16).fit(weight, Statistics([gram]), "here")
    assert stored.note == "5 calibration tokens for 40 inputs; damping raised to 0.001"
    plain = GPTQ(group=16).fit(weight, Statistics([gram]), "here")
    assert plain.note == "5 calibration tokens for 40 inputs"


def test_a_matrix_that_is_not_finite() -> None:
    gram = torch.full((4, 4), torch.nan, dtype=torch.float64)
    with pytest.raises(BadInput, match="not positive definite, whatever is added"):
        Feedback.of(gram, 0.01, act_order=False)


# --- on graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    ["bits=3 group=16", "bits=2 group=0 symmetric=false mse=true",
     "bits=4 group=32 act_order=false propagate=dense"],
)  # fmt: skip
def test_both_kinds_give_the_same_and_beat_rounding(
    options: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    results = [optimize(toy_graph(kind), f"gptq{{{options}}}", toy_inputs) for kind in KINDS]
    fx, onnx = (result.report.passes[0].result.sites for result in results)
    for site, other in zip(fx, onnx, strict=True):
        assert (site.name, site.bytes_after) == (other.name, other.bytes_after)
        assert site.rel_l2 == pytest.approx(other.rel_l2, rel=1e-3)
    assert rel(*(sweep(result.graph, toy_inputs) for result in results)) < 1e-4

    form = " ".join(o for o in options.split() if o.split("=")[0] in ("bits", "group", "symmetric"))
    plain = optimize(toy_graph("fx"), f"quantize{{{form}}}", toy_inputs).graph
    source = toy_graph("fx")

    def error(view: View) -> float:
        pairs = [compare(sweep(source, batch), sweep(view, batch)) for batch in many()]
        return sum(difference.rel_l2 for pair in pairs for difference in pair.values())

    assert error(results[0].graph) < 0.9 * error(plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_plan_reads_nothing_and_predicts_the_bytes(
    kind: str, bits: int, toy_graph: Graphs, toy_inputs: Inputs, no_reads: Any
) -> None:
    graph, recipe = toy_graph(kind), f"gptq{{bits={bits} group=16 symmetric=false}}"
    with no_reads():
        planned = gw.plan(graph, recipe)
    (step,) = optimize(graph, recipe, toy_inputs).report.passes
    assert step.bytes_after == planned.artifact_bytes
    forecast = planned.passes[0][1].sites
    assert [s.bytes_after for s in forecast] == [s.bytes_after for s in step.result.sites]


@pytest.mark.parametrize("kind", KINDS)
def test_eora_compensates_what_is_left(kind: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    source = toy_graph(kind)
    expected = sweep(source, toy_inputs)
    alone, with_path, whole = (
        rel(expected, sweep(optimize(source, f"gptq{{bits=2 group=16}}{more}", toy_inputs).graph,
                            toy_inputs))
        for more in ("", ",eora{rank=8}", ",eora{rank=40 factors=float32}")
    )  # fmt: skip
    assert whole < 1e-4 < with_path < 0.8 * alone


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damp", [-0.1, 1.5, float("nan")])
def test_damping_out_of_range(damp: float) -> None:
    with pytest.raises(BadInput, match="is a share of the mean of the Gram matrix's diagonal"):
        gw.passes.GPTQ(damp=damp)


def test_what_it_needs(graph: View, toy_inputs: Inputs) -> None:
    with pytest.raises(BadInput, match="gptq needs calibration data"):
        gw.optimize(graph, "gptq", samples=[toy_inputs])
    with pytest.raises(BadInput, match="would both store the same sites anew"):
        gw.Recipe.parse("gptq,quantize")


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_tied_is_kept(kind: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    def tie(toy: Any) -> None:
        toy.head.weight = toy.embed.weight

    step = optimize(toy_graph(kind, tie), "gptq{group=16}", toy_inputs).report.passes[0]
    ((site, reason),) = step.result.refused
    assert site == "head" and reason.startswith("its weight is tied to an embedding")


def test_weights_that_are_not_finite(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    graph = toy_graph("fx", lambda toy: toy.down.weight[3, 4].fill_(torch.nan))
    with pytest.raises(BadInput, match=r"^down: 1 of 1280 weights are NaN"):
        optimize(graph, "gptq{group=16}", toy_inputs)
