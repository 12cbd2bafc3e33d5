"""8-bit weights and activations: the form, what smoothing does for it, the artifact, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import onnx_ir
import onnxruntime
import pytest
import torch
from graphwright.backends.onnx.lowering import lowered
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.statistics import Gram, Range, Statistics
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import rounds_activations
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.stored import Stored
from graphwright.passes.weights.w8a8 import W8A8, fixed_range
from torch import Tensor

from ..calibrated import correlated, matrix, optimize, rel

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]
Inputs = dict[str, Tensor]


@pytest.mark.parametrize("kind", KINDS)
def test_sites_bytes_and_outputs(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs, no_reads: Any
) -> None:
    graph = toy_graph(kind)
    with no_reads():
        planned = gw.plan(graph, "w8a8")
    result = optimize(graph, "w8a8", toy_inputs)
    (step,) = result.report.passes
    assert step.bytes_after == planned.artifact_bytes
    sizes = {site.name: site.bytes_after for site in step.result.sites}
    assert sizes == {"gate": 40 * 36, "up": 40 * 36, "down": 32 * 44, "head": 17 * 36}
    assert all(0 < (site.rel_l2 or 0) < 0.01 for site in step.result.sites)
    assert 1e-4 < rel(sweep(graph, toy_inputs), sweep(result.graph, toy_inputs)) < 0.02
    assert rounds_activations(result.graph) and not rounds_activations(graph)
    assert {result.graph.op(x.node) for x in recognize(result.graph).linears} == {"linear_w8a8"}


def test_the_formula() -> None:
    weight = torch.tensor([[1.27, -0.64, 0.0], [0.0, 0.0, 0.0], [-2.54, 1.0, 0.01]])
    stored = W8A8().fit(weight, Statistics(), "here")
    codes, scales = stored.operands.values()
    assert codes is not None and codes.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 50, 0]]
    assert scales is not None and scales[[0, 2]].tolist() == pytest.approx([0.01, 0.02])
    # A token's activations are rounded by its own range: to 127 and -64 steps of 2 / 127.
    out = stored.outputs(torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.0, 0.0]]), None)
    step = 2 / 127
    assert out[0, 0] == pytest.approx((127 * 127 + 64 * 64) * step * 0.01, rel=1e-5)
    assert out[1].tolist() == [0, 0, 0]


def test_tokens_do_not_depend_on_each_other(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    quantized = optimize(toy_graph("fx"), "w8a8", toy_inputs).graph
    (whole,) = sweep(quantized, toy_inputs).values()
    (first,) = sweep(quantized, {"ids": toy_inputs["ids"][:1]}).values()
    assert torch.allclose(whole[:1], first, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_helps_where_features_are_large(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    def spread(toy: Any) -> None:
        toy.up.weight[::10] *= 60
        toy.down.weight[:, ::10] /= 60

    source = toy_graph(kind, spread)
    expected = sweep(source, toy_inputs)
    plain, smoothed = (
        rel(expected, sweep(optimize(source, recipe, toy_inputs).graph, toy_inputs))
        for recipe in ("w8a8{include=down}", "smooth{include=down},w8a8{include=down}")
    )
    assert smoothed < 0.5 * plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_behind_it(kind: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    source = toy_graph(kind)
    recipe = "w8a8,eora{rank=2}"
    step = optimize(source, recipe, toy_inputs).report.passes[1]
    assert len(step.result.sites) == 4


def test_a_token_of_one_sign_has_twice_the_codes() -> None:
    """Its least and its greatest number are the ends of its range, or 0."""
    stored = W8A8(symmetric=False).fit(torch.eye(4), Statistics(), "here")
    x = torch.tensor([[2.55, 1.273, 0.004, 0.0], [-1.0, 1.55, 0.006, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[2.55, 1.27, 0.0, 0.0], [-1.0, 1.55, 0.01, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(stored.outputs(x, None), expected)
    gelu = torch.nn.functional.gelu(correlated(64, 32))
    weight = matrix(16, 32)
    errors = [
        torch.dist(W8A8(symmetric=around).fit(weight, Statistics(), "").outputs(gelu, None),
                   gelu @ weight.T)
        for around in (True, False)
    ]  # fmt: skip
    assert errors[1] < 0.75 * errors[0]


def test_feedback_rounds_weights_for_the_data() -> None:
    """Outputs are nearer to the source's than by nearest codes, in the same ranges."""
    x, weight, gram = correlated(256, 48), matrix(24, 48), Gram()
    gram.see(x)
    nearest = W8A8().fit(weight, Statistics(), "here")
    stored = W8A8(feedback=True).fit(weight, Statistics([gram]), "here")
    (codes, scales), (_, same) = stored.operands.values(), nearest.operands.values()
    assert codes is not None and codes.dtype == torch.int8 and scales is not None
    assert torch.equal(scales, same)  # type: ignore[arg-type]

    def error(form: Stored) -> float:
        codes, scales = form.operands.values()
        assert codes is not None and scales is not None
        return float(torch.dist(x @ (codes.float() * scales.unsqueeze(1)).T, x @ weight.T))

    assert error(stored) < 0.8 * error(nearest)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_the_artifact_is_read_back(
    target: str, symmetric: bool, toy_inputs: Inputs, toy_graph: Graphs, tmp_path: Path
) -> None:
    """ONNX Runtime gives what the reference gives; the file's linears are linears again."""
    recipe = f"w8a8{{symmetric={str(symmetric).lower()}}}"
    result = optimize(toy_graph("fx"), recipe, toy_inputs)
    out = gw.export(result.graph, tmp_path / "out", report=result.report, target=target)
    again = gw.load(str(out / "model.onnx"))
    before, after = (recognize(view) for view in (result.graph, again))
    assert [x.name for x in after.linears if x.quantized] == [x.name for x in before.linears]
    assert {again.attrs(x.node)["symmetric"] for x in after.linears} == {symmetric}
    run = gw.compile(out, backend="onnxruntime")
    outputs = {name: torch.as_tensor(x) for name, x in run(**toy_inputs).items()}
    assert rel(sweep(result.graph, toy_inputs), outputs) < 1e-5
    assert rel(outputs, sweep(again, toy_inputs)) < 1e-5


def test_a_bias_is_one_node_with_the_gelu_behind_it(tmp_path: Path) -> None:
    """In ONNX Runtime, which is told the shape of what it stands behind; a bias when read back."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU())
    view = gw.trace(module, (torch.randn(2, 5, 16),))
    done = gw.optimize(view, "w8a8{min_size=1}").graph
    model = lowered(done)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    proto = onnx_ir.serde.serialize_model(model.model).SerializeToString()
    onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    optimized = onnx_ir.load(tmp_path / "optimized.onnx")
    kinds = {node.op_type for node in optimized.graph}
    assert "BiasGelu" in kinds and "Add" not in kinds
    canonicalize(model)
    (linear,) = (n for n in model.nodes() if model.op(n) == "linear_w8a8")
    assert model.type(model.tensor(linear, 3)).shape == (24,)
    assert sum(model.op(n) == "add" for n in model.nodes()) == 0


def test_a_half_bias_is_read_back() -> None:
    x = torch.randn(2, 5, 16).half()
    done = gw.optimize(gw.trace(torch.nn.Linear(16, 24).half(), (x,)), "w8a8{min_size=1}").graph
    model = lowered(done)
    canonicalize(model)
    (linear,) = (n for n in model.nodes() if model.op(n) == "linear_w8a8")
    assert model.type(model.tensor(linear, 3)).shape == (24,)
    (name,) = done.input_names()
    assert rel(sweep(done, {name: x}), sweep(model, {name: x})) < 1e-3


# --- a fixed range -------------------------------------------------------------------------------


def test_a_fixed_range_rounds_the_data_best() -> None:
    """No share of the span does better, tried one by one; what all tokens span is kept unless it
    pays to cut it off."""
    rng = torch.Generator().manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(64, 32, generator=rng))
    x[0, 0] = 40.0
    span = Range()
    span.see(x)
    assert (span.low, span.high) == (float(x.min()), 40.0)
    step, zero = fixed_range(span, x)

    def loss(step: float, zero: int) -> float:
        codes = ((x / step).round() + zero).clamp(0, 255)
        return float(((codes - zero) * step - x).square().sum())

    whole = (span.high - span.low) / 255
    assert loss(step, zero) <= min(
        loss(whole * f, max(0, round(-span.low / whole))) for f in (1.0, 0.9, 0.8, 0.5, 0.2)
    )
    assert step == pytest.approx(whole), "one entry of 40 costs more than the rest's rounding"
    x[0, 0] = 3.0
    span = Range()
    span.see(x)
    step, zero = fixed_range(span, x)
    assert zero == round(float(-x.min() * 255 / (x.max() - x.min()))) and step < 0.0168
    assert fixed_range(Range(), torch.zeros(3, 4))[1] == 0, "no input at all: any step will do"


@pytest.mark.parametrize("kind", KINDS)
def test_activations_in_a_fixed_range(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs, tmp_path: Path
) -> None:
    """Linears of one input share its step; the portable file holds standard ops alone, and both
    files are read back."""
    source = toy_graph(kind)
    planned = gw.plan(source, "w8a8{activations=static}")
    result = optimize(source, "w8a8{activations=static}", toy_inputs)
    (step,) = result.report.passes
    assert step.bytes_after == planned.artifact_bytes
    graph, expected = result.graph, sweep(result.graph, toy_inputs)
    by_name = {x.name: graph.attrs(x.node) for x in recognize(graph).linears}
    assert by_name["gate"]["step"] == by_name["up"]["step"] != by_name["down"]["step"]
    assert 1e-4 < rel(sweep(source, toy_inputs), expected) < 0.05
    assert rounds_activations(graph)
    for target, domains in (("portable", {""}), ("cpu", {"", "com.microsoft"})):
        out = gw.export(graph, tmp_path / target, target=target)
        model = onnx_ir.load(out / "model.onnx")
        assert {node.domain for node in model.graph} == domains
        assert (target == "portable") == any(n.op_type == "DequantizeLinear" for n in model.graph)
        run = gw.compile(out, backend="onnxruntime")
        outputs = {name: torch.as_tensor(x) for name, x in run(**toy_inputs).items()}
        assert rel(expected, outputs) < 1e-5
        again = gw.load(str(out / "model.onnx"))
        read = {x.name: again.attrs(x.node) for x in recognize(again).linears}
        assert read == by_name
        assert rel(expected, sweep(again, toy_inputs)) < 1e-5


def test_refusals(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    graph = toy_graph("fx", lambda toy: toy.down.weight[3, 4].fill_(torch.inf))
    with pytest.raises(BadInput, match=r"^down: 1 of 1280 weights are NaN or infinite"):
        optimize(graph, "w8a8", toy_inputs)
    with pytest.raises(BadInput, match="w8a8 needs calibration data: give --calib DATA"):
        gw.optimize(toy_graph("fx"), "w8a8{activations=static}", samples=[toy_inputs])
    with pytest.raises(BadInput, match="a fixed range has a zero point"):
        W8A8(activations="static", symmetric=False)
    twice = "w8a8{include=up},quantize"
    (refused,) = optimize(toy_graph("fx"), twice, toy_inputs).report.passes[1].result.refused
    assert refused == ("up", "its weight is quantized already")
