"""Tails, dormant heads and forecasts: the figures, and what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.statistics import Moments
from graphwright.tools.cli.main import app
from graphwright.tools.run.outliers import Candidate, outlook, rank_correlation
from graphwright.tools.run.outlook_page import write
from typer.testing import CliRunner

from ... import models as small_models


@pytest.fixture(scope="module")
def views() -> dict[str, View]:
    return small_models.raised(small_models.llama(layers=1))


def ids(seed: int, low: int = 0) -> list[dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randint(low, small_models.VOCAB, (8, 9), generator=rng)
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)}]


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


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_what_is_seen_in_a_model(kind: str, views: dict[str, View]) -> None:
    view = views[kind]
    passes = ["quantize{bits=3}", "magnitude{sparsity=0.5 exclude=[*lm_head*]}"]
    outliers = outlook(view, [ids(3)], passes)
    assert [site.name.split(".")[-1] for site in outliers.sites] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"
    ]  # fmt: skip
    ((name, heads),) = outliers.dormant.items()
    assert name.endswith("o_proj") and heads.shape == (4,)
    assert all(0 < float(share) < 1 for share in heads)
    assert list(outliers.agreement) == passes and outliers.overall > 0.8
    assert outliers.agreement[passes[0]] > 0.7
    for site in outliers.sites:
        assert list(site.costs) == (passes[:1] if site.name.endswith("lm_head") else passes)
        for cost in site.costs.values():
            assert cost.forecast == pytest.approx(cost.measured, rel=0.35)
            assert cost.spread is None


def test_how_much_the_data_matters(tmp_path: Path, views: dict[str, View]) -> None:
    """Fitted to each set, judged on all: what needs no data does not differ, feedback does; and the
    page holds what the terminal shows."""
    view = views["fx"]
    sets = [ids(seed, low) for seed, low in ((3, 0), (3, 0), (4, 60))]
    passes = ["quantize{bits=3}", "gptq{bits=3}"]
    outliers = outlook(view, sets, passes)
    spreads = {text: [site.costs[text].spread or 0.0 for site in outliers.sites] for text in passes}
    assert spreads[passes[0]] == [0.0] * 8
    assert all(0.001 < spread < 1 for spread in spreads[passes[1]])
    alike = outlook(view, sets[:2], passes[1:])
    assert all(site.costs[passes[1]].spread == 0 for site in alike.sites)
    write(tmp_path / "a.html", "small <llama>", outliers, ["a.txt", "b", "c"])
    page = (tmp_path / "a.html").read_text()
    assert "small &lt;llama&gt;" in page and page.count("<circle") == 16
    assert "fitted to a.txt, b, c in turn and judged on all" in page
    for site in outliers.sites:
        assert f"<td>{site.costs[passes[1]].measured:.4f}</td>" in page


@pytest.mark.parametrize("text", ["rotate", "gblm", "quantize{kinds=[q]},hqq{kinds=[k]}"])
def test_costs_without_a_formula(text: str) -> None:
    with pytest.raises(BadInput, match="has no formula: it takes one pass that rounds, masks"):
        Candidate.parse(text)


def test_a_model_without_linears() -> None:
    from graphwright.ir.load.tracing.trace import trace

    view = trace(torch.nn.ReLU(), (torch.ones(2, 3),))
    with pytest.raises(BadInput, match="no linear of this model has a dense weight"):
        outlook(view, [[{}]], [])


def test_the_command(tmp_path: Path) -> None:
    command = ["inspect", "zoo:tiny-vit", "--outliers"]
    data = ["--calib", "zoo:tiny-vit", "--calib", "zoo:tiny-vit", "--calib-samples", "8"]
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, [*command, *data, "-p", "quantize{bits=3}", "-o", str(page)])
    assert done.exit_code == 0, done.output
    output = " ".join(done.output.split())
    assert "kurtosis" in output and "1: quantize{bits=3}: relative error of outputs;" in output
    assert "zoo:tiny-vit in turn and judged on all" in output and "0.0% on average" in output
    assert "<h1>zoo:tiny-vit</h1>" in page.read_text()
    assert isinstance(CliRunner().invoke(app, command).exception, BadInput)
