"""Weight passes on graphs of both kinds: which sites, how many bytes, what is refused and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import Origin, View
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import compare
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.weights.quantize import Quantize

KINDS = ("fx", "onnx")
SITES = {"gate", "up", "down", "head"}
RECIPES = (
    "quantize{bits=4 group=32}", "quantize{bits=8 group=16}", "quantize{bits=3 group=0}",
    "quantize{bits=2 group=16 symmetric=false mse=true}", "easyquant{bits=4 nsig=2}",
    "hqq{bits=4 group=16}", "hqq{bits=4 group=32 round_zero=true}",
)  # fmt: skip
Graphs = Callable[..., View]
Inputs = dict[str, torch.Tensor]


def only(result: Any) -> Any:
    """The result of the only pass."""
    (step,) = result.report.passes
    return step.result


def names(result: Any) -> set[str]:
    return {site.name for site in only(result).sites}


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_kinds_give_the_same_sites_and_outputs(
    recipe: str, toy_graph: Graphs, toy_inputs: Inputs, no_reads: Any
) -> None:
    """And the plan reads nothing and predicts the bytes."""
    graphs = [toy_graph(kind) for kind in KINDS]
    results = [gw.optimize(graph, recipe, samples=[toy_inputs]) for graph in graphs]
    for graph, result in zip(graphs, results, strict=True):
        with no_reads():
            planned = gw.plan(graph, recipe)
        if not recipe.startswith("easyquant"):  # its outliers are known when weights are read
            check_plan(planned, result)
    fx, onnx = (only(result).sites for result in results)
    assert {site.name for site in fx} == SITES
    by_name = {site.name: site for site in onnx}
    for site in fx:
        assert site == by_name.pop(site.name)
    assert not by_name
    outputs = [sweep(result.graph, toy_inputs) for result in results]
    for difference in compare(*outputs).values():
        assert difference.rel_l2 < 1e-4
    source = sweep(toy_graph("fx"), toy_inputs)
    for difference in compare(source, outputs[0]).values():
        assert 1e-4 < difference.rel_l2 < 0.7


def check_plan(planned: Any, done: Any) -> None:
    ((_, forecast),) = planned.passes
    for before, after in zip(forecast.sites, only(done).sites, strict=True):
        assert (before.name, before.shape, before.kind) == (after.name, after.shape, after.kind)
        assert before.bytes_before == after.bytes_before == 4 * before.shape[0] * before.shape[1]
        assert before.bytes_after == after.bytes_after
        assert before.bits_per_weight == after.bits_per_weight
        assert before.rel_l2 is None and after.rel_l2 is not None
    (step,) = done.report.passes
    assert step.bytes_before == planned.source_bytes
    assert step.bytes_after == planned.artifact_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_by_hand(kind: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    result = gw.optimize(toy_graph(kind), "quantize{bits=4 group=32}", samples=[toy_inputs])
    sizes = {site.name: site.bytes_after for site in only(result).sites}
    # Rows of 32 are one group: 16 bytes of codes and a float16 scale. Rows of 40 are padded to two.
    assert sizes == {"gate": 40 * 18, "up": 40 * 18, "down": 32 * 36, "head": 17 * 18}


def test_the_plan_leaves_the_graph_as_it_was(graph: View) -> None:
    before = [graph.native_op(node) for node in graph.nodes()], set(graph.weights())
    gw.plan(graph, "clean{optional=true},quantize")
    gw.optimize(graph, "quantize")
    assert ([graph.native_op(node) for node in graph.nodes()], set(graph.weights())) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "sites"),
    [
        ("include=[up down]", {"up", "down"}),
        ("exclude=[h*]", {"gate", "up", "down"}),
        ("include=[*a* u*] exclude=[head]", {"gate", "up"}),
        ("kinds=[up down]", {"up", "down"}),
        ("min_size=1000", {"gate", "up", "down"}),
        ("min_size=1280", {"gate", "up", "down"}),
    ],
)
def test_the_choice_of_sites(
    kind: str, options: str, sites: set[str], toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    result = gw.optimize(toy_graph(kind), f"quantize{{{options}}}", samples=[toy_inputs])
    assert names(result) == sites
    assert only(result).refused == []
    nodes = [result.graph.op(node) for node in result.graph.nodes()]
    assert nodes.count("linear_nbit") == len(sites)
    assert nodes.count("linear") == len(SITES) - len(sites)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("exclude=[haed]", "exclude=haed matches no site; did you mean head"),
        ("include=[gate nothing.*]", "include=nothing.* matches no site"),
        ("kinds=[upp]", "kinds=upp matches no site; did you mean up"),
        ("min_size=1281", "quantize found nothing to do"),
        ("exclude=[*]", "quantize found nothing to do"),
    ],
)
@pytest.mark.parametrize("run", [gw.plan, gw.optimize])
def test_a_choice_that_matches_nothing(
    run: Callable[..., Any], options: str, message: str, graph: View
) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        run(graph, f"quantize{{{options}}}")


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 2, "group": 16}])
def test_an_accuracy_level_that_the_runtime_has_not(options: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="accuracy_level=4 needs bits=4 or 8, or bits=2 in groups"):
        Quantize(accuracy_level=4, **options)


def test_a_row_in_blocks_of_16_is_not_rounded_at_2_bits() -> None:
    pass_ = Quantize(accuracy_level=4, bits=2, group=0)
    rng = torch.Generator().manual_seed(0)
    levels = [
        pass_.fit(torch.randn(4, columns, generator=rng), {}, "w").attrs["accuracy_level"]
        for columns in (48, 64)
    ]
    assert levels == [0, 4]


def test_an_optional_pass_may_find_nothing(graph: View, toy_inputs: Inputs) -> None:
    result = gw.optimize(graph, "quantize{min_size=9999 optional=true}", samples=[toy_inputs])
    assert names(result) == set()
    for difference in compare(sweep(graph, toy_inputs), sweep(result.graph, toy_inputs)).values():
        assert difference.max_abs == 0.0


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["quantize", "easyquant", "hqq"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_site(
    kind: str, name: str, bad: float, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    graph = toy_graph(kind, lambda toy: toy.down.weight[3, 4].fill_(bad))
    with pytest.raises(BadInput, match=r"^down: 1 of 1280 weights are NaN or infinite; exclude"):
        gw.optimize(graph, name, samples=[toy_inputs])


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_linear_is_not_quantized_again(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    once = gw.optimize(toy_graph(kind), "quantize{include=[up]}", samples=[toy_inputs]).graph
    twice = gw.optimize(once, "hqq{group=16}", samples=[toy_inputs])
    assert names(twice) == SITES - {"up"}
    assert only(twice).refused == [("up", "its weight is quantized already, to 4 bits")]
    with pytest.raises(BadInput, match=r"nearest: up: its weight is quantized already"):
        gw.optimize(once, "quantize{include=[up]}", samples=[toy_inputs])


def _tie_tables(toy: Any) -> None:
    toy.head.weight = toy.embed.weight


def _stack_layers(toy: Any) -> None:
    """Two layers of one shape before ``down``, the second of which feeds it directly."""
    first, second = torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)
    toy.down = torch.nn.Sequential(first, torch.nn.SiLU(), second, toy.down)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["quantize{bits=8}", "easyquant{bits=8 nsig=2}"])
def test_a_linear_that_feeds_another_directly(
    kind: str, recipe: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    graph = toy_graph(kind, _stack_layers)
    result = gw.optimize(graph, recipe, samples=[toy_inputs])
    assert names(result) == {"gate", "up", "down.0", "down.2", "down.3", "head"}
    (difference,) = compare(sweep(graph, toy_inputs), sweep(result.graph, toy_inputs)).values()
    assert difference.rel_l2 < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_tied_to_an_embedding_is_refused(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    graph = toy_graph(kind, _tie_tables)
    result = gw.optimize(graph, "quantize", samples=[toy_inputs])
    assert names(result) == SITES - {"head"}
    ((site, reason),) = only(result).refused
    assert site == "head" and reason.startswith("its weight is tied to an embedding")
    (difference,) = compare(sweep(graph, toy_inputs), sweep(result.graph, toy_inputs)).values()
    assert difference.rel_l2 < 0.3
    with pytest.raises(BadInput, match="nearest: head: its weight is tied to an embedding"):
        gw.plan(graph, "quantize{include=[head]}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["quantize", "easyquant{nsig=2}", "hqq{group=16}"])
def test_tied_linears_stay_tied(
    kind: str, recipe: str, toy_graph: Graphs, toy_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_kind = type(gw.Recipe.parse(recipe).passes[0])
    quantized: list[str] = []
    whole = pass_kind.quantize

    def counted(self: Any, weight: torch.Tensor, name: str) -> Any:
        quantized.append(name)
        return whole(self, weight, name)

    monkeypatch.setattr(pass_kind, "quantize", counted)
    tied = toy_graph(kind, _stack_layers)
    canonicalize(tied)
    weights = {linear.name: linear.weight for linear in recognize(tied).linears}
    shared = tied.weight(weights["down.0"])
    assert shared is not None
    tied.set_weight(weights["down.2"], shared)
    result = gw.optimize(tied, recipe, samples=[toy_inputs])
    assert names(result) == {"gate", "up", "down.0", "down.2", "down.3", "head"}
    assert len(quantized) == 5
    graph = result.graph
    codes = [graph.operands(n)[1] for n in graph.nodes() if graph.op(n) == "linear_nbit"]
    assert len(codes) == 6 and len({id(value) for value in codes}) == 5


# --- the side path of outliers ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_outliers_are_restored_by_a_side_path(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    graph = toy_graph(kind, lambda toy: toy.up.weight[0, 0].fill_(30.0))
    result = gw.optimize(graph, "easyquant{bits=8 include=[up]}", samples=[toy_inputs])
    nodes = [result.graph.op(node) for node in result.graph.nodes()]
    assert nodes.count("sparse_linear") == 1
    (difference,) = compare(sweep(graph, toy_inputs), sweep(result.graph, toy_inputs)).values()
    assert difference.rel_l2 < 0.01
    without = gw.optimize(graph, "easyquant{bits=8 nsig=100 include=[up]}", samples=[toy_inputs])
    assert "sparse_linear" not in {without.graph.op(n) for n in without.graph.nodes()}
    assert only(result).sites[0].bytes_after > only(without).sites[0].bytes_after


def test_new_nodes_say_which_pass_made_them(graph: View) -> None:
    result = gw.optimize(graph, "clean{optional=true},easyquant{nsig=2}").graph
    nodes = [n for n in result.nodes() if result.op(n) in ("linear_nbit", "sparse_linear")]
    assert {node.meta["graphwright"] for node in nodes} == {Origin("easyquant", 2)}
