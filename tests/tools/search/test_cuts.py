"""Searches that leave out image tokens: what is behind a cut, and bounds on the cache."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.vocab.targets import find_target
from graphwright.passes.tokens.diverse import Diverse
from graphwright.tools.data.calibration import read
from graphwright.tools.search import skips
from graphwright.tools.search.budget import Budget
from graphwright.tools.search.judge import Judge
from graphwright.tools.search.menu import Menu
from graphwright.tools.search.points import Found, Point
from graphwright.tools.search.problem import Option, Place, Problem
from graphwright.tools.search.recipe_of import Cut, recipe_of
from graphwright.tools.search.search import KNOBS, saving
from graphwright.tools.search.skips import Measured, graph_measures, token_cuts
from graphwright.tools.search.solve import solve
from graphwright.tools.search.telling import search_entry
from graphwright.tools.search.wholes import TOKENS, behind_cut

from .conftest import silent

TARGET = find_target("cpu")


def test_behind_a_cut_blocks_keep_less() -> None:
    """A model of 100 bytes of which 40 lie in places, and 80 of cache; half of a cut's tokens."""
    units = {"block 0.attn": Option("block 0.attn", {"bytes": -5, "kv": -40, "loss": 2}, "layers")}
    places = [Place("a", [Option("b", {"bytes": 40, "loss": 0}, "kept")])]
    base = Problem(places, {"bytes": 60, "kv": 80}, units)
    cut, source = Diverse(keep="50%"), {"bytes": 100, "kv": 80}
    after = behind_cut(base, source, cut, Measured({"bytes": 101, "kv": 40}, 0.5), ())
    assert after.fixed == {"bytes": 61, "kv": 40}
    assert after.units["block 0.attn"].costs == {"bytes": -5, "kv": -20, "loss": 2}
    choice = solve([base, after], {"kv": 30}, "loss")
    assert "block 0.attn" in choice.dropped and choice.costs["kv"] == 40 - 20
    choice = solve([base, after], {"kv": 50}, "loss")
    assert choice.costs == {"bytes": 101, "kv": 40, "loss": 0.5}
    assert [pass_.name for pass_ in recipe_of(choice, TARGET).passes] == ["clean", "diverse"]
    whole = replace(base, places=[*places, Place(TOKENS, [Option(Cut(), {"loss": 0}, "kept")])])
    menu = Menu([whole, after], TARGET, ("tokens", "layers"))
    point, judge = Point(choice, menu.recipe(choice), choice.costs), SimpleNamespace(
        over_words=True, batches=[{"input_ids": torch.ones(2, 3)}]
    )  # fmt: skip
    entry = search_entry(Found(
        point.recipe, point, Budget.parse("kv=50"), {"kv": 50}, source, [point], {}, menu,
        cast("Judge", judge),
    ))  # fmt: skip
    assert entry.held == {"b": 1, "diverse 50%": 1} and entry.judged == 2
    assert [(price.of, price.knob, price.last, price.next) for price in entry.prices] == [
        ("bytes", "layers", 2 / 5 * 1e6, None), ("kv", "layers", 2 / 20 * 1e6, None),
        ("kv", "tokens", None, 0.5 / 40 * 1e6),
    ]  # fmt: skip
    assert entry.prices[-1].next_step == f"{TOKENS}: diverse 50% to all image tokens"


def test_behind_a_cut_only_what_lies_in_blocks_keeps_less() -> None:
    heads = Option("fewer", {"bytes": -4, "kv": -8, "loss": 1}, "heads")
    base = Problem([Place(name, [heads]) for name in ("block", "tower")], {"bytes": 60, "kv": 80})
    cut = Measured({"bytes": 60, "kv": 40}, 0.5)
    after = behind_cut(base, base.fixed, Diverse(keep="50%"), cut, {"block"})
    block, tower = (place.options[0].costs["kv"] for place in after.places[:2])
    assert (block, tower) == (-4, -8)


def test_as_many_image_tokens_stay_as_the_cache_may_hold(
    llava: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shares that are always tried come to a third of the cache, or to two thirds."""
    monkeypatch.setattr(skips, "CUTS", (Diverse(keep="25%"),))
    view = llava.copy()
    canonicalize(view)
    structure = recognize(view)
    batch = {k: t[:1] for k, t in read("zoo:tiny-llava", view).batches[0].items()}
    judge = Judge(view, structure, [batch])
    whole = graph_measures(view, batch)["kv"]
    first, *filling = token_cuts(view, structure, judge, silent, 0.5 * whole)
    assert first[0].keep == "25%" and {cut.name for cut, _ in filling} == {
        "diverse", "fastervlm", "uniform-tokens"
    }  # fmt: skip
    tokens = batch["input_ids"].shape[1]
    for cut, behind in filling:
        assert 0.5 - 1 / tokens < behind.costs["kv"] / whole <= 0.5
        assert cut.keep == filling[0][0].keep
    assert len([*token_cuts(view, structure, judge, silent, whole)]) == 1


def test_what_saves_nothing_that_is_bounded_is_not_surveyed() -> None:
    assert saving({"bytes"}, KNOBS) == ["layers", "heads", "bits", "rank"]
    assert saving({"kv"}, KNOBS) == ["tokens", "layers", "heads", "cache"]
    assert saving({"kv"}, ("bits",)) == ["bits"]  # for which the error names what is reached
    assert saving({"kv", "loss"}, KNOBS) == [*KNOBS]
    assert saving({"ms"}, KNOBS) == [knob for knob in KNOBS if knob != "cache"]
