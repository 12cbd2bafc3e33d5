"""Each statistic against its formula; which tokens count; who may ask for what."""

from __future__ import annotations

import math

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.run.statistics import (
    STATISTICS,
    AbsMax,
    AngularDistance,
    BlockInfluence,
    Gram,
    Mean,
    Square,
    Stat,
    Statistic,
    Statistics,
    Tokens,
    register,
)
from torch import Tensor


def tokens(count: int = 500, width: int = 24) -> Tensor:
    rng = torch.Generator().manual_seed(count)
    return torch.randn(count, width, generator=rng) * torch.logspace(-2, 2, width)


def seen(statistic: Statistic, *values: Tensor, masks: tuple[Tensor, ...] = ()) -> Statistic:
    statistic.see(*(statistic.take(value, masks) for value in values))
    return statistic


# --- formulas ------------------------------------------------------------------------------------


def test_moments_are_sums_over_all_batches() -> None:
    x = tokens()
    statistics: dict[str, Statistic] = {kind.name: kind() for kind in (Gram, Mean, Square, AbsMax)}
    for batch in (x[:100].reshape(4, 25, -1), x[100:101], x[101:]):
        for statistic in statistics.values():
            seen(statistic, batch)
    assert {statistic.count for statistic in statistics.values()} == {500}
    by_kind = Statistics(statistics.values())
    wide = x.double()
    torch.testing.assert_close(by_kind[Mean].mean, wide.mean(0))
    torch.testing.assert_close(by_kind[Square].total, wide.square().sum(0))
    torch.testing.assert_close(by_kind[AbsMax].most, x.abs().amax(0))
    gram = wide.T @ wide
    assert by_kind[Gram].matrix.dtype == torch.float64
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    worst = float((by_kind[Gram].matrix - gram).abs().max())
    assert 0 < worst < 4 * torch.finfo(torch.float32).eps * largest, "float32 in a batch"
    exact = Gram()
    seen(exact, wide)
    torch.testing.assert_close(exact.matrix, gram, rtol=1e-14, atol=0)


def test_a_reservoir_is_a_fair_sample() -> None:
    x = torch.arange(2000.0)[:, None]
    sample = Tokens(most=500)
    for batch in x.split([700, 1, 1299]):
        seen(sample, batch)
    rows = sample.rows[:, 0]
    assert len(rows) == len(rows.unique()) == 500
    assert bool((rows.diff() > 0).all()), "in the order of the stream"
    early = int((rows < 700).sum())
    assert abs(early - 500 * 0.35) < 4 * math.sqrt(500 * 0.35 * 0.65 * 0.75)
    few = Tokens(most=500)
    seen(few, x[:9])
    assert torch.equal(few.rows, x[:9])


def test_what_blocks_do_to_the_stream() -> None:
    before, behind = tokens(12).reshape(3, 4, -1), tokens(13)[1:].reshape(3, 4, -1)
    cosine = torch.nn.functional.cosine_similarity(before.double(), behind.double(), dim=-1)
    influence, angle = BlockInfluence(), AngularDistance()
    seen(influence, before, behind)
    seen(angle, before, behind)
    assert influence.influence == pytest.approx(float(1 - cosine.mean()))
    assert angle.distance == pytest.approx(float(cosine[:, -1].arccos().mean()) / math.pi)
    still = BlockInfluence()
    seen(still, before, before)
    assert still.influence == pytest.approx(0, abs=1e-12)


# --- which tokens --------------------------------------------------------------------------------


def test_masked_tokens_are_left_out() -> None:
    x = tokens(12).reshape(3, 4, -1)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    poisoned = x.masked_fill(~mask[..., None], torch.nan)
    for batch in (poisoned, poisoned.reshape(12, -1)):
        square = Square()
        seen(square, batch, masks=(mask,))
        assert square.count == 9
        torch.testing.assert_close(square.total, x[mask].double().square().sum(0))
    angle = AngularDistance()
    kept = angle.take(poisoned, (mask,))
    assert torch.equal(kept, torch.stack([x[0, 3], x[1, 2], x[2, 3]]))
    other = torch.ones(5, 7).bool()
    assert Square().take(x, (other,)).shape == (12, x.shape[-1]), "a mask of another length"
    assert Square().take(x, (other, mask)).shape == (9, x.shape[-1])


def test_squares_beyond_float32_are_refused() -> None:
    x = tokens(8)
    x[3, 1] = 1e25
    with pytest.raises(BadInput, match=r"up to 1e\+25 .* squares are beyond float32"):
        Gram().see(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    x = tokens(8)
    x[3, 1] = bad
    for name, kind in STATISTICS.items():
        values = [x.reshape(1, 8, -1)] * (2 if kind.at == "block" else 1)
        if name == "angular_distance":
            values = [v[:, :4] for v in values]
        with pytest.raises(BadInput, match="NaN or infinite on the calibration data"):
            seen(kind(), *values)


# --- by name -------------------------------------------------------------------------------------


def test_names_and_places() -> None:
    assert isinstance(Stat("gram", at="linear").make(), Gram)
    statistic = Stat("tokens", at="linear", options=(("most", 7),)).make()
    assert isinstance(statistic, Tokens) and statistic.most == 7
    with pytest.raises(BadInput, match="no statistic 'grams'; did you mean gram"):
        Stat("grams", at="linear")
    with pytest.raises(BadInput, match="gram is taken at a linear, not at a block"):
        Stat("gram", at="block")
    with pytest.raises(BadInput, match="block_influence is taken at a block, not at a linear"):
        Stat("block_influence", at="linear")


def test_a_statistic_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphwright.ir.run.statistics.STATISTICS", dict(STATISTICS))

    @register
    class Least(Statistic):
        name = "least"
        at = "linear"

        def __init__(self) -> None:
            self.least = math.inf

        def add(self, *parts: Tensor) -> None:
            self.least = min(self.least, float(parts[0].min()))

    statistic = seen(Stat("least", at="linear").make(), tokens())
    assert Statistics([statistic])[Least].least == float(tokens().min())
