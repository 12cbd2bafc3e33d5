"""Budgets as text, and the integer program behind them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import graphwright as gw
import pytest
from graphwright.tools.search.budget import Budget
from graphwright.tools.search.forms import NO_PATH, Form, Path
from graphwright.tools.search.linears import RANK_ALONE, worth_having
from graphwright.tools.search.prices import prices
from graphwright.tools.search.problem import KEPT, Choice, Option, Place, Problem, useful
from graphwright.tools.search.recipe_of import Held
from graphwright.tools.search.solve import _Program, best, solve
from graphwright.tools.search.uniform import uniform


def test_a_budget_is_a_share_or_a_number_and_prints_as_it_is_read() -> None:
    budget = Budget.parse("bytes=25%, loss=1%")
    assert budget.limits({"bytes": 400.0, "loss": 1.0}) == {"bytes": 100.0, "loss": 0.01}
    assert (str(budget), budget.goal) == ("bytes=25%,loss=1%", "loss")
    assert Budget.parse("bytes=1.5MB").limits({"bytes": 9e9}) == {"bytes": 1.5e6}
    assert Budget.parse("kv=50%,loss=2%").goal == "bytes" != Budget.parse("kv=50%").goal
    assert Budget.parse("kv=50%").limits({"kv": 8.0}) == {"kv": 4.0}
    assert Budget.parse("ms=0.5x,bytes=1MB").limits({"ms": 8.0, "bytes": 1.0})["ms"] == 4.0
    assert Budget.parse("ms=12").limits({"ms": 8.0}) == {"ms": 12.0}
    for text in ("ms=0.5x", "ms=12", "bytes=25%", "bytes=300MB", "bytes=12345678", "kv=2.5%",
                 "loss=0.5%"):  # fmt: skip
        assert str(Budget.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [("byte=25%", "did you mean bytes"), ("bytes=lots", "25% of the source's weights"),
     ("bytes=-1", "above 0"), ("loss", "1%, or 0.01"), ("ms=fast", "0.5x of the source's time"),
     ("bytes=1MB,bytes=2MB", "bounded twice"),
     (" ", "the budget is empty")],
)  # fmt: skip
def test_what_is_no_budget_is_refused_with_one_that_is(text: str, message: str) -> None:
    with pytest.raises(gw.BadInput, match=message):
        Budget.parse(text)


def test_a_measure_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(gw.BadInput, match="keeps no keys and values"):
        Budget.parse("kv=50%").limits({"bytes": 1.0, "loss": 1.0})


SIZES, LOSSES = ((90, 40, 25), (70, 30, 20), (50, 45, 10)), ((0, 3, 9), (0, 5, 6), (0, 1, 7))


@pytest.fixture(params=[7, -4])
def problem(request: pytest.FixtureRequest) -> Problem:
    """Two of three places are in units, of which both lose more, or less, than each by itself."""
    places = [
        Place(f"p{i}", [
            Option((i, j), {"bytes": size, "loss": loss}, "any")
            for j, (size, loss) in enumerate(zip(sizes, losses, strict=True))
        ], unit=("", "half", "other")[i])
        for i, (sizes, losses) in enumerate(zip(SIZES, LOSSES, strict=True))
    ]  # fmt: skip
    units = {
        name: Option(name, {"bytes": -2, "loss": loss}, "layers")
        for name, loss in (("half", 4.5), ("other", 6.5))
    }
    pair = Option(("half", "other"), {"loss": request.param}, "layers")
    return Problem(places, {"bytes": 10}, units, {("half", "other"): pair})


@pytest.mark.parametrize("limit", [63, 80, 97, 128, 150, 220])
def test_the_choice_is_the_best_of_all(problem: Problem, limit: int) -> None:
    ((_, pair),) = problem.pairs.items()

    def cost(measure: str, taken: tuple[Option, ...]) -> float:
        both = [pair] if all(unit in taken for unit in problem.units.values()) else []
        options = [*taken, *both]
        return problem.fixed.get(measure, 0) + sum(o.costs.get(measure, 0) for o in options)

    first, half, last = (place.options for place in problem.places)
    units = problem.units
    every = itertools.product(first, [*half, units["half"]], [*last, units["other"]])
    within = [taken for taken in every if cost("bytes", taken) <= limit]
    choice = solve([problem], {"bytes": limit}, "loss")
    assert choice.costs["loss"] == min(cost("loss", taken) for taken in within)
    assert choice.costs["bytes"] <= limit
    assert ("half" in choice.dropped) == ("p1" not in choice.chosen)
    assert choice.pairs == (problem.pairs if len(choice.dropped) == 2 else {})
    assert choice.costs["loss"] == pytest.approx(sum(o.costs["loss"] for o in choice.options))


def test_some_unit_stays(problem: Problem) -> None:
    assert len(solve([problem], {"bytes": 33}, "loss").dropped) == 2
    with pytest.raises(gw.BadInput, match="the least that these knobs reach is"):
        solve([replace(problem, stay=[["half", "other"]])], {"bytes": 33}, "loss")


def test_problems_that_cannot_be_better_are_not_solved(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ways to drop image tokens are: each loses something by itself and saves something else."""
    problems = [
        replace(problem, fixed={"bytes": 10 - saved}, places=[
            *problem.places, Place("tokens", [Option(loss, {"loss": loss}, "tokens")])
        ])
        for saved, loss in ((0, 0), (0, 3), (40, 1), (500, 9), (-900, 0))
    ]  # fmt: skip
    solved = _Program.solved
    for limit in (63, 97, 150, 220):
        alone = [best([one], {"bytes": limit}, "loss") for one in problems]
        least = min(one.costs["loss"] for one in alone if one is not None)
        tried: list[_Program] = []
        with monkeypatch.context() as patched:
            patched.setattr(_Program, "solved", lambda p, t=tried: t.append(p) or solved(p))
            assert solve(problems, {"bytes": limit}, "loss").costs["loss"] == least
        assert 1 <= len(tried) <= 3
    with monkeypatch.context() as patched:
        patched.setattr(_Program, "solved", lambda _: pytest.fail("no choice is legal"))
        assert best(problems[-1:] * 2, {"bytes": 63}, "loss") is None


def test_a_budget_that_nothing_meets_names_the_nearest(problem: Problem) -> None:
    problem = replace(problem, units={"half": problem.units["half"]}, pairs={})
    with pytest.raises(gw.BadInput, match=r"bytes within 4e-05 MB: .* reach is 4.3e-05 MB"):
        solve([problem], {"bytes": 40}, "loss")
    with pytest.raises(gw.BadInput, match=r"contradict each other: with .*loss is 14.5"):
        solve([problem], {"bytes": 58, "loss": 2}, "loss")
    assert solve([problem], {"loss": 4}, "bytes").costs == {"bytes": 165, "loss": 4}


def test_of_two_candidates_one_that_is_never_better_is_left_out() -> None:
    costs = [(5, 1), (5, 2), (4, 2), (6, 1), (3, 3), (4, 2)]
    options = [Option(i, {"bytes": b, "loss": x}, "") for i, (b, x) in enumerate(costs)]
    assert [o.what for o in useful(options, ("bytes", "loss"))] == [4, 2, 0]


def test_a_menu_without_paths_has_what_a_search_without_them_would_have() -> None:
    """The first beats all others: of those without paths two are worth having, of ranks alone one
    more, and what is kept stays."""

    def held(form: Form | None, path: Path, size: float, loss: float) -> Option:
        kind = KEPT if form is None else "any"
        return Option(Held(("a",), form, path), {"bytes": size, "loss": loss}, kind)

    options = [
        held(Form("gptq", 3, 32), Path(8), 3, 2), held(Form("gptq", 4, 128), NO_PATH, 4, 3),
        held(RANK_ALONE, NO_PATH, 5, 2.5), held(Form("gptq", 4, 128), Path(8), 6, 3),
        held(RANK_ALONE, Path(16), 7, 2.2), held(None, NO_PATH, 8, 2.1),
    ]  # fmt: skip
    assert [o.costs["bytes"] for o in worth_having(options)] == [3, 4, 5, 7, 8]
    # Corrections by kind may make the fourth the better one than the first.
    options[3] = replace(options[3], kind="4 bits")
    assert [o.costs["bytes"] for o in worth_having(options)] == [3, 4, 5, 6, 7, 8]


def test_prices_are_those_of_the_cheapest_step_back_and_of_the_best_one_on() -> None:
    held = [Held(("a",), Form("quantize", bits, 32)) for bits in (2, 4, 8)]
    sizes: list[tuple[float, float]] = [(1e6, 9.0), (2e6, 4.0), (4e6, 1.0)]
    options = [
        Option(h, {"bytes": b, "loss": x}, "any") for h, (b, x) in zip(held, sizes, strict=True)
    ]
    problem = Problem([Place("a", options)], {})
    (price,) = prices([problem], Choice({"a": options[1]}, {}, {}))
    assert price.knob == "bits" and price.last and price.next
    assert (price.last.price, price.next.price) == (5.0, 1.5)
    assert str(price.last) == "a: quantize 4/32 to quantize 2/32"
    slow = [replace(o, costs={**o.costs, "ms": o.costs["bytes"] / 2e6}) for o in options]
    (price,) = prices([Problem([Place("a", slow)], {})], Choice({"a": slow[1]}, {}, {}), "ms")
    assert price.last and price.next and (price.last.price, price.next.price) == (10.0, 3.0)


def test_one_number_of_bits_for_all_linears_that_keeps_the_bounds() -> None:
    """The most bits of which the smaller form fits; a head that has no such form is kept."""

    def options(forms: Sequence[tuple[Form, Path, float, int, float]]) -> list[Option]:
        kept = Option(Held(("any",)), {"bytes": 160, "loss": 0.0}, KEPT)
        return [kept, *(
            Option(Held(("any",), form, path, gone), {"bytes": size, "loss": loss}, "bits")
            for form, path, gone, size, loss in forms
        )]  # fmt: skip

    fine, coarse, few = (Form("gptq", *x) for x in ((8, 32), (8, 128), (4, 32)))
    linear = options((
        (fine, NO_PATH, 0.0, 44, 0.1), (coarse, NO_PATH, 0.0, 41, 0.2), (few, NO_PATH, 0.0, 24, 3),
        (fine, NO_PATH, 0.5, 22, 0.05), (few, Path(8), 0.0, 30, 0.01),
    ))  # fmt: skip
    places = [Place("a", linear), Place("b", linear), Place("head", options(()))]
    problem = Problem(places, {"bytes": 10})
    unread = Place("unread", options(((Form("gptq", 2, 32), NO_PATH, 0.0, 9, 0.0),)))
    assert uniform(replace(problem, places=[*places, unread]), {"bytes": 900}, "loss") is None

    def bits(limit: float, goal: str = "loss", measure: str = "bytes") -> list[Form | None]:
        choice = uniform(problem, {measure: limit}, goal)
        return [] if choice is None else [option.what.form for option in choice.chosen.values()]

    assert bits(10 + 160 + 88) == [fine, fine, None]
    assert bits(10 + 160 + 87) == [coarse, coarse, None]
    assert bits(10 + 160 + 81) == [few, few, None]
    assert bits(10 + 160 + 47) == []
    assert bits(0.4, "bytes", "loss") == [coarse, coarse, None]
