"""SmoothQuant's migration on graphs of both kinds: its formula, its exactness, what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize

from ...models import llama, raised
from ..calibrated import optimize, rel
from .texts import Inputs, ids, on_model

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]


@pytest.fixture(scope="module")
def model() -> dict[str, View]:
    return raised(llama(layers=1))


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_come_closer_and_outputs_stay(kind: str, model: dict[str, View]) -> None:
    source = model[kind]
    result = on_model(source, "smooth{alpha=0.5}")
    (step,) = result.report.passes
    assert step.result.refused == [] and len(step.result.sites) == 8
    assert step.bytes_after == step.bytes_before
    assert {s.rel_l2 for s in step.result.sites} == {None}
    for difference in step.errors.values():
        assert difference.rel_l2 < 1e-5
    before, after = recognize(source), recognize(result.graph)
    for old, new in zip(before.linears, after.linears, strict=True):
        a, b = source.weight(old.weight), result.graph.weight(new.weight)
        assert a is not None and b is not None and not torch.equal(a.read(), b.read())


def test_the_formula() -> None:
    smooth = gw.passes.Smooth(alpha=0.75)
    inputs, weights = torch.tensor([[16.0, 1.0, 0.0, 5.0], [1.0, 16.0, 2.0, 0.0]]).double()
    assert smooth.factors(inputs, weights).tolist() == [8.0, 0.5, 1.0, 1.0]


def test_weights_of_16_bits_are_scaled_by_powers_of_two() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 6)).bfloat16()
    x = {"input": torch.randn(16, 8, dtype=torch.bfloat16)}
    view = trace(net, (), x)
    canonicalize(view)
    result = gw.optimize(view, "smooth", samples=[x], calibration=[x])
    (before,), (after,) = recognize(view).linears, recognize(result.graph).linears
    ratio = result.graph.weight(after.weight).read() / view.weight(before.weight).read()  # type: ignore
    assert set(ratio.log2().flatten().tolist()) <= set(range(-9, 10)) and ratio.max() > ratio.min()
    assert rel(sweep(view, x), sweep(result.graph, x)) == 0


@pytest.mark.parametrize("recipe", ["smooth,gptq{bits=2 group=16},eora{rank=64 factors=float32}",
                                    "magnitude,smooth,eora{rank=64 factors=float32}"])  # fmt: skip
def test_gaps_are_those_in_the_new_units(recipe: str, model: dict[str, View]) -> None:
    source = model["fx"]
    repaired = on_model(source, recipe).graph
    assert rel(sweep(source, ids(1)[0]), sweep(repaired, ids(1)[0])) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_divides_what_no_constant_makes(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    """Both linears that read the stream share it, in the graphs that weights are compared with
    too; a linear whose input a constant makes has none."""
    source = toy_graph(kind)
    refused = dict(optimize(source, "smooth", toy_inputs).report.passes[0].result.refused)
    assert {"gate", "up"} <= set(refused) and "reads its input too" in refused["gate"]
    result = optimize(source, "smooth{divide=true}", toy_inputs)
    (step,) = result.report.passes
    assert step.result.refused == []
    assert [s.name for s in step.result.sites] == ["gate", "up", "down", "head"]
    counts = [[v.op(n) for n in v.nodes()].count("mul") for v in (source, result.graph)]
    assert counts[1] - counts[0] == 2  # before gate and up, and before the head
    assert rel(sweep(source, toy_inputs), sweep(result.graph, toy_inputs)) < 1e-6
    recipe = "smooth{divide=true},magnitude,eora{rank=64 factors=float32}"
    repaired = optimize(source, recipe, toy_inputs).graph
    assert rel(sweep(source, toy_inputs), sweep(repaired, toy_inputs)) < 1e-4


# --- refusals ------------------------------------------------------------------------------------


def test_all_that_read_an_input_or_none(model: dict[str, View]) -> None:
    (step,) = on_model(model["fx"], "smooth{kinds=[q o]}").report.passes
    assert [s.kind for s in step.result.sites] == ["o"]
    ((site, reason),) = step.result.refused
    assert site.endswith("q_proj") and "k_proj reads the same input and is kept" in reason


def test_nothing_to_scale(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    with pytest.raises(BadInput, match="smooth found nothing to do"):
        optimize(toy_graph("fx"), "smooth{include=head}", toy_inputs)
    with pytest.raises(BadInput, match="down: the weight of down is not a floating-point"):
        optimize(toy_graph("fx"), "quantize,smooth{include=down}", toy_inputs)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(BadInput, match="must be between 0 and 1"):
        gw.passes.Smooth(alpha=alpha)
