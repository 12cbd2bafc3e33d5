"""BitStack on graphs of both kinds: errors and bytes, artifacts of any size, refusals."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends import compile as compile_graph
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.joined_weights import StackedWeight
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.load.bitstack_size import possible_sizes
from graphwright.ir.ops.bitstack_blocks import place_of
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import compare
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.weights.bitstack_decomposition import block_bytes

from ..calibrated import many, optimize, rel

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]
Inputs = dict[str, torch.Tensor]
FREE = "bitstack{blocks=4 scaling=none}"
"""A recipe that needs no data."""


# --- on graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_falls_with_the_blocks(kind: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    source = toy_graph(kind)
    expected = sweep(source, toy_inputs)
    graphs = [
        optimize(source, f"bitstack{{blocks={n}}}", toy_inputs).graph for n in (1, 2, 4, 16)
    ]
    errors = [rel(expected, sweep(graph, toy_inputs)) for graph in graphs]
    assert all(a > 1.5 * b for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.02


def test_both_kinds_give_the_same(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    fx, onnx = (optimize(toy_graph(kind), "bitstack{blocks=3}", toy_inputs) for kind in KINDS)
    by_name = {s.name: s for s in onnx.report.passes[0].result.sites}
    for site in fx.report.passes[0].result.sites:
        other = by_name.pop(site.name)
        assert (site.kind, site.shape, site.bytes_after) == (
            other.kind, other.shape, other.bytes_after,
        )  # fmt: skip
        assert site.rel_l2 == pytest.approx(other.rel_l2, rel=1e-3)
    assert not by_name
    assert rel(sweep(fx.graph, toy_inputs), sweep(onnx.graph, toy_inputs)) < 1e-4


def test_bytes_are_the_formulas_and_the_plans(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    source = toy_graph("fx")
    result = optimize(source, "bitstack{blocks=3 rank=2}", toy_inputs)
    sites = result.report.passes[0].result.sites
    for site in sites:
        rows, columns = site.shape
        assert site.bytes_after == 3 * block_bytes(rows, columns, 2)
    stored = [w for w in result.graph.weights().values() if isinstance(w, StackedWeight)]
    assert sum(w.nbytes for w in stored) == sum(s.bytes_after for s in sites)
    planned = gw.plan(source, "bitstack{blocks=3 rank=2 scaling=none}")
    assert planned.artifact_bytes == result.report.passes[0].bytes_after


def test_no_weight_is_read_to_plan(
    graph: View, no_reads: Callable[..., Any], toy_inputs: Inputs
) -> None:
    with no_reads():
        assert len(gw.plan(graph, FREE).passes[0][1].sites) == 4


def test_statistics_help(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    def uneven(model: Any) -> None:
        model.embed.weight[:, :3] *= 30
        model.head.weight[:, :3] *= 0.03

    source = toy_graph("fx", uneven)
    expected = [sweep(source, batch) for batch in many()]

    def error(recipe: str) -> float:
        graph = optimize(source, recipe, toy_inputs).graph
        return max(rel(w, sweep(graph, b)) for w, b in zip(expected, many(), strict=True))

    plain = error("bitstack{blocks=3 scaling=none}")
    assert error("bitstack{blocks=3}") < 0.8 * plain


def test_the_sites_keep_their_names_and_roles(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    source = toy_graph("fx")
    result = optimize(source, FREE, toy_inputs)
    canonicalize(source)
    before = {s.name: (s.role, s.bias is None) for s in recognize(source).linears}
    after = {s.name: (s.role, s.bias is None) for s in recognize(result.graph).linears}
    assert after == before
    assert all(site.quantized for site in recognize(result.graph).linears)


def test_low_rank_paths_go_on_top(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    source = toy_graph("fx")
    expected = sweep(source, toy_inputs)
    one = "bitstack{blocks=1}"
    plain, repaired = (
        optimize(source, recipe, toy_inputs).graph for recipe in (one, f"{one},eora{{rank=8}}")
    )
    error = rel(expected, sweep(plain, toy_inputs))
    assert rel(expected, sweep(repaired, toy_inputs)) < 0.7 * error


def test_tied_linears_share_a_stack(
    toy_graph: Graphs, toy_inputs: Inputs, tmp_path: Path
) -> None:
    def tie(model: Any) -> None:
        model.up.weight = model.gate.weight

    result = optimize(toy_graph("fx", tie), "bitstack{blocks=2}", toy_inputs)
    stored = {w.key for w in result.graph.weights().values() if isinstance(w, StackedWeight)}
    assert len(stored) == 6
    assert len(result.report.passes[0].result.sites) == 4
    out = gw.export(result.graph, tmp_path / "out")
    for size in sizes(out)[::3]:
        loaded = gw.load(out, max_bytes=size)
        small = gw.export(loaded, tmp_path / str(size))
        assert data(out).startswith(data(small))
        assert rel(sweep(loaded, toy_inputs), compile_graph(small)(**toy_inputs)) < 1e-5
    names = [n for n in gw.load(out).weights() if place_of(n) is not None]
    assert len(names) == 3 * 2 * 2, "each block is stored once"


# --- any size -------------------------------------------------------------------------------------


def sizes(out: Path) -> tuple[int, ...]:
    return possible_sizes(out / "model.onnx")


def data(out: Path) -> bytes:
    return (out / "model.onnx.data").read_bytes()


@pytest.fixture(scope="module", params=KINDS)
def stacked(
    request: pytest.FixtureRequest, toy_graph: Graphs, toy_inputs: Inputs,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[View, Path]:  # fmt: skip
    """The rewritten toy and its artifact."""
    result = optimize(toy_graph(request.param), "bitstack{blocks=3}", toy_inputs)
    out = tmp_path_factory.mktemp("any") / "out"
    return result.graph, gw.export(result.graph, out, report=result.report)


def shortened(view: View, last: int) -> View:
    """The graph with the blocks up to a place of the order, made from the stacks themselves."""
    view = view.copy()
    for node in view.nodes():
        if view.op(node) != "linear_bitstack":
            continue
        with view.one_edit():
            for position in (1, 2):
                handle = view.weight(view.operands(node)[position])
                assert isinstance(handle, StackedWeight)
                places = [place_of(name) for name in handle.names]
                count = sum(place is not None and place <= last for place in places)
                part = view.add_weight("short", MemoryWeight(handle.read()[:count].clone()))
                view.set_operand(node, position, part)
    return view


def test_every_size_is_the_graph_with_those_blocks(
    stacked: tuple[View, Path], toy_inputs: Inputs
) -> None:
    graph, out = stacked
    known = sizes(out)
    assert len(known) == 4 * 3 - 4 + 1, "all first blocks, and then one block after the other"
    assert all(a < b for a, b in itertools.pairwise(known))
    files = sum((out / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert known[-1] == files
    for last, size in enumerate(known, 3):
        loaded = gw.load(out, max_bytes=size)
        expected = next(iter(sweep(shortened(graph, last), toy_inputs).values()))
        actual = next(iter(sweep(loaded, toy_inputs).values()))
        assert compare({"y": expected}, {"y": actual})["y"].rel_l2 < 1e-5
        names = [name for name in loaded.weights() if place_of(name) is not None]
        assert len(names) == 2 * (last + 1)
    between = gw.load(out, max_bytes=known[2] - 1).weights()
    assert between.keys() == gw.load(out, max_bytes=known[1]).weights().keys()


def test_the_runtime_runs_each_size_from_a_beginning_of_the_data(
    stacked: tuple[View, Path], toy_inputs: Inputs, tmp_path: Path
) -> None:
    _, out = stacked
    whole, graph_file = data(out), (out / "model.onnx").stat().st_size
    for size in sizes(out)[::3]:
        loaded = gw.load(out, max_bytes=size)
        small = gw.export(loaded, tmp_path / str(size))
        assert whole.startswith(data(small))
        assert len(data(small)) == size - graph_file
        expected = sweep(loaded, toy_inputs)
        for optimized in (True, False):
            run = compile_graph(small, optimize=optimized)
            assert rel(expected, run(**toy_inputs)) < 1e-5
    again = gw.load(out)
    written = gw.export(again, tmp_path / "again")
    assert data(written) == whole
    fixed = gw.export(gw.load(written), tmp_path / "fixed")
    assert (fixed / "model.onnx").stat().st_size <= (written / "model.onnx").stat().st_size
    canonicalize(again)
    assert {(s.name, s.role) for s in recognize(again).linears} == {
        ("gate", "gate"), ("up", "up"), ("down", "down"), ("head", "head"),
    }  # fmt: skip


def test_the_rest_of_the_data_need_not_be_there(
    stacked: tuple[View, Path], toy_inputs: Inputs, tmp_path: Path
) -> None:
    _, out = stacked
    size = sizes(out)[2]
    graph_file = (out / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(graph_file)
    (tmp_path / "model.onnx.data").write_bytes(data(out)[: size - len(graph_file)])
    begun = gw.load(tmp_path / "model.onnx", max_bytes=size)
    expected = sweep(gw.load(out, max_bytes=size), toy_inputs)
    assert rel(expected, sweep(begun, toy_inputs)) == 0.0
    with pytest.raises(BadInput, match="truncated"):
        gw.load(tmp_path / "model.onnx")


def test_more_bytes_are_nearer(stacked: tuple[View, Path], toy_graph: Graphs) -> None:
    _, out = stacked
    source = toy_graph("fx")
    expected = [sweep(source, batch) for batch in many()]

    def error(size: int) -> float:
        graph = gw.load(out, max_bytes=size)
        gaps = [
            torch.linalg.norm(next(iter(w.values())) - next(iter(sweep(graph, b).values())))
            for w, b in zip(expected, many(), strict=True)
        ]
        return float(sum(gaps))

    known = sizes(out)
    errors = [error(known[i]) for i in (0, 4, 8)]
    assert all(a > 1.3 * b for a, b in itertools.pairwise(errors))


def test_the_order_by_perplexity_is_the_papers(toy_graph: Graphs) -> None:
    """In the second level, first the site that alone with two blocks gives the least loss: measured
    here on a graph for each, whose other sites hold one."""
    source = toy_graph("fx")
    source.set_inputs({"input_ids": source.inputs()[0]})
    source.set_outputs({"logits": source.outputs()[0]})
    rows = {"input_ids": torch.cat([batch["ids"] for batch in many()])}
    names = ["gate", "up", "down", "head"]

    def loss(graph: View) -> float:
        scores = sweep(graph, rows)["logits"][:, :-1].log_softmax(-1)
        return -float(scores.gather(2, rows["input_ids"][:, 1:, None]).mean())

    def optimized(recipe: str) -> View:
        graph: View = gw.optimize(source, recipe, samples=[rows], calibration=[rows]).graph
        return graph

    losses = {}
    for name in names:
        others = " ".join(n for n in names if n != name)
        one = f"bitstack{{scaling=none rank=1 blocks=1 include=[{others}]}}"
        two = f"bitstack{{scaling=none rank=1 blocks=2 include=[{name}]}}"
        losses[name] = loss(optimized(f"{one},{two}"))
    graph = optimized("bitstack{blocks=2 order=perplexity scaling=none rank=1}")
    places = {}
    for linear in recognize(graph).linears:
        handle = graph.weight(graph.operands(linear.node)[1])
        assert isinstance(handle, StackedWeight)
        places[linear.name] = place_of(handle.names[1])
    assert sorted(places.values()) == [4, 5, 6, 7]
    assert sorted(places, key=places.__getitem__) == sorted(losses, key=losses.__getitem__)
    assert len(set(losses.values())) == 4 and list(losses) != sorted(losses, key=losses.get)


def test_perplexity_is_of_models_that_predict_tokens(graph: View, toy_inputs: Inputs) -> None:
    recipe = "bitstack{scaling=none order=perplexity}"
    with pytest.raises(BadInput, match="order=perplexity is for models that predict the next"):
        gw.plan(graph, recipe)
    with pytest.raises(BadInput, match="bitstack needs calibration data"):
        gw.optimize(graph, recipe, samples=[toy_inputs])


def test_too_few_bytes_name_the_least(stacked: tuple[View, Path]) -> None:
    _, out = stacked
    least = sizes(out)[0]
    gw.load(out, max_bytes=least)
    with pytest.raises(BadInput, match=rf"max_bytes={least - 1} is too small.*takes {least} bytes"):
        gw.load(out, max_bytes=least - 1)


def test_other_models_have_one_size(toy_graph: Graphs, tmp_path: Path) -> None:
    out = gw.export(toy_graph("fx"), tmp_path / "out")
    with pytest.raises(BadInput, match="its weights are not stacked, and it has one size"):
        gw.load(out, max_bytes=10**9)
    with pytest.raises(BadInput, match="max_bytes is for artifacts"):
        gw.load("zoo:minilm", max_bytes=10**9)


def test_runs_are_byte_identical(toy_graph: Graphs, toy_inputs: Inputs, tmp_path: Path) -> None:
    hashes = set()
    for run in ("a", "b"):
        torch.manual_seed(hash(run) % 1000)
        graph = optimize(toy_graph("fx"), "bitstack{blocks=3}", toy_inputs).graph
        out = gw.export(graph, tmp_path / run)
        hashes.add(hashlib.sha256((out / "model.onnx").read_bytes() + data(out)).hexdigest())
    assert len(hashes) == 1


def test_other_products_are_no_stacks() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x @ (2.0 * y).sum(0).T + x @ (y * y).sum(0).T

    inputs = {"x": torch.ones(3, 4), "y": torch.ones(2, 5, 4)}
    view = gw.trace(Module(), (), inputs)
    report = canonicalize(view)
    assert report.applied["fuse-bitstack"] == 0
    assert sum(view.op(node) == "matmul" for node in view.nodes()) == 2


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [("blocks=0", "blocks=0 must be 1 to 64"), ("blocks=65", "blocks=65 must be 1 to 64"),
     ("rank=0", "rank=0 must be 1 or more"), ("min_size=-1", "must not be negative"),
     ("scaling=some", "scaling")],
)  # fmt: skip
def test_options_out_of_range(options: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        gw.Recipe.parse(f"bitstack{{{options}}}")


def test_a_rank_beyond_the_matrix(graph: View, toy_inputs: Inputs) -> None:
    with pytest.raises(BadInput, match=r"too high for head \(17 x 32\).*give 11 or less"):
        optimize(graph, "bitstack{rank=12}", toy_inputs)
    with pytest.raises(BadInput, match="rank=12 is too high for head"):
        gw.plan(graph, "bitstack{rank=12}")
    optimized = optimize(graph, "bitstack{rank=12 exclude=head}", toy_inputs)
    assert len(optimized.report.passes[0].result.sites) == 3


def test_weights_are_stored_once(graph: View, toy_inputs: Inputs) -> None:
    with pytest.raises(BadInput, match="bitstack and quantize would both store the same sites"):
        optimize(graph, f"{FREE},quantize", toy_inputs)
    mixed = f"{FREE[:-1]} include=up}},quantize{{bits=8 exclude=up}}"
    steps = optimize(graph, mixed, toy_inputs).report.passes
    assert [[s.name for s in step.result.sites] for step in steps] == [
        ["up"], ["gate", "down", "head"],
    ]  # fmt: skip
    after = f"quantize{{include=up}},{FREE}"
    refused = optimize(graph, after, toy_inputs).report.passes[1].result.refused
    assert refused == [("up", "its weight is quantized already, to 4 bits")]


def test_data_is_asked_for_where_it_is_used(graph: View, toy_inputs: Inputs) -> None:
    with pytest.raises(BadInput, match="bitstack needs calibration data"):
        gw.optimize(graph, "bitstack", samples=[toy_inputs])
    gw.optimize(graph, FREE, samples=[toy_inputs])


def test_parts_of_a_stack_are_alike() -> None:
    parts = [MemoryWeight(torch.zeros(1, 3)), MemoryWeight(torch.zeros(1, 4))]
    with pytest.raises(ValueError, match="not alike"):
        StackedWeight(parts, ["a", "b"])
