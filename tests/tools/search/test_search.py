"""The search: what it forecasts is what is measured, what it finds is a recipe like any other."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.ir.core.view import View
from graphwright.ir.vocab.targets import find_target
from graphwright.tools.cli.front_table import print_front
from graphwright.tools.data.calibration import read
from graphwright.tools.report import manifest
from graphwright.tools.run.resume import FolderStore
from graphwright.tools.search.correct import corrections
from graphwright.tools.search.data import _limited, parts, unfitted
from graphwright.tools.search.judge import Judge, Loss
from graphwright.tools.search.points import Found, Point
from graphwright.tools.search.problem import Choice, Option, Place, Problem
from graphwright.tools.search.rounds import STEPS, Rounds
from graphwright.tools.search.search import search
from graphwright.tools.search.solve import solve
from graphwright.tools.search.uniform import uniform
from rich.console import Console

from .conftest import WITHOUT_HEADS, Batches, not_begun, silent

TARGET = find_target("cpu")


@pytest.fixture(scope="module")
def spend(views: dict[str, View], batches: Batches, outcome: Found) -> Callable[..., Found]:
    """Other budgets from the same menu."""

    def spent(budget: str, rounds: int = 0, progress: Any = silent) -> Found:
        return not_begun(views["fx"], batches, outcome, budget, rounds, progress).found()

    return spent


def test_the_recipe_keeps_the_budget_to_the_byte_and_is_like_any_other(
    views: dict[str, View], batches: Batches, outcome: Found
) -> None:
    limit = 0.4 * outcome.source["bytes"]
    measured = [point for point in outcome.front if point.measured]
    assert len(measured) >= 2 and outcome.best in measured
    for point in measured:
        assert point.costs["bytes"] == point.choice.costs["bytes"]
    assert outcome.limits == {"bytes": limit} and outcome.best.costs["bytes"] <= limit
    assert outcome.best.costs["bytes"] > 0.9 * limit
    keys = {point.choice.key for point in measured}
    alone = outcome.menu.bits_alone().problems
    assert solve(alone, outcome.limits, "loss").key in keys
    one_for_all = uniform(alone[0], outcome.limits, "loss")
    assert one_for_all is not None and one_for_all.key in keys
    for step in STEPS:  # by the forecasts of the beginning, as all of the first round
        assert solve(alone, {"bytes": step * limit}, "loss").key in keys
    losses = [p.costs["loss"] for p in outcome.front if not p.measured]
    assert losses == sorted(losses, reverse=True)
    text = str(outcome.recipe)
    assert str(gw.Recipe.parse(text)) == text
    done = gw.optimize(views["fx"], text, calibration=parts(views["fx"], batches).fit)
    assert outcome.judge.of(done.graph).value == pytest.approx(outcome.best.costs["loss"], rel=1e-6)


def test_a_smaller_menu_is_corrected_by_what_was_measured_of_it(
    views: dict[str, View], batches: Batches, outcome: Found
) -> None:
    rounds = not_begun(views["fx"], batches, outcome, "bytes=40%")
    rounds.measured = {point.choice.key: point for point in outcome.front if point.measured}
    rounds.factors = dict.fromkeys(outcome.menu.kinds, 1e6)
    alone = outcome.menu.bits_alone()
    own = [
        (point.choice, outcome.judge.additive(point.costs["loss"]))
        for point in rounds.measured.values() if alone.problems[0].has(point.choice)
    ]  # fmt: skip
    assert len(STEPS) < len(own)
    assert rounds._factors_of(alone) == corrections(own, alone.kinds)
    assert rounds._factors_of(outcome.menu) == rounds.factors
    rounds.measured.clear()
    assert rounds._factors_of(alone) == rounds.factors


def test_without_rounds_the_forecast_decides(spend: Callable[..., Found], outcome: Found) -> None:
    again = spend("bytes=40%")
    assert again.best.measured is None and again.best.costs["bytes"] <= outcome.limits["bytes"]
    assert str(again.recipe) in {str(point.recipe) for point in outcome.front if point.measured}
    loose, tight = (spend(f"loss={x}%").best.costs for x in (5, 0.05))
    assert loose["loss"] <= 0.05 and tight["loss"] <= 0.0005
    assert loose["bytes"] < tight["bytes"]
    with pytest.raises(gw.BadInput, match="the least that these knobs reach is"):
        spend("bytes=1%")


def test_of_measured_points_that_are_nearly_equal_the_surest_is_taken(
    views: dict[str, View], batches: Batches, outcome: Found
) -> None:
    def chosen(budget: str, of: Callable[[Rounds], Point | None] = Rounds.best) -> str:
        rounds = not_begun(views["fx"], batches, outcome, budget)
        points = (("sure", 9.0, 0.02, 0.01, 0.03), ("lucky", 8.0, 0.01, 0.0, 0.05),
                  ("large", 30.0, 0.001, 0.0, 0.002))  # fmt: skip
        for name, size, *loss in points:
            costs = {"bytes": size, "loss": loss[0]}
            point = Point(Choice({}, {}, costs), outcome.recipe, costs, Loss(*loss))
            rounds.measured[name] = point
        return str(next(n for n, point in rounds.measured.items() if point is of(rounds)))

    assert chosen("bytes=10") == "sure"
    assert chosen("bytes=8") == chosen("loss=3%") == "lucky"
    # What keeps neither bound is as near as the one that it exceeds more.
    assert chosen("bytes=7,loss=0.5%", Rounds.nearest) == "lucky"


def test_what_took_more_bytes_than_forecast_is_not_found_again(
    views: dict[str, View], batches: Batches, outcome: Found
) -> None:
    rounds = not_begun(views["fx"], batches, outcome, "bytes=100")
    for forecast, size in ((50.0, 46.0), (60.0, 68.0), (70.0, 70.0)):
        point = Point(Choice({}, {}, {"bytes": forecast}), outcome.recipe, {"bytes": size})
        rounds.measured[forecast] = point
        assert rounds.additive_limits({"bytes": 100.0})["bytes"] == (100 if size < 50 else 92)


def test_what_is_not_fitted_to_is_judged_by(tmp_path: Path) -> None:
    view = tiny()
    rows = torch.arange(1500.0).view(500, 3)
    np.savez(tmp_path / "rows.npz", input=rows.numpy())
    batches = read(str(tmp_path / "rows.npz"), view).batches
    more = unfitted(str(tmp_path / "rows.npz"), view, batches)
    known = parts(view, batches, more)
    fitted, judged, probed = (
        torch.cat([b["input"] for b in part]) for part in (known.fit, known.judge, known.probe)
    )
    assert torch.equal(torch.cat((fitted, judged)), rows) and len(fitted) == 128
    assert torch.equal(probed, judged[: len(probed)])
    assert not unfitted(str(tmp_path / "rows.npz"), view, more)
    alone = parts(view, batches)
    assert sum(len(b["input"]) for b in alone.fit) == sum(len(b["input"]) for b in alone.judge)
    # Of prompts of an image each a few are judged by, however many tokens they have.
    prompts = [{"input_ids": torch.zeros(3, 620)} for _ in range(5)]
    assert [len(batch["input_ids"]) for batch in _limited(prompts, 1024, 8)] == [3, 3, 2]
    assert [len(batch["input_ids"]) for batch in _limited(prompts, 1024)] == [1]


def test_an_interrupt_gives_the_best_so_far(spend: Callable[..., Found]) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if "best so far" in what:
            raise KeyboardInterrupt

    done = spend("bytes=45%", rounds=4, progress=interrupt)
    assert done.best.measured is not None and "interrupted" in done.notes[-1]
    assert sum(point.measured is not None for point in done.front) == 1


class Killed(Exception):
    """What no search catches."""


def test_a_killed_search_goes_on_to_the_same_end(
    views: dict[str, View], batches: Batches, outcome: Found, tmp_path: Path
) -> None:
    def run(die_at: int) -> tuple[list[str], Found | None]:
        steps: list[str] = []

        def progress(what: str, done: int, total: int) -> None:
            steps.append(what)
            if sum("measuring" in one for one in steps) == die_at:
                raise Killed

        with contextlib.suppress(Killed):
            return steps, search(
                views["fx"], budget="bytes=40%", calibration=batches, rounds=1, progress=progress,
                using=WITHOUT_HEADS, checkpoints=FolderStore(tmp_path, {}),
            )  # fmt: skip
        return steps, None

    steps, nothing = run(2)
    assert nothing is None and any("fitting" in what for what in steps)
    steps, again = run(-1)
    assert again is not None and again.factors == outcome.factors
    assert steps and all("measuring" in what for what in steps)
    assert len(steps) == sum(point.measured is not None for point in outcome.front) - 1
    for now, then in zip(again.front, outcome.front, strict=True):
        assert (str(now.recipe), now.costs, now.measured) == (
            str(then.recipe), then.costs, then.measured
        )  # fmt: skip


def test_what_cannot_be_searched_is_refused(views: dict[str, View], batches: Batches) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(gw.BadInput) as error:
            gw.search(views["fx"], **{"calibration": batches, "budget": "bytes=30%"} | options)
        return str(error.value)

    assert "give --calib DATA" in refused(calibration=[])
    assert "did you mean bits" in refused(using=("bit",))
    assert "such as by kv=50%" in refused(using=("tokens",))
    assert "refine=-1: seconds, 0 or more" in refused(refine=-1)


def test_forecasts_are_corrected_by_what_was_measured() -> None:
    options = [Option(i, {"loss": 1.0}, kind) for i, kind in enumerate(("2 bits", "4 bits"))]

    def choice(a: int, b: int) -> Choice:
        return Choice({"a": options[a], "b": options[b]}, {}, {})

    kinds = {"2 bits", "4 bits", "layers"}
    assert corrections([], kinds) == {}
    assert corrections([(choice(1, 1), 3.0)], kinds) == pytest.approx(dict.fromkeys(kinds, 1.5))
    measured = [(choice(1, 1), 1.0), (choice(0, 0), 6.0), (choice(0, 1), 3.5)]
    factors = corrections(measured, kinds)
    assert factors["4 bits"] == pytest.approx(0.5, rel=0.1)
    assert factors["2 bits"] == pytest.approx(3.0, rel=0.1)
    free = corrections([(choice(1, 1), 2.0), (choice(0, 1), 1.0)], kinds)
    assert free["2 bits"] > 0.1  # though what was measured says that it loses nothing
    corrected = Problem([Place("a", options)], {}).corrected(factors).corrected(factors)
    assert [o.costs["loss"] for o in corrected.places[0].options] == [
        factors["2 bits"], factors["4 bits"]
    ]  # fmt: skip


def test_a_recipe_that_does_not_run_is_left_out_and_told(
    views: dict[str, View], batches: Batches, spend: Callable[..., Found],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, asked = gw.optimize, list[str]()

    def failing(graph: View, recipe: gw.Recipe, **options: Any) -> Any:
        asked.append(str(recipe))
        if len(set(asked)) == 1:
            raise gw.BadInput("matches no site")
        return whole(graph, recipe, **options)

    monkeypatch.setattr("graphwright.tools.search.measure.optimize", failing)
    found = spend("bytes=40%", rounds=2)
    assert str(found.recipe) != asked[0] and asked.count(asked[0]) == 1
    assert "recipes that do not run, left out: 1 (matches no site)" in found.notes
    monkeypatch.setattr(
        "graphwright.tools.search.measure.optimize", lambda *_, **__: failing_always()
    )
    with pytest.raises(gw.BadInput, match=r"^matches no site$"):
        spend("bytes=41%", rounds=2)


def failing_always() -> None:
    raise gw.BadInput("matches no site")


def test_one_knob_alone_without_which_nothing_is_left_to_choose(
    views: dict[str, View], batches: Batches
) -> None:
    found = search(
        views["fx"], budget="bytes=90%", calibration=batches, rounds=1, using=("layers",)
    )
    assert found.best.measured and found.best.choice.dropped and not found.best.choice.chosen


def test_where_nothing_can_be_chosen_that_is_said() -> None:
    with pytest.raises(gw.BadInput, match="nothing to choose from by layers"):
        gw.search(tiny(), budget="bytes=50%", calibration=[{"input": torch.ones(4, 3)}],
                  using=("layers",))  # fmt: skip
    with pytest.raises(gw.BadInput, match="by heads: no attention and no feed-forward is seen"):
        gw.search(tiny(), budget="bytes=50%", calibration=[{"input": torch.ones(4, 3)}],
                  using=("heads",))  # fmt: skip


def tiny() -> View:
    """One linear, and no block."""
    return gw.trace(torch.nn.Linear(3, 3), (torch.ones(4, 3),))


@pytest.fixture(scope="module")
def artifact(language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from graphwright.ir.load.zoo.text import english_sentences
    from graphwright.tools.cli.main import main

    folder = tmp_path_factory.mktemp("searched")
    (folder / "text.txt").write_text("\n\n".join(english_sentences(150)))
    command = [str(language_model), "--budget", "bytes=60%", "--calib", str(folder / "text.txt"),
               "--calib-length", "32", "--using", "heads,bits",
               "-o", str(folder / "out")]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as leave:
        patch.setattr(Rounds, "front", broken)
        main(command)
    assert leave.value.code == 1 and (folder / "out.partial" / "run.json").exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as leave:
        patch.setattr(Judge, "of", broken)  # all was measured already
        main([*command, "--resume"])
    assert leave.value.code == 0
    return folder / "out"


def broken(*_: Any) -> Any:
    raise Killed


def test_the_manifest_holds_the_front_and_the_prices(
    artifact: Path, command: Any, keeps_schema: Any
) -> None:
    keeps_schema(json.loads((artifact / manifest.FILE_NAME).read_bytes()))
    done = manifest.load(artifact)
    assert done.search is not None
    (chosen,) = (point for point in done.search.front if point.chosen)
    assert chosen.recipe == done.recipe and chosen.interval is not None
    assert chosen.bytes == done.passes[-1].bytes_after <= 0.6 * done.passes[0].bytes_before
    assert any(point.interval is None for point in done.search.front)
    assert {"bits", "heads"} <= {price.knob for price in done.search.prices}
    code, out, _ = command("front", str(artifact))
    assert code == 0 and "chosen" in out and "forecast" in out and "loss by a megabyte" in out
    weights = done.passes[0].bytes_before
    assert done.search.source["bytes"] == weights
    done.sizes.source_bytes = 2 * weights  # as the files of a graph may be larger than its weights
    console = Console(record=True, width=120)
    print_front(console, done)
    assert f"{chosen.bytes / weights:.1%}" in console.export_text()
    page = (artifact / "report.html").read_text()
    assert 'aria-label="Loss against weights"' in page and "Bits of a weight by depth" in page
    code, _, _ = command("replay", str(artifact))
    assert code == 0


def test_the_command_refuses_a_recipe_beside_a_budget(plain_artifact: Path, command: Any) -> None:
    code, _, err = command("zoo:tiny-vit", "--budget", "bytes=30%", "-r", "w4")
    assert code == 2 and "not both" in err
    code, _, err = command("zoo:tiny-vit", "--using", "bits")
    assert code == 2 and "give --budget too" in err
    code, _, err = command("zoo:tiny-vit", "--workers", "2")
    assert code == 2 and "how many processes search: give --budget too" in err
    code, _, err = command("zoo:tiny-vit", "--refine", "60")
    assert code == 2 and "goes on from what a search found: give --budget too" in err
    code, _, err = command("front", str(plain_artifact))
    assert code == 2 and ("not searched for" in err or "holds no" in err)
