"""Costs read off the shapes are those that are counted while the graph runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.dims import dim_value
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.costs import graph_costs, layer_macs, sample_sizes
from graphwright.ir.structure.recognize import recognize
from graphwright.tools.bench import cost_tables
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ... import models as small_models

KINDS = ("fx", "onnx")
MODELS = ("llama", "bert", "clip_vision", "llava")
Inputs = dict[str, torch.Tensor]


@cache
def traced(name: str) -> tuple[View, Inputs]:
    if name == "llava":
        view = load("zoo:tiny-llava", cache=False)
        return view, {n: t[:1] for n, t in view.source.samples[0].items()}
    small = small_models.BUILDERS[name]()
    view = small_models.plain(small)
    return view, {n: t[:1] for n, t in small.inputs.items()}


@cache
def graph(name: str, kind: str) -> tuple[View, Inputs]:
    view, inputs = traced(name)
    canonical = view.copy() if kind == "fx" else translated(view)
    canonicalize(canonical)
    return canonical, inputs


def counted(view: View, inputs: Inputs) -> dict[str, Any]:
    """What a run does: products of every matrix, from the tensors alone."""
    counts: dict[str, Any] = {"macs": 0, "nodes": {}, "entries": {}}
    structure = recognize(view)
    entries = {view.producer(b.entry): b.index for b in structure.blocks}

    def look(node: Any, arguments: list[Any], results: tuple[Any, ...]) -> None:
        op, attrs, out = view.op(node), view.attrs(node), results[0]
        if node in entries:
            counts["entries"][entries[node]] = out.shape[1]
        tensors = dict(zip(view.arguments(node), arguments, strict=True))
        a, b, *_ = (*(tensors.get(o) for o in view.operands(node)), None)
        macs = 0
        if op == "linear":
            macs = a.numel() * b.shape[0]
        elif op == "linear_nbit":
            macs = a.numel() // a.shape[-1] * attrs["in_features"] * attrs["out_features"]
        elif op == "sparse_linear":
            macs = a.numel() // a.shape[-1] * b.numel()
        elif op == "matmul":
            macs = sum(torch.ones_like(a).flatten(0, -2).sum(0).tolist()) * b.shape[-1]
        elif op == "sdpa":
            pairs = a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
            macs = pairs * (a.shape[3] + out.shape[3])
        elif op == "conv":
            macs = out.shape[0] * out[0, 0].numel() * b.numel()
        counts["macs"] += int(macs)
        counts["nodes"][node] = int(macs)

    sweep(view, inputs, observe=look)
    return counts


def check(view: View, inputs: Inputs) -> None:
    costs, run = graph_costs(view, sample_sizes(view, inputs)), counted(view, inputs)
    structure = recognize(view)
    assert costs.macs == run["macs"] > 0
    assert list(costs.tokens) == [run["entries"][b.index] for b in structure.blocks]
    for block, macs in zip(structure.blocks, costs.block_macs, strict=True):
        sites = [s for s in (*structure.linears, *structure.attentions) if s.block == block.index]
        assert macs == sum(run["nodes"][s.node] for s in sites) > 0
    assert costs.weight_bytes == sum({w.key: w.nbytes for w in view.weights().values()}.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", (*MODELS, "gpt2", "t5_encoder"))
def test_the_source(name: str, kind: str) -> None:
    check(*graph(name, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "bert", "llava"])
def test_behind_every_pass(name: str, kind: str) -> None:
    view, inputs = graph(name, kind)
    steps = ["easyquant{bits=4 nsig=2.0}", "eora{rank=3}", "drop-blocks{count=1 score=random}"]
    if name == "llava":
        steps = ["quantize{bits=8 kinds=[down]}", steps[2], "fastv{layer=2 keep=25%}"]
    batches = [{n: torch.cat([t, t]) for n, t in inputs.items()}]
    rows: list[Any] = []
    # Every prefix of the recipe on one graph, the whole of it on the others.
    first = 1 if (name, kind) == ("bert", "onnx") else len(steps)
    for count in range(first, len(steps) + 1):
        recipe = ",".join(steps[:count])
        result = gw.optimize(view, recipe, samples=batches, calibration=batches)
        check(result.graph, inputs)
        report = result.report.to_dict()
        assert report["costs"]["rows"][: len(rows)] == rows
        rows = report["costs"]["rows"]
        last = graph_costs(result.graph, sample_sizes(result.graph, inputs))
        assert rows[-1] == {"name": f"{count} {steps[count - 1].split('{')[0]}", **last.to_dict()}
        assert report["passes"][-1]["macs_after"] == last.macs
    assert len(rows[-1]["tokens"]) == len(rows[0]["tokens"]) - 1
    if name == "llava":
        assert rows[-1]["tokens"][-1] == rows[0]["tokens"][-1] - 108


def test_a_low_rank_path_costs_what_its_factors_do() -> None:
    view, inputs = graph("llama", "fx")
    recipe = "quantize{bits=4 group=16 kinds=[o]},svd-compensate{rank=5}"
    rows = gw.optimize(view, recipe, samples=[inputs]).report.costs
    assert rows[1]["macs"] == rows[0]["macs"]
    assert rows[2]["macs"] - rows[1]["macs"] == 2 * 7 * 5 * (32 + 32)


@pytest.mark.parametrize("name", ["llama", "bert", "clip_vision"])
def test_torch_counts_the_same(name: str) -> None:
    small = small_models.BUILDERS[name]()
    inputs = {n: t[:1] for n, t in small.inputs.items()}
    # The counter does not know the fused attention of CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        small.module(**inputs)
    view, _ = graph(name, "fx")
    costs = graph_costs(view, sample_sizes(view, inputs))
    assert costs.macs is not None and counter.get_total_flops() == 2 * costs.macs


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_decoder_keeps_keys_and_values(kind: str) -> None:
    def kept(name: str) -> int | None:
        view, inputs = graph(name, kind)
        return graph_costs(view, sample_sizes(view, inputs)).kv_bytes

    # 2 bytes sum(n_l d_kv): two layers of 7 tokens, 2 heads of 8 in float32; gpt2 has 4 heads.
    assert (kept("llama"), kept("gpt2")) == (2 * 4 * 2 * 7 * 16, 2 * 4 * 2 * 7 * 32)
    assert [kept(name) for name in ("bert", "clip_vision", "t5_encoder")] == [0, 0, 0]
    seq = graph("llava", kind)[1]["input_ids"].shape[1]
    assert kept("llava") == 2 * 4 * 6 * seq * 64


def test_a_strided_mask_is_no_triangle() -> None:
    """``aten.as_strided`` has "tri" in its name."""
    class Strided(torch.nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            mask = torch.as_strided(mask, (3, 3), (1, 3))
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, mask)

    x, mask = torch.randn(1, 2, 3, 4), torch.randn(3, 3)
    view = trace(Strided(), (x, mask), dynamic_shapes={})
    assert "aten.as_strided.default" in [view.native_op(n) for n in view.nodes()]
    assert graph_costs(view, {}).kv_bytes == 0


def test_an_open_shape_is_told_as_such() -> None:
    view, _ = graph("llama", "fx")
    costs = graph_costs(view, {"batch": 1})
    assert (costs.macs, costs.kv_bytes, costs.tokens) == (None, None, (None, None))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("seq", 5), ("past + seq", 12), ("2*seq - 1", 9), ("seq//2", 2), ("Max(1, past)", 7),
        ("-seq + 8", 3), ("unknown", None), ("seq +", None), ("?", None), ("seq/2", None),
        ("seq/0", None), ("__import__('os').getpid()", None), (4, 4),
    ],
)  # fmt: skip
def test_dimensions_as_numbers(text: str | int, number: int | None) -> None:
    assert dim_value(text, {"seq": 5, "past": 7}) == number


# --- the papers' figures --------------------------------------------------------------------------


def test_a_layer_by_the_papers_formula() -> None:
    assert layer_macs(7, 32, 56) == 4 * 7 * 32**2 + 2 * 49 * 32 + 3 * 7 * 32 * 56
    assert layer_macs(7, 32, 56, gated=False) == layer_macs(7, 32, 56) - 7 * 32 * 56
    view, inputs = graph("gpt2", "fx")
    costs = graph_costs(view, sample_sizes(view, inputs))
    assert costs.block_macs == (layer_macs(7, 32, 128, gated=False),) * 2


def test_the_papers_figures_come_out() -> None:
    priced = cost_tables.priced(cost_tables.decoder(layers=3))
    for figure, price, by_formula in priced:
        digits = 2 if figure.printed < 5 else 1
        assert price == pytest.approx(figure.printed, abs=0.51 * 10**-digits), figure
        assert price == pytest.approx(by_formula, rel=1e-12), figure
    exact = {(f.model, f.what, f.unit): price for f, price, _ in priced}
    next_7b = cost_tables.NEXT
    assert exact[next_7b, "PyramidDrop, its default", "T MAC"] == pytest.approx(9.46, abs=5e-3)
    assert exact[next_7b, "FastV, K=2 R=50 %", "T MAC"] == pytest.approx(10.55, abs=5e-3)
    assert exact[next_7b, "cache, all tokens", "MB"] == 1440
