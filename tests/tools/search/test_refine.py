"""The refinement: what it proposes is near, new and within bounds; what it finds is better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.vocab.targets import find_target
from graphwright.tools.search import refine
from graphwright.tools.search.budget import Budget
from graphwright.tools.search.data import parts
from graphwright.tools.search.forms import NO_PATH, Form, Path
from graphwright.tools.search.judge import Judge
from graphwright.tools.search.menu import Menu
from graphwright.tools.search.near import near
from graphwright.tools.search.points import Found
from graphwright.tools.search.problem import KEPT, Choice, Key, Option, Place, Problem
from graphwright.tools.search.recipe_of import Held
from graphwright.tools.search.refine import REST, Allowance, drawn
from graphwright.tools.search.rounds import Rounds
from graphwright.tools.search.solve import best

from .conftest import Batches, Memory

SIZES = {2: 1.0, 4: 2.0, 8: 4.0}
PLACES, UNITS = 12, ("block 0.attn", "block 1.attn")


def problem(seed: int = 0) -> Problem:
    """Places of three widths each, two of them in each of two halves of blocks, and a cut."""
    rng = np.random.default_rng(seed)
    places = []
    for i in range(PLACES):
        minded = float(rng.lognormal(-6, 1))
        options = [
            Option(bits, {"bytes": size, "loss": minded * 4.0**-bits * 16}, f"{bits} bits")
            for bits, size in SIZES.items()
        ]
        places.append(Place(f"p{i}", options, UNITS[i // 2] if i < 4 else ""))
    units = {u: Option(u, {"bytes": 0.0, "loss": 0.02}, "layers") for u in UNITS}
    pairs = {UNITS: Option(UNITS, {"loss": 0.01}, "layers")}
    return Problem(places, {"bytes": 3.0}, units, pairs)


def true(known: Problem, seed: int = 1) -> Problem:
    """What losses really are: by each option otherwise than forecast."""
    rng = np.random.default_rng(seed)
    factors = {key: float(rng.lognormal(0, 0.4)) for key in known.options}
    return known.with_losses(lambda key, option: option.costs["loss"] * factors[key])


def all_choices(known: Problem) -> Iterator[Choice]:
    for gone in itertools.product((False, True), repeat=len(UNITS)):
        dropped = {u: known.units[u] for u, is_gone in zip(UNITS, gone, strict=True) if is_gone}
        there = [place for place in known.places if place.unit not in dropped]
        for options in itertools.product(*(place.options for place in there)):
            yield known.choice(
                {place.name: o for place, o in zip(there, options, strict=True)}, dropped
            )


def changes(one: Choice, other: Choice) -> int:
    shared = one.chosen.keys() & other.chosen.keys()
    swapped = sum(one.chosen[name].what != other.chosen[name].what for name in shared)
    return swapped + len(one.dropped.keys() ^ other.dropped.keys())


def test_neighbours_are_the_best_of_all_that_are_near_and_new() -> None:
    known = problem()
    known = Problem(known.places[:6], known.fixed, known.units, known.pairs)
    every = [choice for choice in all_choices(known) if choice.costs["bytes"] <= 14]
    whole = best([known], {"bytes": 14}, "loss")
    gone = best([known], {"bytes": 14}, "loss", near(known.choice({
        f"p{i}": known.places[i].options[0] for i in range(2, 6)
    }, {UNITS[0]: known.units[UNITS[0]]}), 0, ()))  # fmt: skip
    assert whole is not None and gone is not None and list(gone.dropped) == [UNITS[0]]
    for centre, most in ((whole, 1), (whole, 3), (gone, 1), (gone, 2)):
        besides = [centre]
        for _ in range(4):
            proposal = best([known], {"bytes": 14}, "loss", near(centre, most, besides))
            news = [
                c for c in every
                if changes(c, centre) <= most and all(c.key != b.key for b in besides)
            ]  # fmt: skip
            assert proposal is not None and changes(proposal, centre) <= most
            assert proposal.key not in {b.key for b in besides} and proposal.costs["bytes"] <= 14
            assert proposal.costs["loss"] == pytest.approx(min(c.costs["loss"] for c in news))
            besides.append(proposal)
    assert best([known], {"bytes": 14}, "loss", near(whole, 0, [whole])) is None


def test_what_is_drawn_agrees_with_what_was_measured() -> None:
    known = problem()
    really, rng = true(known).options, np.random.default_rng(2)
    problems, measured = [known], []
    for size in (12, 14, 16, 20, 30):
        choice = best(problems, {"bytes": size}, "loss")
        assert choice is not None
        measured.append((choice, sum(really[key].costs["loss"] for key in choice.keys)))
    ratios = []
    for _ in range(50):
        (draw,) = drawn(problems, measured, rng)
        assert all(o.costs["bytes"] == known.options[k].costs["bytes"]
                   for k, o in draw.options.items() if k[0] != UNITS)  # fmt: skip
        assert all(o.forecast == known.options[key].costs["loss"]
                   for key, o in draw.options.items())  # fmt: skip
        for choice, loss in measured:
            ratios.append(sum(draw.options[key].costs["loss"] for key in choice.keys) / loss)
    assert np.mean(ratios) == pytest.approx(1, abs=REST)
    assert np.std(ratios) < 2 * REST


class Toy(Menu):
    """A menu whose recipes are what their choices took."""

    def recipe(self, choice: Choice) -> Any:
        return tuple(choice.keys)


@dataclass
class Oracle:
    """Workers that know what each option loses, and end in any order."""

    options: dict[Key, Option]
    backwards: bool = False
    dies_at: int = -1
    count: int = 0

    def run(
        self, tasks: Sequence[Any], begin: Callable[[int], None], done: Callable[[int, Any], None]
    ) -> None:
        for place in reversed(range(len(tasks))) if self.backwards else range(len(tasks)):
            begin(place)
            if self.count == self.dies_at:
                raise KeyboardInterrupt
            self.count += 1
            loss = math.expm1(sum(self.options[key].costs["loss"] for key in tasks[place]))
            done(place, {"costs": {}, "loss": [loss, loss, loss]})

    def close(self) -> None:
        pass


Spend = Callable[..., tuple[Found, Oracle]]


@pytest.fixture(scope="module")
def spend(views: dict[str, View], batches: Batches) -> Spend:
    """A search by the toy's forecasts, whose measured losses are the oracle's."""
    view = views["fx"]
    judge, data = Judge(view, recognize(view), batches[:1]), parts(view, batches)

    def spent(
        budget: str, seconds: float, store: Memory | None = None, seed: int = 1, **options: Any
    ) -> tuple[Found, Oracle]:
        known = problem()
        oracle = Oracle(true(known, seed).options, **options)
        rounds = Rounds(
            view, view, Budget.parse(budget), data, Toy([known], find_target("cpu"), ("bits",)),
            judge, 4, lambda *_: None, store, oracle, seconds,
        )  # fmt: skip
        return rounds.found(), oracle

    return spent


def measured(outcome: Found) -> list[tuple[Any, ...]]:
    return [(p.recipe, dict(p.costs), p.measured) for p in outcome.front if p.measured]


def test_a_refinement_finds_the_best_where_forecasts_mislead_the_rounds(spend: Spend) -> None:
    better = []
    for seed, size in ((1, 20), (3, 20)):
        alone, refined = (spend(f"bytes={size}", s, seed=seed)[0] for s in (0, math.inf))
        optimum = best([true(problem(), seed)], {"bytes": size}, "loss")
        assert optimum is not None and refined.best.costs["bytes"] <= size
        assert refined.best.costs["loss"] == pytest.approx(math.expm1(optimum.costs["loss"]))
        better.append(refined.best.costs["loss"] < 0.95 * alone.best.costs["loss"])
        names = {recipe for recipe, *_ in measured(alone)}
        assert names < {recipe for recipe, *_ in measured(refined)}
    assert all(better)


def test_where_the_loss_is_bounded_bytes_are_saved_and_the_bound_is_met(spend: Spend) -> None:
    alone, refined = (spend("loss=4%", s, seed=3)[0].best.costs for s in (0, math.inf))
    assert refined["bytes"] < alone["bytes"] and refined["loss"] <= 0.04
    with pytest.raises(BadInput, match="nothing that was measured keeps loss=3%"):
        spend("loss=3%", 0, seed=3)
    assert spend("loss=3%", math.inf, seed=3)[0].best.costs["loss"] <= 0.03


def test_a_refinement_is_the_same_whoever_measures_and_goes_on_when_killed(spend: Spend) -> None:
    rounds = len(measured(spend("bytes=14", 0)[0]))
    once, oracle = spend("bytes=14", math.inf)
    assert measured(spend("bytes=14", math.inf, backwards=True)[0]) == measured(once)
    store = Memory()
    broken, _ = spend("bytes=14", math.inf, store, dies_at=oracle.count - 3)
    assert "interrupted" in broken.notes[-1]
    assert len(measured(broken)) == oracle.count - 3
    again, rest = spend("bytes=14", math.inf, store)
    assert rest.count == 3 and measured(again) == measured(once)
    assert once.notes[-1].startswith(f"refined: {len(measured(once)) - rounds} neighbours")


def test_a_step_begins_where_it_fits_into_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 1.0, 4.0, 6.5))
    monkeypatch.setattr(refine.time, "monotonic", lambda: next(now))
    allowance = Allowance(9)
    assert [allowance.step() for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("close", [True, False])
def test_what_a_menu_without_a_knob_would_give_is_measured_too_where_it_is_close(
    views: dict[str, View], batches: Batches, close: bool
) -> None:
    """A half of a block has to go, and what is forecast to be best beside that has a path."""
    kinds = ((2, Path(8), 0.01), (4, NO_PATH, 0.012 if close else 0.03), (2, NO_PATH, 0.1))
    options = [
        Option(
            Held(("a",), Form("gptq", bits, 32), path), {"bytes": float(bits), "loss": loss},
            f"{bits} bits",
        )
        for bits, path, loss in kinds
    ]  # fmt: skip
    options.append(Option(Held(("a",)), {"bytes": 30.0, "loss": 0.0}, KEPT))
    inside = Option(Held(("b",)), {"bytes": 9.0, "loss": 0.0}, KEPT)
    half = Option(UNITS[0], {"bytes": 0.0, "loss": 0.005}, "layers")
    known = Problem(
        [Place("a", options), Place("b", [inside], UNITS[0])], {"bytes": 3.0}, {UNITS[0]: half}
    )
    really = known.with_losses(
        lambda _, o: o.costs["loss"] * (3 if o.what == options[0].what else 1)
    )
    view, oracle = views["fx"], Oracle(really.options)
    rounds = Rounds(
        view, view, Budget.parse("bytes=8"), parts(view, batches),
        Toy([known], find_target("cpu"), ("layers", "bits", "rank")),
        Judge(view, recognize(view), batches[:1]), 1, lambda *_: None, workers=oracle,
    )  # fmt: skip
    best_of = rounds.found().best.choice.chosen["a"]
    assert best_of.what == options[1 if close else 0].what
    assert oracle.count == (2 if close else 1)
