"""AWQ on graphs of both kinds: its factors, folding and clipping, and what fits behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.view import View
from graphwright.ir.run.statistics import AbsMean, Statistics, Tokens
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import compare
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.weights.awq import AWQ, EXPONENTS
from graphwright.passes.weights.quantizers import rtn
from torch import Tensor

from ..calibrated import many, optimize, rel
from .conftest import Model
from .texts import Inputs, ids, on_model

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]


def spread(toy: Any) -> None:
    """Few features of ``down``'s input are large: those that ``up`` makes."""
    toy.up.weight[::10] *= 12
    toy.down.weight *= 0.5


def data_error(source: View, changed: View) -> float:
    pairs = [compare(sweep(source, batch), sweep(changed, batch)) for batch in many()]
    return sum(result.rel_l2 for pair in pairs for result in pair.values())


@pytest.fixture(scope="module")
def model(llama: Model) -> dict[str, View]:
    return llama[1]


# --- awq -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_factors_and_clipping_it_is_rounding(
    symmetric: bool, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    options = f"bits=3 group=16 symmetric={str(symmetric).lower()}"
    plain = optimize(toy_graph("fx"), f"quantize{{{options}}}", toy_inputs)
    same = optimize(toy_graph("fx"), f"awq{{{options} scale=false clip=false}}", toy_inputs)
    pairs = zip(*(r.report.passes[0].result.sites for r in (plain, same)), strict=True)
    for before, after in pairs:
        assert (before.name, before.bytes_after) == (after.name, after.bytes_after)
        assert before.rel_l2 == pytest.approx(after.rel_l2, rel=1e-6)
    assert rel(sweep(plain.graph, toy_inputs), sweep(same.graph, toy_inputs)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_active_features_get_finer_units(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    source = toy_graph(kind, spread)
    form = "bits=3 group=16 symmetric=false include=down"
    plain, scaled, clipped = (
        data_error(source, optimize(source, recipe, toy_inputs).graph)
        for recipe in (f"quantize{{{form}}}", f"awq{{{form} clip=false}}", f"awq{{{form}}}")
    )
    assert clipped < scaled < 0.95 * plain


def test_the_factors_are_the_best_of_the_grid(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    """By hand, for ``down``: the exponent that the pass finds has the least error on the tokens."""
    source = toy_graph("fx", spread)
    learned: list[Statistics] = []
    whole = AWQ._factors

    def noting(self: AWQ, context: Any, inlet: Any, statistics: Statistics) -> Tensor:
        learned.append(statistics)
        returned.append(whole(self, context, inlet, statistics))
        return returned[-1]

    returned: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AWQ, "_factors", noting)
        optimize(source, "awq{bits=3 group=16 include=down}", toy_inputs)
    (statistics,), (factors,) = learned, returned
    x, mean = statistics[Tokens].rows, statistics[AbsMean].mean
    assert torch.allclose(mean, torch.cat([statistics[Tokens].rows]).abs().double().mean(0))
    (linear,) = (s for s in recognize(source).linears if s.name == "down")
    weight = source.weight(linear.weight).read()  # type: ignore[union-attr]
    losses = {}
    for a in EXPONENTS:
        s = mean**a
        s = (s / (s.max() * s.min()).sqrt()).float()
        w = rtn(weight * s, 3, 16, symmetric=False).dequantized() / s
        losses[a] = float((x @ (w - weight).T).square().sum())
    best = min(losses, key=lambda a: losses[a])
    assert best > 0 and losses[best] < 0.9 * losses[0.0]
    s = mean**best
    assert torch.allclose(factors, s / (s.max() * s.min()).sqrt(), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_decoder(kind: str, model: dict[str, View], no_reads: Any) -> None:
    source, recipe = model[kind], "awq{bits=4 group=16}"
    with no_reads():
        planned = gw.plan(source, recipe)
    step = on_model(source, recipe).report.passes[0]
    assert step.bytes_after == planned.artifact_bytes
    assert [s.name for s in planned.passes[0][1].sites] == [s.name for s in step.result.sites]
    assert {s.note for s in step.result.sites} == {""}, "every input of it can be scaled"


def test_what_cannot_be_scaled_is_said(graph: View, toy_inputs: Inputs) -> None:
    step = optimize(graph, "awq{bits=3 group=16}", toy_inputs).report.passes[0].result
    notes = {site.name: site.note for site in step.sites}
    assert notes["down"] == ""
    assert notes["head"].startswith("not scaled: add")
    assert notes["gate"].startswith("not scaled: add") and notes["gate"] == notes["up"]


@pytest.mark.parametrize(("kind", "propagate"), [("fx", "compensated"), ("onnx", "dense")])
def test_eora_compensates_in_the_new_units(
    kind: str, propagate: str, model: dict[str, View]
) -> None:
    source, alone = model[kind], "smooth,awq{bits=2 group=16}"
    expected = [sweep(source, batch) for batch in ids(1)]
    eora = f"eora{{rank=6 propagate={propagate}}}"
    errors = [
        rel(expected[0], sweep(on_model(source, recipe).graph, ids(1)[0]))
        for recipe in (alone, f"{alone},{eora}", f"{alone},eora{{rank=64 factors=float32}}")
    ]
    assert errors[2] < 1e-4 < errors[1] < 0.85 * errors[0]
