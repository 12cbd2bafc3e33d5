"""Tails, dormant heads and forecasts: the figures, and what the command prints."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.statistics import Moments
from graphwright.tools.cli.main import app
from graphwright.tools.run.outliers import (
    Outlook,
    Tails,
    forecast,
    measured,
    outlook,
    rank_correlation,
    spreads,
)
from typer.testing import CliRunner

from ... import models as small_models


def moments(x: torch.Tensor) -> Moments:
    sums = Moments()
    sums.see(x)
    return sums


def test_kurtosis_is_centred_and_not_cut_off() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(500, 2048, generator=rng)
    assert abs(moments(x).kurtosis) < 0.02
    assert abs(moments(x + 1).kurtosis) < 0.02, "a shift of the mean is not a tail"
    assert moments(torch.rand(500, 2048, generator=rng)).kurtosis == pytest.approx(-1.2, abs=0.02)
    x[:, 7] *= 60
    tails = moments(x)
    assert tails.kurtosis > 100 and tails.outliers() == 1 and tails.massive == 0
    assert tails.top_share == pytest.approx(3600 / (2047 + 3600), rel=0.1)
    x[3, 9] = 5000
    assert moments(x).massive == 1 and moments(x).peak > 50


def test_moments_of_parts_are_those_of_the_whole() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) ** 3
    whole, parts = moments(x), Moments()
    for part in x.split(10):
        parts.see(part)
    for name in ("kurtosis", "peak", "top_share"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name))


def test_ranks() -> None:
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_forecast_is_near_what_is_measured(bits: int) -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 100, generator=rng)
    x = torch.randn(600, 100, generator=rng) * torch.logspace(-1, 1, 100)
    gram = x.double().T @ x.double()
    exact = measured(weight, gram, bits)
    assert forecast(weight, gram, bits) == pytest.approx(exact, rel=0.2)
    halved = forecast(weight, gram, bits) / forecast(weight, gram, bits + 1)
    assert halved == pytest.approx(2)


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_what_is_seen_in_a_model(kind: str) -> None:
    small = small_models.llama(layers=1)
    view: View = small_models.raised(small)[kind]
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(0, small_models.VOCAB, (4, 9), generator=rng)
    outliers = outlook(view, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], 3)
    assert [site.name.split(".")[-1] for site in outliers.sites] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"
    ]  # fmt: skip
    ((name, heads),) = outliers.dormant.items()
    assert name.endswith("o_proj") and heads.shape == (4,)
    assert all(0 < float(share) < 1 for share in heads)
    assert outliers.agreement > 0.8
    for site in outliers.sites:
        assert site.forecast == pytest.approx(site.measured, rel=0.35)


def test_spreads_are_those_of_what_is_measured() -> None:
    def on(*errors: float) -> Outlook:
        sites = [Tails(n, 0, 0, 0, 0, 0, 0, e) for n, e in zip("ab", errors, strict=True)]
        return Outlook(sites, {}, 4, 1)

    assert spreads([on(1, 4), on(2, 4), on(3, 4)]) == {"a": 1, "b": 0}


def test_a_model_without_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphwright.ir.load.trace import trace

    view = trace(torch.nn.ReLU(), (torch.ones(2, 3),))
    with pytest.raises(BadInput, match="no linear of this model has a dense weight"):
        outlook(view, [{}], 4)


def test_the_command() -> None:
    command = ["inspect", "zoo:tiny-vit", "--outliers"]
    data = ["--calib", "zoo:tiny-vit", "--calib", "zoo:tiny-vit", "--calib-samples", "8"]
    done = CliRunner().invoke(app, [*command, *data])
    assert done.exit_code == 0, done.output
    assert "kurtosis" in done.output and "rank correlation of" in done.output
    assert "zoo:tiny-vit, by the mean: 0.0% on average" in " ".join(done.output.split())
    assert isinstance(CliRunner().invoke(app, command).exception, BadInput)
