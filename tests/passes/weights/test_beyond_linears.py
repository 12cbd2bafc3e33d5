"""GPTQ, AWQ and EoRA where linears are not plain: experts, convolutions, a head that is tied."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.view import View
from graphwright.ir.fx.view import FxView
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep
from torch import Tensor, nn

from ..calibrated import rel

WIDTH, INNER, EXPERTS, ROWS = 32, 48, 3, 2048
CODED = "group=16 exclude=head"
EIGHT = "quantize{bits=8 group=16 embeddings=8 include=head}"


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


class Beyond(nn.Module):
    """ids ``[batch, seq]`` to logits: experts of which a router picks two, the same as two stacks
    of matrices, pointwise and other convolutions over the sequence, a head that is the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.stack = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH)
        self.wide = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.mix = nn.Conv1d(WIDTH, INNER, 1)
        self.back = nn.Conv1d(INNER, WIDTH, 1)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        normed = self.norms[0](x)
        weights, picked = self.router(normed).softmax(-1).topk(2)
        shares = torch.zeros_like(self.router(normed)).scatter(-1, picked, weights)
        for i, expert in enumerate(self.experts):
            x = x + expert(normed) * shares[..., i : i + 1]
        x = x + torch.matmul(normed.unsqueeze(1), self.stack).mean(1)
        inner = self.norms[1](x).transpose(1, 2)
        x = x + self.back(torch.relu(self.mix(self.wide(inner)))).transpose(1, 2)
        out: Tensor = self.head(self.norms[2](x))
        return out


SITES = {
    "router", "mix", "back",
    *(f"experts.{i}.{part}" for i in range(EXPERTS) for part in ("gate", "up", "down")),
}  # fmt: skip


def batches(count: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"ids": torch.randint(0, ROWS, (8, 12), generator=draw)} for _ in range(count)]


@pytest.fixture(scope="module")
def traced() -> FxView:
    torch.manual_seed(0)
    return trace(Beyond().eval(), (), batches(1)[0])


@pytest.fixture(scope="module", params=["fx", "onnx"])
def beyond(request: pytest.FixtureRequest, traced: FxView) -> View:
    return traced if request.param == "fx" else translated(traced)


def optimized(graph: View, recipe: str) -> Any:
    return gw.optimize(graph, recipe, samples=batches(1), calibration=batches(6))


def error(graph: View, result: Any) -> float:
    (batch,) = batches(7)[6:]
    return rel(sweep(graph, batch), sweep(result.graph, batch))


def test_they_reach_experts_and_convolutions_and_leave_the_rest_with_reasons(beyond: View) -> None:
    for name, symmetric in (("gptq", "true"), ("awq", "false")):
        plain = optimized(beyond, f"quantize{{bits=2 symmetric={symmetric} {CODED}}}")
        result = optimized(beyond, f"{name}{{bits=2 group=16}}")
        step = result.report.passes[0].result
        assert {site.name for site in step.sites} == SITES
        reasons = dict(step.refused)
        assert reasons.keys() == {"head", "stack", "wide"}
        assert reasons["head"].startswith("its weight is tied to an embedding, which keeps it")
        assert reasons["head"].endswith("nothing would be saved; embeddings=8 stores both")
        assert reasons["stack"].startswith("w is a stack of 3 matrices, [3, 32, 32]")
        assert reasons["wide"] == "the kernel is 3, not 1"
        assert error(beyond, result) < 0.95 * error(beyond, plain), name


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_tied_head_in_8_bits_beside_them_gets_a_path_too(beyond: View, name: str) -> None:
    coded = f"{name}{{bits=2 {CODED}}},{EIGHT}"
    before, behind = (optimized(beyond, coded + more) for more in ("", ",eora{rank=12}"))
    table, eora = (step.result for step in behind.report.passes[1:])
    assert [site.name for site in table.sites] == ["table"] and not table.refused
    assert {site.name for site in eora.sites} == {*SITES, "head"}
    assert error(beyond, behind) < 0.8 * error(beyond, before)


@pytest.mark.parametrize("options", ["gptq{", "awq{", "autoround{steps=1 "])
def test_they_store_a_table_and_its_head_in_8_bits_if_asked(beyond: View, options: str) -> None:
    recipe = f"{options}bits=2 group=16 embeddings=auto}}"
    planned = {s.name: s.bytes_after for s in gw.plan(beyond, recipe).passes[0][1].sites}
    kept, stored = (optimized(beyond, text) for text in (recipe.replace("auto}", "keep}"), recipe))
    step = stored.report.passes[0].result
    assert {s.name: s.bytes_after for s in step.sites} == planned
    assert planned.keys() == {*SITES, "table"} and "head" not in dict(step.refused)
    assert error(beyond, stored) < 1.05 * error(beyond, kept)
