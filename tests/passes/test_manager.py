"""The manager: what it checks, what it rolls back, what it reports; the public face in Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput, BoundExceeded, InvalidGraph, Missing
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.moves import graft, swap
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure, compare
from graphwright.ir.structure.recognize import recognize
from graphwright.passes import Context, Needs, Pass, PassResult, registry

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiply the weight of ``site`` by ``factor``; says that it is exact."""

    name: ClassVar[str] = "scale"
    exact: ClassVar[bool] = True
    site: str = "up"
    factor: float = 1.0

    def run(self, context: Context) -> PassResult:
        (linear,) = (x for x in context.structure.linears if x.name == self.site)
        weight = context.view.weight(linear.weight)
        assert weight is not None
        scaled = MemoryWeight(weight.read() * self.factor)
        context.view.set_weight(linear.weight, scaled)
        return PassResult(edits=1)

    def plan(self, context: Context) -> PassResult:
        return PassResult(edits=1)


class LossyScale(Scale):
    name: ClassVar[str] = "lossy-scale"
    exact: ClassVar[bool] = False


def outputs_of(graph: View, inputs: Inputs) -> torch.Tensor:
    (output,) = sweep(graph, inputs).values()
    return output


# --- checks and rollback ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_pass_that_lies_is_caught(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    graph = toy_graph(kind)
    with pytest.raises(BoundExceeded, match=r"^scale is exact but moved .* Rolled back"):
        gw.optimize(graph, Scale(factor=1.01), samples=[toy_inputs])
    result = gw.optimize(graph, Scale(factor=1.0), samples=[toy_inputs])
    (difference,) = compare(sweep(graph, toy_inputs), sweep(result.graph, toy_inputs)).values()
    assert difference.rel_l2 < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_fails_leaves_the_graph_as_it_was(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    graph = toy_graph(kind)
    nodes, before = list(graph.nodes()), outputs_of(graph, toy_inputs)
    with pytest.raises(BoundExceeded):
        gw.optimize(graph, [LossyScale(factor=1.5), Scale(factor=1.5)], samples=[toy_inputs])
    check_structure(graph)
    assert list(graph.nodes()) == nodes
    assert torch.equal(outputs_of(graph, toy_inputs), before)


class Silent(Scale):
    """Edits as ``scale`` does, and tells of neither sites nor edits."""

    name: ClassVar[str] = "silent"

    def run(self, context: Context) -> PassResult:
        super().run(context)
        return PassResult()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_tells_nothing_of_its_edits_is_caught(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    with pytest.raises(BoundExceeded, match=r"^silent is exact but moved "):
        gw.optimize(toy_graph(kind), Silent(factor=1.01, optional=True), samples=[toy_inputs])


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_run_once_a_change(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counting(view: View, batch: Inputs) -> dict[str, torch.Tensor]:
        calls.append(1)
        return sweep(view, batch)

    monkeypatch.setattr("graphwright.passes.checked_run.sweep", counting)
    recipe = "clean{optional=true},quantize{bits=8},clean{optional=true}"
    result = gw.optimize(toy_graph(kind), recipe, samples=[toy_inputs])
    changed = sum(step.result.changed for step in result.report.passes)
    assert len(calls) == 1 + changed < 4
    unchanged = [step for step in result.report.passes if not step.result.changed]
    assert all(step.error is not None and step.error.rel_l2 == 0.0 for step in unchanged)
    (outputs,), (again,) = result.outputs, [sweep(result.graph, toy_inputs)]
    assert outputs.keys() == again.keys()
    assert all(torch.equal(outputs[name], again[name]) for name in outputs)


def test_a_bound_names_the_pass_the_site_and_what_to_try(
    graph: View, toy_inputs: Inputs
) -> None:
    with pytest.raises(BoundExceeded) as own:
        gw.optimize(graph, "quantize{bits=2 max_error=1e-6}", samples=[toy_inputs])
    assert str(own.value).startswith("quantize passed its bound: moved the output ")
    assert "bound 1e-06" in str(own.value) and "Try more bits" in str(own.value)
    assert re.search(r"Worst site: (gate|up|down|head) \(weight error 0\.\d+\)", str(own.value))
    with pytest.raises(BoundExceeded, match=r"after quantize the output .* from the source"):
        gw.optimize(graph, "quantize{bits=2}", max_error=1e-6, samples=[toy_inputs])
    assert gw.optimize(graph, "quantize{bits=8}", max_error=0.1, samples=[toy_inputs])


def test_the_bound_of_a_run_is_on_the_sum_of_its_passes(graph: View, toy_inputs: Inputs) -> None:
    each, both = LossyScale(factor=1.1), [LossyScale(factor=1.1), LossyScale(factor=1.1)]
    (single,) = gw.optimize(graph, each, samples=[toy_inputs]).report.errors.values()
    bound = 1.5 * single.rel_l2
    assert gw.optimize(graph, each, max_error=bound, samples=[toy_inputs])
    with pytest.raises(BoundExceeded, match="after lossy-scale"):
        gw.optimize(graph, both, max_error=bound, samples=[toy_inputs])


def test_outputs_that_turn_into_nan_are_never_passed(graph: View, toy_inputs: Inputs) -> None:
    with pytest.raises(BoundExceeded, match=r"^lossy-scale made the output .* non-finite"):
        gw.optimize(graph, LossyScale(factor=float("nan")), samples=[toy_inputs])


def test_every_batch_of_samples_counts(graph: View) -> None:
    """The scaled row of the table is read by the second batch alone."""

    @dataclass(frozen=True, kw_only=True)
    class ScaleRow(Scale):
        def run(self, context: Context) -> PassResult:
            (table,) = (n for n in context.view.nodes() if context.view.op(n) == "embedding")
            value = next(v for v in context.view.operands(table) if context.view.weight(v))
            weight = context.view.weight(value)
            assert weight is not None
            changed = weight.read().clone()
            changed[16] *= 2
            context.view.set_weight(value, MemoryWeight(changed))
            return PassResult(edits=1)

    batches = [{"ids": torch.full((2, 3), row)} for row in (1, 16)]
    assert gw.optimize(graph, ScaleRow(), samples=batches[:1])
    with pytest.raises(BoundExceeded, match="scale is exact but moved"):
        gw.optimize(graph, ScaleRow(), samples=batches)


def test_a_pass_that_breaks_the_graph_is_caught(graph: View, toy_inputs: Inputs) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cut(Scale):
        def run(self, context: Context) -> PassResult:
            view = context.view
            (linear,) = (x for x in context.structure.linears if x.name == "head")
            view.replace(linear.out, linear.x)
            return PassResult(edits=1)

    with pytest.raises(InvalidGraph, match=r"changed its shape from \[3, 5, 17\] to \[3, 5, 32\]"):
        gw.optimize(graph, Cut(), samples=[toy_inputs])


def test_a_pass_that_finds_nothing(graph: View, toy_inputs: Inputs) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Idle(Scale):
        def run(self, context: Context) -> PassResult:
            return PassResult(refused=[("up", "the rank is 3, 2 is needed")])

    with pytest.raises(BadInput) as caught:
        gw.optimize(graph, Idle(), samples=[toy_inputs])
    assert str(caught.value) == (
        "scale found nothing to do (nearest: up: the rank is 3, 2 is needed); mark it "
        "scale{optional=true} if that is fine"
    )
    result = gw.optimize(graph, Idle(optional=True), samples=[toy_inputs])
    (step,) = result.report.passes
    assert step.result.refused == [("up", "the rank is 3, 2 is needed")]
    assert step.error is not None and step.error.max_abs == 0.0


def test_needs_are_asked_before_any_work(graph: View, no_reads: Any) -> None:
    class Hungry(Scale):
        needs: ClassVar[Needs] = Needs(calibration=True)

    class Packaged(Scale):
        needs: ClassVar[Needs] = Needs(packages=("torch", "no_such_package"))

    with no_reads():
        with pytest.raises(BadInput, match="scale needs calibration data"):
            gw.optimize(graph, [LossyScale(), Hungry()])
        with pytest.raises(Missing, match="scale needs the package no_such_package: pip install"):
            gw.optimize(graph, [LossyScale(), Packaged()])
        with pytest.raises(Missing, match="no_such_package"):
            gw.plan(graph, Packaged())
        with pytest.raises(BadInput, match="samples are given but empty"):
            gw.optimize(graph, LossyScale(), samples=[])


def test_calibration_reaches_the_pass(graph: View, toy_inputs: Inputs) -> None:
    batches = []

    @dataclass(frozen=True, kw_only=True)
    class Learning(Scale):
        needs: ClassVar[Needs] = Needs(calibration=True)

        def run(self, context: Context) -> PassResult:
            batches.extend(context.calibration)
            return super().run(context)

    gw.optimize(graph, Learning(), samples=[toy_inputs], calibration=[toy_inputs, toy_inputs])
    assert len(batches) == 2


# --- the report ---------------------------------------------------------------------------------


def test_the_report_tells_each_pass(graph: View, toy_inputs: Inputs) -> None:
    calls: list[tuple[str, int, int]] = []
    recipe = "quantize{bits=8 include=[up]},hqq{group=16 exclude=[up head]}"
    result = gw.optimize(
        graph, recipe, samples=[toy_inputs], progress=lambda *step: calls.append(step)
    )
    fields = result.report.to_dict()
    assert fields["recipe"] == recipe and fields["verification"]["samples"] == 3
    first, second = fields["passes"]
    assert (first["order"], second["order"]) == (1, 2)
    assert [s["name"] for s in second["sites"]] == ["gate", "down"]
    assert first["bytes_after"] == second["bytes_before"] < first["bytes_before"]
    assert first["macs_before"] == first["macs_after"] == second["macs_after"] > 0
    (whole,) = result.report.errors.values()
    assert first["error"]["rel_l2"] < second["error"]["rel_l2"]
    assert whole.rel_l2 <= first["error"]["rel_l2"] + 1.1 * second["error"]["rel_l2"]
    assert recipe.split(",")[0] in str(result.report)
    assert calls[:2] == [("comparing the graph with its source", 0, 1), ("quantize: up", 0, 1)]
    assert calls[-2:] == [("hqq", 2, 2), ("checking what hqq made", 0, 1)]


# --- passes of other packages -------------------------------------------------------------------


class _Point:
    """An entry point."""

    def __init__(self, name: str, loaded: object) -> None:
        self.name, self.loaded = name, loaded
        self.value = f"somewhere.else:{getattr(loaded, '__name__', name)}"

    def load(self) -> object:
        return self.loaded


def test_passes_of_other_packages(
    graph: View, toy_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [_Point("lossy-scale", LossyScale), _Point("broken", dict), _Point("quantize", dict)]
    monkeypatch.setattr(
        registry, "entry_points", lambda group: points if group == "graphwright.passes" else []
    )
    assert {"lossy-scale", "broken", "hqq"} <= set(gw.passes.pass_names())
    recipe = gw.Recipe.parse("lossy-scale{site=down factor=2.0}")
    assert recipe.passes == (LossyScale(site="down", factor=2.0),)
    assert gw.optimize(graph, recipe, samples=[toy_inputs]).report.passes[0].result.edits == 1
    assert gw.Recipe.parse("quantize").passes[0] == gw.passes.Quantize()
    assert gw.passes.LossyScale is LossyScale
    with pytest.raises(BadInput, match="'broken' is not a graphwright pass"):
        gw.Recipe.parse("broken")
    with pytest.raises(BadInput, match="no pass 'lossy-scal'; did you mean lossy-scale"):
        gw.Recipe.parse("lossy-scal")


# --- moves with nothing to change ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gate", "up", "down", "head"])
def test_a_linear_swapped_for_itself_changes_no_bit(
    kind: str, name: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    graph = toy_graph(kind)
    canonicalize(graph)
    before = outputs_of(graph, toy_inputs)
    (linear,) = (x for x in recognize(graph).linears if x.name == name)
    weight = graph.weight(linear.weight)
    assert weight is not None
    swapped = swap(graph, linear, "linear", [("same", weight)], {}, rule="test")
    check_structure(graph)
    assert swapped.node is not linear.node and swapped.name == name
    assert torch.equal(before, outputs_of(graph, toy_inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_path_without_entries_changes_no_bit(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    graph = toy_graph(kind)
    canonicalize(graph)
    before = outputs_of(graph, toy_inputs)
    nothing = torch.zeros(0, dtype=torch.uint8)
    parts = (("rows", nothing), ("cols", nothing), ("values", nothing.float()))
    for linear in recognize(graph).linears:
        weights = [(f"{linear.name}.{name}", MemoryWeight(part)) for name, part in parts]
        graft(
            graph, linear.out, linear.x, "sparse_linear", weights,
            {"out_features": linear.out_features}, rule="test",
        )  # fmt: skip
    check_structure(graph)
    assert sum(graph.op(node) == "sparse_linear" for node in graph.nodes()) == 4
    assert torch.equal(before, outputs_of(graph, toy_inputs))


# --- the public face ----------------------------------------------------------------------------


def test_the_public_names(toy_graph: Graphs, toy_inputs: Inputs, tmp_path: Path) -> None:
    graph = toy_graph("fx")
    result = gw.optimize(graph, gw.passes.Quantize(bits=4, include=("u*", "down")))
    assert isinstance(result, gw.Result)
    run = gw.compile(result.graph, backend="onnxruntime")
    outputs = run(**toy_inputs)
    for difference in compare(sweep(result.graph, toy_inputs), outputs).values():
        assert difference.rel_l2 < 1e-5
    folder = gw.export(result.graph, tmp_path / "out4", report=result.report)
    again = gw.compile(folder)(**toy_inputs)
    for difference in compare(outputs, again).values():
        assert difference.max_abs == 0.0
    assert all(hasattr(gw, name) for name in gw.__all__)
    with pytest.raises(AttributeError, match="optimise"):
        gw.optimise  # noqa: B018


def test_every_pass_is_an_attribute_of_the_package() -> None:
    for name in registry.pass_names():
        assert getattr(gw.passes, registry.class_name(name)).name == name
