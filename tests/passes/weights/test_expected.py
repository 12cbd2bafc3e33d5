"""What passes should cost, by their formulas, beside what they do cost; no graph is run."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.core.view import View
from graphwright.ir.run.statistics import AbsMean, Gram, Square, Statistics, Tokens
from graphwright.ir.structure.recognize import Linear, recognize
from graphwright.passes.foreseen import Foreseen
from graphwright.passes.recipe import Recipe
from torch import Tensor

NEAR = {
    "quantize{bits=2}": 0.2, "quantize{bits=3}": 0.1, "quantize{bits=4}": 0.1,
    "quantize{bits=8}": 0.1, "quantize{bits=3 group=0 symmetric=false}": 0.1,
    "easyquant{bits=4 group=32}": 0.15, "hqq{bits=3 group=32}": 0.2,
    "finequant{bits=4 group=32}": 0.1, "awq{bits=3}": 0.25, "gptq{bits=3}": 0.25,
    "gptq{bits=4 symmetric=false act_order=false}": 0.25, "aqlm{bits=2 vectors=16}": 0.4,
    "magnitude{sparsity=0.5}": 0.25, "wanda{sparsity=0.5}": 0.25, "sparsegpt{sparsity=0.5}": 0.3,
    "sparsegpt": 0.3, "wanda": 0.25, "low-rank{ratio=0.3}": 0.6,
    "low-rank{ratio=0.3 whiten=gram}": 1e-3, "low-rank{rank=60}": 0.0,
}  # fmt: skip
"""How near forecasts are to errors on Gaussian weights and correlated inputs, relatively."""


@pytest.fixture(scope="module")
def site(llama: tuple[object, dict[str, View]]) -> Linear:
    """A linear for its name and sizes: ``up``, 32 inputs and 56 outputs."""
    (linear, *_) = (x for x in recognize(llama[1]["fx"]).linears if x.role == "up")
    return linear


def inputs(tokens: int, width: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    mix = torch.eye(width) + 0.1 * torch.randn(width, width, generator=rng)
    return torch.randn(tokens, width, generator=rng) * torch.logspace(-0.7, 0.7, width) @ mix


def statistics_of(x: Tensor) -> Statistics:
    statistics = [Gram(), Square(), AbsMean(), Tokens(most=512)]
    for statistic in statistics:
        statistic.see(x)
    return Statistics(statistics)


@pytest.mark.parametrize("text", NEAR)
def test_a_forecast_is_near_what_is_measured(text: str, site: Linear) -> None:
    (step,) = Recipe.parse(text).steps
    pass_ = step.pass_
    assert isinstance(pass_, Foreseen)
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(site.out_features, site.in_features, generator=rng)
    statistics = statistics_of(inputs(600, site.in_features))
    gap = (weight - pass_.stand_in(site, weight, statistics)).double()
    loss = float(((gap @ statistics[Gram].matrix) * gap).sum())
    forecast = pass_.expected_loss(site, weight, statistics)
    assert forecast**0.5 == pytest.approx(loss**0.5, rel=NEAR[text], abs=1e-6)
