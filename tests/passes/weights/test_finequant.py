"""FineQuant: which group sizes it chooses, what it stores, what it forecasts and refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.statistics import Statistics
from graphwright.ir.run.sweep import sweep
from graphwright.passes.weights.finequant import FineQuant
from graphwright.passes.weights.quantizers import rtn
from torch import Tensor

from ..calibrated import optimize, rel

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]
Inputs = dict[str, Tensor]


def gaussian(rows: int = 64, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def spiked(every: int) -> Tensor:
    """Even weights, but for a large one in every so many."""
    weight = torch.full((8, 512), 0.1)
    weight[:, ::every] = 10.0
    return weight


@pytest.mark.parametrize(
    ("weight", "alpha", "group"),
    [
        (torch.full((8, 512), 0.1), 0.05, 0),
        (spiked(512), 0.05, 16),
        (spiked(64), 0.05, 0),
        (gaussian(), 0.04, 16),
        (gaussian(), 0.2, 0),
        (gaussian(columns=40), 0.04, 16),
        (torch.zeros(4, 512), 0.05, 0),
    ],
)
def test_the_rule(weight: Tensor, alpha: float, group: int) -> None:
    assert FineQuant(alpha=alpha, group=16).chosen_group(weight) == group


def test_no_group_pads_a_row_that_smaller_ones_fill() -> None:
    weight = torch.cat([gaussian(columns=128), 0.1 * gaussian(columns=64)], 1)
    assert FineQuant(alpha=0.2, group=16).chosen_group(weight) == 64
    assert FineQuant(alpha=0.2, group=128).chosen_group(weight) == 128


def test_no_group_is_smaller_than_asked() -> None:
    assert FineQuant(alpha=0.0, group=64).chosen_group(gaussian()) == 64
    assert FineQuant(alpha=0.0, group=0).chosen_group(gaussian()) == 0
    assert FineQuant(alpha=0.0, group=256).chosen_group(gaussian(columns=200)) == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_rounding_in_the_groups_that_it_chose(symmetric: bool) -> None:
    weight = gaussian()
    pass_ = FineQuant(alpha=0.04, group=32, bits=3, symmetric=symmetric)
    stored = pass_.fit(weight, Statistics(), "here")
    plain = rtn(weight, 3, 32, symmetric)
    assert stored.note == "groups of 32" and stored.attrs["group"] == 32
    for operand, expected in zip(stored.operands.values(), plain.operands(), strict=True):
        assert operand is expected or torch.equal(operand, expected)  # type: ignore[arg-type]


def test_both_kinds_and_the_forecast(toy_graph: Graphs, toy_inputs: Inputs, no_reads: Any) -> None:
    def spike(toy: Any) -> None:
        toy.down.weight[:, 3] *= 30

    recipe = "finequant{bits=3 group=16 alpha=0.2}"
    results = [optimize(toy_graph(kind, spike), recipe, toy_inputs) for kind in KINDS]
    sites, other = (result.report.passes[0].result.sites for result in results)
    assert sites == other
    assert {site.name: site.note for site in sites} == {
        "gate": "one group a row", "up": "one group a row", "down": "groups of 16",
        "head": "one group a row",
    }  # fmt: skip
    assert rel(*(sweep(result.graph, toy_inputs) for result in results)) < 1e-4
    with no_reads():
        (_, planned), = gw.plan(toy_graph("fx", spike), recipe).passes
    forecast = {site.name: site.bytes_after for site in planned.sites}
    for site in sites:
        exact = site.name == "down"
        assert site.bytes_after == forecast[site.name] if exact else (
            site.bytes_after < forecast[site.name]
        )
    assert "the most that it takes" in planned.notes[0]


def test_alpha_out_of_range() -> None:
    with pytest.raises(BadInput, match="must not be negative"):
        gw.passes.FineQuant(alpha=-0.1)
