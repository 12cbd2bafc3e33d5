"""The loop of the zoo's trainers: a killed run resumes as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graphwright.tools.zoo.training import CHECKPOINT, Schedule, train, train_stage


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(11, 16), torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 3)
    )


def loss_of(net: torch.nn.Module, stop: int | None = None):  # type: ignore[no-untyped-def]
    def loss(step: int) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        rng = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 11, (32,), generator=rng)
        return torch.nn.functional.cross_entropy(net(ids), ids % 3)

    return loss


SCHEDULE = Schedule(steps=60, lr=0.05, lr_other=0.05, evaluate_every=20)


def test_it_learns_and_leaves_a_curve(tmp_path: Path) -> None:
    net = model()
    curve = train(net, loss_of(net), SCHEDULE, tmp_path, title="toy",
                  evaluate=lambda: {"found": 0.12345})  # fmt: skip
    assert [point["step"] for point in curve] == [20, 40, 60]
    assert curve[-1]["loss"] < 0.3 < curve[0]["loss"]
    assert curve[0]["found"] == 0.1235 or curve[0]["found"] == 0.1234
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_killed_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model()
    train(whole, loss_of(whole), SCHEDULE, tmp_path / "a", title="toy")
    monkeypatch.setattr("graphwright.tools.zoo.training.CHECKPOINT_SECONDS", -1.0)
    broken = model()
    with pytest.raises(KeyboardInterrupt):
        train(broken, loss_of(broken, stop=33), SCHEDULE, tmp_path / "b", title="toy")
    assert (tmp_path / "b" / CHECKPOINT).is_file()
    resumed = model()
    curve = train(resumed, loss_of(resumed), SCHEDULE, tmp_path / "b", title="toy", resume=True)
    assert [point["step"] for point in curve] == [20, 40, 60]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_stage_is_taken_over(tmp_path: Path) -> None:
    def run(net: torch.nn.Module, stop: int | None, resume: bool) -> list[dict[str, float]]:
        return train_stage(
            net, loss_of(net, stop), SCHEDULE, tmp_path, title="toy", stage="one", resume=resume,
            evaluate=lambda: {"found": 1.0},
        )  # fmt: skip

    first, again = model(), model()
    curve = run(first, None, False)
    assert run(again, 0, True) == curve and len(curve) == 3
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(KeyboardInterrupt):
        run(again, 0, False)


def test_the_rate_rises_and_falls() -> None:
    schedule = Schedule(steps=100, lr=1.0, warmup=0.1, cooldown=0.5)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:51] == [1.0] * 42
    assert factors[99] == pytest.approx(0.02)
    assert factors == sorted(factors[:10]) + factors[10:50] + sorted(factors[50:], reverse=True)
