"""``quantize{embeddings=8}``: tables in few bits, and tied heads on the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import onnx
import pytest
import torch
from graphwright.backends import compile as compile_graph
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.weights import tables
from graphwright.passes.weights.quantizers import rtn

from ..calibrated import optimize, rel

Graphs = Callable[..., View]
Inputs = dict[str, torch.Tensor]
KINDS = ("fx", "onnx")


@pytest.fixture(autouse=True)
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LEAST_NUMBERS", 1)


def tie(model: Any) -> None:
    model.head.weight = model.embed.weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["embeddings=4", "embeddings=8 bits=8 symmetric=false"])
def test_a_tied_head_reads_the_tables_bytes(
    kind: str, options: str, toy_graph: Graphs, toy_inputs: Inputs, tmp_path: Path
) -> None:
    source = toy_graph(kind, tie)
    result = optimize(source, f"quantize{{group=16 {options}}}", toy_inputs)
    (step,) = result.report.passes
    assert [s.name for s in step.result.sites] == ["gate", "up", "down", "embed"]
    assert step.result.refused == []
    site = step.result.sites[-1]
    assert site.note == "one stored copy with head"
    bits = 4 if "=4" in options else 8
    zeros = 17 * 2 if bits == 8 else 0
    width = torch.float16.itemsize if bits == 4 else torch.float32.itemsize
    assert site.bytes_after == 17 * 32 * bits // 8 + 17 * 2 * width + zeros
    out = gw.export(result.graph, tmp_path / "out", samples=[toy_inputs])
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    codes = [t for t in graph.initializer if list(t.dims) == [17, 2, bits * 2]]
    scales = [t for t in graph.initializer if "embed.scales" in t.name]
    assert len(codes) == len(scales) == 1
    # Both compute with the numbers that rounding gives, and the runtime does.
    table = source.weight(recognize(source).embeddings[0].weight)
    assert table is not None
    dtype = torch.float16 if bits == 4 else torch.float32
    rounded = rtn(table.read(), bits, 16, symmetric=bits == 4, scale_dtype=dtype).dequantized()
    again = gw.load(out)
    canonicalize(again)
    (embedding,) = recognize(again).embeddings
    assert again.op(embedding.node) == "embedding_nbit"
    assert {x.name: again.op(x.node) for x in recognize(again).linears}["head"] == "linear_nbit"
    embedded = torch.nn.functional.embedding(toy_inputs["ids"], rounded)
    outputs = {}

    def observe(node: Any, operands: Any, results: Any) -> None:
        if again.op(node) == "embedding_nbit":
            outputs["rows"] = results[0]

    swept = sweep(again, toy_inputs, observe=observe)
    assert torch.equal(outputs["rows"], embedded)
    for on in (True, False):
        assert rel(swept, compile_graph(out, optimize=on)(**toy_inputs)) < 1e-2
    assert rel(sweep(source, toy_inputs), swept) < (0.2 if bits == 4 else 0.02)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_head_right_behind_its_table_or_another_linear(narrow: bool) -> None:
    """The latter as in OPT-350m."""

    class Lookup(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(17, 32)
            self.down = torch.nn.Linear(32, 32) if narrow else torch.nn.Identity()
            self.head = torch.nn.Linear(32, 17, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.down(self.embed(ids)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    ids = {"ids": torch.arange(12).reshape(3, 4)}
    source = gw.trace(Lookup(), tuple(ids.values()))
    result = optimize(source, "quantize{bits=8 group=32 embeddings=8}", ids)
    *others, site = result.report.passes[0].result.sites
    assert [s.name for s in others] == ["down"] * narrow
    assert site.note == "one stored copy with head"
    assert rel(sweep(source, ids), sweep(result.graph, ids)) < 0.02


def test_a_table_alone(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    result = optimize(toy_graph("fx"), "quantize{bits=8 group=32 embeddings=4}", toy_inputs)
    sites = {s.name: s for s in result.report.passes[0].result.sites}
    assert sites["embed"].bits_per_weight == 4.5 and sites["head"].bits_per_weight == 8.5
    assert sites["embed"].note == ""
    planned = gw.plan(toy_graph("fx"), "quantize{bits=8 group=32 embeddings=4}")
    assert [(s.name, s.bytes_after) for s in planned.passes[0][1].sites] == [
        (s.name, s.bytes_after) for s in sites.values()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_a_head_is_tied_to_has_8_bits_unless_it_is_asked_for(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    def sites(graph: View, options: str) -> dict[str, float | None]:
        (step,) = optimize(graph, f"quantize{{group=16 {options}}}", toy_inputs).report.passes
        return {s.name: s.bits_per_weight for s in step.result.sites}

    tied, apart = toy_graph(kind, tie), toy_graph(kind)
    linears = {"gate": 5.0, "up": 5.0, "down": 6.0}
    assert sites(tied, "bits=4") == {**linears, "embed": 10.0}
    assert sites(tied, "bits=4 accuracy_level=0") == {**linears, "embed": 9.0}
    assert sites(tied, "bits=4 embeddings=keep") == linears
    assert sites(tied, "bits=4 include=[up]") == {"up": 5.0}
    assert sites(apart, "bits=4") == {**linears, "head": 5.0}
    assert sites(apart, "bits=4 head_bits=8") == {**linears, "head": 9.0}
    planned = gw.plan(apart, "quantize{bits=4 group=16 head_bits=8}").passes[0][1]
    assert planned.sites[-1].bits_per_weight == 9.0
    both = "quantize{group=16},quantize{group=16 embeddings=8 min_size=1000000 optional=true}"
    once, twice = (gw.plan(tied, text).artifact_bytes for text in (both.split(",")[0], both))
    assert once == twice, "a table is stored once in a forecast too"


@pytest.mark.parametrize("name", ["hqq", "finequant", "easyquant"])
def test_passes_that_do_more_than_round_store_tables_if_asked(
    name: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    tied = toy_graph("fx", tie)
    whole, stored = (
        optimize(tied, f"{name}{{group=16{more}}}", toy_inputs).report.passes[0].result
        for more in ("", " embeddings=8")
    )
    assert "embed" not in {s.name for s in whole.sites} and dict(whole.refused).keys() == {"head"}
    (site,) = [s for s in stored.sites if s.name == "embed"]
    assert site.note == "one stored copy with head" and not stored.refused
    assert site.bits_per_weight == 10.0, "a scale in float32 for 16 codes"


@pytest.mark.parametrize(("option", "level"), [("", 4), ("accuracy_level=0", 0)])
def test_a_level_that_is_given_reaches_a_tied_head(
    option: str, level: int, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    graph = optimize(toy_graph("fx", tie), f"quantize{{group=16 {option}}}", toy_inputs).graph
    nodes = {x.name: x.node for x in recognize(graph).linears}
    assert graph.attrs(nodes["head"])["accuracy_level"] == level


def test_groups_that_do_not_fit_and_pairs_that_are_kept(
    toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    tied = toy_graph("fx", tie)
    keep = "quantize{group=16 embeddings=keep}"
    pairs = optimize(tied, keep, toy_inputs).report.passes[0].result.refused
    assert [site for site, _ in pairs] == ["head"] and "embeddings=8" in pairs[0][1]
    alone = optimize(tied, "quantize{group=64}", toy_inputs).report.passes[0].result.refused
    assert [site for site, _ in alone] == ["head"] and "groups of 64" in alone[0][1]
    refused = optimize(
        tied, "quantize{group=64 embeddings=8}", toy_inputs
    ).report.passes[0].result.refused
    assert [site for site, _ in refused] == ["embed", "head"]
    assert "not a whole number of groups of 64" in refused[0][1]


def test_small_tables_stay(
    toy_graph: Graphs, toy_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LEAST_NUMBERS", 1 << 16)
    result = optimize(toy_graph("fx", tie), "quantize{group=16 embeddings=8}", toy_inputs)
    reason = "a table of 544 numbers stays: smaller than 65536"
    assert result.report.passes[0].result.refused == [("embed", reason), ("head", reason)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_excluded_keeps_its_table(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    result = optimize(
        toy_graph(kind, tie), "quantize{group=16 embeddings=8 exclude=[head]}", toy_inputs
    )
    refused = result.report.passes[0].result.refused
    assert refused == [("embed", "exclude keeps head"), ("head", "exclude keeps head")]
    assert "head" not in {s.name for s in result.report.passes[0].result.sites}
