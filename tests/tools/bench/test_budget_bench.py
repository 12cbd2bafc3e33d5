"""The bench of searches: what it draws at random, and what it holds searches against."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import graphwright as gw
import numpy as np
import pytest
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.vocab.targets import find_target
from graphwright.passes.weights import tables
from graphwright.tools.bench.budget_forecast import random_choices
from graphwright.tools.bench.budget_knobs import turned
from graphwright.tools.bench.budget_refine import SPLITS, by_halves
from graphwright.tools.bench.budget_rivals import FAST, LIGHT, OTHERS, TABLE, _planned
from graphwright.tools.bench.budget_subject import Subject
from graphwright.tools.search.forms import NO_PATH, Form, Path
from graphwright.tools.search.menu import Menu
from graphwright.tools.search.problem import KEPT, Option, Place, Problem
from graphwright.tools.search.recipe_of import Held

from tests.models import llama, traced


def menu() -> Menu:
    def held(form: Form | None, path: Path, size: float, loss: float) -> Option:
        kind = KEPT if form is None else f"{form.bits} bits"
        return Option(Held(("a",), form, path), {"bytes": size, "loss": loss}, kind)

    two, four = Form("quantize", 2, 32), Form("quantize", 4, 32)
    options = [held(two, NO_PATH, 2, 9), held(two, Path(8), 3, 5), held(four, NO_PATH, 4, 1),
               held(None, NO_PATH, 32, 0)]  # fmt: skip
    places = [Place(name, options, unit) for name, unit in (("a", "half"), ("b", ""), ("c", ""))]
    unit = Option("half", {"bytes": -1, "loss": 3}, "layers")
    return Menu([Problem(places, {"bytes": 10}, {"half": unit})], find_target("cpu"), ("bits",))


def test_random_choices_are_legal_of_every_size_and_cost_what_they_say() -> None:
    choices = list(random_choices(menu().problems, 40))
    assert {c.key for c in choices} == {c.key for c in random_choices(menu().problems, 40)}
    assert len({choice.costs["bytes"] for choice in choices}) > 6
    for choice in choices:
        assert ("a" in choice.chosen) == (not choice.dropped)
        assert choice.costs["loss"] == sum(option.costs["loss"] for option in choice.options)
        size = 10 + sum(option.costs["bytes"] for option in choice.options)
        assert choice.costs["bytes"] == size
        assert not any(option.kind == KEPT for option in choice.options)


def test_bits_alone_have_no_paths_and_every_block() -> None:
    (problem,) = menu().bits_alone().problems
    assert not problem.units
    assert [len(place.options) for place in problem.places] == [3, 3, 3]


def test_a_knob_is_taken_away_and_what_was_turned_is_counted() -> None:
    whole = menu()
    (problem,) = whole.without("bits").problems
    assert [len(place.options) for place in problem.places] == [2, 2, 2] and problem.units
    assert not whole.without("layers").problems[0].units
    assert whole.without("bits").using == ()
    (choice,) = random_choices(whole.problems, 1, seed=3)
    text = turned(choice)
    bits = sum(option.what.form is not None for option in choice.chosen.values())
    assert f"bits {bits} (" in text and ("layers 1" in text) == bool(choice.dropped)


def test_what_searches_are_held_against_can_be_read() -> None:
    for recipes in [*OTHERS.values(), *FAST.values(), *LIGHT.values()]:
        for recipe in recipes:
            assert gw.Recipe.parse(recipe) if "{" in recipe else gw.Recipe.load(recipe)


def test_what_one_half_of_the_rows_chooses_is_taken_where_the_other_half_agrees() -> None:
    """The second recipe is better on all rows, the third one on a few rows by far."""
    losses = np.full((3, 40), 2.0)
    losses[1] = 1.0
    losses[2, :4] = -30.0
    sums = np.stack((losses, np.ones_like(losses)), axis=1)
    assert set(by_halves(sums[:2], 0)[0]) == {1} and by_halves(sums[:2], 0)[1] == 1
    picks, accepted = by_halves(sums, 0)
    assert {1, 2} <= set(picks) and accepted > 0.9
    assert by_halves(sums[:1], 0) == ([0] * SPLITS, 0)


def test_of_rivals_that_do_the_same_one_is_held_against_a_search(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that a head is tied to goes with it, so that a pass behind it for tables finds
    none; a row of 32 is no whole group of 64, so there it stays, and the pass too."""
    monkeypatch.setattr(tables, "LEAST_NUMBERS", 1)
    view = traced(llama(1, tie_word_embeddings=True))
    canonicalize(view)
    subject = SimpleNamespace(graph=view, source=view, structure=recognize(view))
    alone = [f"quantize{{bits=4 group={group}}}" for group in (16, 64)]
    table = TABLE.replace("64", "16")
    texts = [text + more for text in alone for more in ("", table)]
    kept = [text for _, text in _planned(cast("Subject", subject), texts)]
    assert kept == [texts[0], *texts[2:]]
