"""Heads and units as a knob: which may go, what that weighs and loses, and how it is chosen."""

from __future__ import annotations

import itertools

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.structure.costs import graph_costs
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.vocab.targets import find_target
from graphwright.passes.linear_pass import weight_of
from graphwright.passes.tokens.fastervlm import FasterVLM
from graphwright.passes.weights.quantize import Quantize
from graphwright.tools.bench.budget_forecast import random_choices
from graphwright.tools.bench.budget_knobs import turned
from graphwright.tools.search.budget import Budget
from graphwright.tools.search.data import parts
from graphwright.tools.search.forms import Form
from graphwright.tools.search.heads import (
    by_linear,
    measured_sites,
    site_places,
    sites_of,
    thinned,
    why_whole,
    with_all_heads,
)
from graphwright.tools.search.judge import Judge
from graphwright.tools.search.measure import measured
from graphwright.tools.search.menu import Menu, fit_for
from graphwright.tools.search.near import near
from graphwright.tools.search.prices import prices
from graphwright.tools.search.problem import KEPT, Choice, Option, Place, Problem
from graphwright.tools.search.recipe_of import Held, Thinned, recipe_of
from graphwright.tools.search.rounds import Rounds
from graphwright.tools.search.skips import Measured, graph_measures
from graphwright.tools.search.solve import best, solve
from graphwright.tools.search.timing import changed
from graphwright.tools.search.wholes import in_tower, work

from tests.models import plain, vit

from .conftest import Batches, Memory, silent


@pytest.fixture(scope="module")
def judge(source: View, batches: Batches) -> Judge:
    return Judge(source, recognize(source), parts(source, batches).judge)


@pytest.fixture(scope="module")
def store() -> Memory:
    """What a killed search would go on with."""
    return Memory()


@pytest.fixture(scope="module")
def menu(source: View, batches: Batches, judge: Judge, store: Memory) -> Menu:
    known, knobs = parts(source, batches), ("heads", "bits", "layers")
    return Menu.of(source, known, judge, find_target("cpu"), knobs, silent, store)


def test_shares_that_come_to_one_number_are_one(source: View) -> None:
    sites = {site.name: site for site in sites_of(source, recognize(source))}
    assert len(sites) == 4
    for site in sites.values():
        counts = {what.gone: site.staying(what) for what in site.options}
        assert counts == (
            {0: 2, 0.25: 1} if site.place.kind == "heads"
            else {0: 56, 0.125: 49, 0.25: 42, 0.5: 28, 0.75: 14}
        )  # fmt: skip


def alone(problem: Problem, site: Place, taken: Option) -> Choice:
    """Nothing but that a site loses a share."""
    key = (site.name, taken.what)
    chosen = {
        place.name: next(
            o for o in place.options
            if o.kind == KEPT and (o.beside is None or o.beside[0] != site.name or o.beside == key)
        )
        for place in problem.places
    }  # fmt: skip
    return problem.choice({**chosen, site.name: taken}, {})


def test_bytes_are_exact_and_a_site_alone_loses_what_was_forecast(
    source: View, batches: Batches, judge: Judge, menu: Menu, store: Memory
) -> None:
    fit = parts(source, batches).fit
    (problem,) = menu.problems
    losing = [
        choice for choice in random_choices(menu.problems, 12)
        if "heads" in turned(choice) and choice.dropped
    ]  # fmt: skip
    assert len(losing) > 1
    sites = sites_of(source, recognize(source))
    again = measured_sites(source, sites, (), judge, silent, store)  # as a resumed search has it
    assert {what: alone.loss for what, alone in again.items()} == {
        o.what: o.costs["loss"] for place in problem.places for o in place.options
        if o.kind == "heads"
    }  # fmt: skip
    for choice in losing[:2]:
        done = measured(source, judge, fit, menu.recipe(choice))
        assert done["costs"]["bytes"] == choice.costs["bytes"]
    for kind in ("heads", "units"):
        site = next(place for place in problem.places if place.name.startswith(f"{kind} of"))
        choice = alone(problem, site, site.options[-1])
        recipe = menu.recipe(choice)
        assert "flap{" in str(recipe) and "quantize" not in str(recipe)
        done = measured(source, judge, fit, recipe)
        assert done["costs"]["bytes"] == choice.costs["bytes"]
        assert judge.additive(done["loss"][0]) == pytest.approx(choice.costs["loss"], rel=1e-3)


def test_a_search_takes_heads_and_units_where_bits_do_not_suffice(
    source: View, batches: Batches, judge: Judge, menu: Menu
) -> None:
    without = menu.without("heads")
    whats = (option.what for option in without.problems[0].options.values())
    assert not any(what.gone for what in whats if isinstance(what, Held | Thinned))
    least = {name: solve(m.without("layers").problems, {}, "bytes").costs["bytes"]
             for name, m in (("heads", menu), ("none", without))}  # fmt: skip
    assert least["heads"] < 0.9 * least["none"]
    limit = round((least["heads"] + least["none"]) / 2)
    done = Rounds(
        source, source, Budget.parse(f"bytes={limit}"), parts(source, batches),
        menu.without("layers"), judge, 1, silent,
    ).found()  # fmt: skip
    assert done.best.measured is not None and done.best.costs["bytes"] <= limit
    assert "heads" in turned(done.best.choice) and "across=place" in str(done.recipe)
    knobs = {price.knob for price in prices(done.menu.corrected(done.factors), done.best.choice)}
    assert {"heads", "bits"} <= knobs


class InCodes(MemoryWeight):
    """Numbers that a checkpoint holds as codes of 4 bits."""

    @property
    def stored_bytes(self) -> int:
        return self.nbytes // 8


def test_what_stays_of_a_weight_in_codes_weighs_what_numbers_do(
    source: View, batches: Batches
) -> None:
    view = source.copy()
    for linear in recognize(view).linears:
        if linear.block == 0:
            view.set_weight(linear.weight, InCodes(weight_of(view, linear).read()))
    site = by_linear(sites_of(view, recognize(view)))[
        next(x.name for x in recognize(view).linears if x.block == 0 and x.role == "down")
    ]
    half = next(what for what in site.options if what.gone == 0.5)
    smaller = thinned(view, {site.place.name: range(site.staying(half))})
    before, after = (graph_measures(x, batches[0]) for x in (view, smaller))
    names = [x.name for x in site.place.linears]
    (place,) = site_places(view, [site], {
        what: Measured(after, 0.0) for what in site.options
    }, before, names, None)  # fmt: skip
    (gone,) = (option for option in place.options if option.what == half)
    whole = sum(weight_of(view, x).stored_bytes for x in site.place.linears)
    part = sum(weight_of(view, x).nbytes // 2 for x in site.place.linears)
    assert before["bytes"] - whole + gone.costs["bytes"] + part == after["bytes"]


def test_one_row_takes_no_heads_away(
    source: View, batches: Batches, judge: Judge
) -> None:
    """What stands in for them would be fitted to the row that judges it."""
    known = parts(source, [{name: tensor[:1] for name, tensor in batches[0].items()}])
    assert known.shared
    menu = Menu.of(source, known, judge, find_target("cpu"), ("heads", "bits"), silent)
    places = [place for problem in menu.problems for place in problem.places]
    assert places and not any(option.kind == "heads" for p in places for option in p.options)
    assert [note.partition(":")[0] for note in menu.notes] == [
        "all data are one row, fitted to and judged by", "heads and units stay",
    ]  # fmt: skip


def test_work_is_that_of_all_a_picture_s_tokens() -> None:
    view = plain(vit())
    costs = graph_costs(view, {"batch": 1})
    structure = recognize(view)
    linears = sum(x.in_features * x.out_features for x in structure.linears)
    pictures = [{"pixel_values": torch.zeros(n, 3, 16, 16)} for n in (3, 2)]
    assert work(view, structure, pictures) == 5 * float(costs.macs or 0) > 5 * 10 * linears


def test_why_no_heads_may_go_is_said(source: View) -> None:
    stored = changed(source, Quantize(bits=4, group=32))
    reason = why_whole(stored, recognize(stored))
    assert "is stored in another form already" in reason and "3 more places" in reason


def test_heads_alone_take_their_linears_along(
    source: View, batches: Batches, judge: Judge
) -> None:
    known, target = parts(source, batches), find_target("cpu")
    (problem,) = Menu.of(source, known, judge, target, ("heads",), silent).problems
    assert {place.options[0].what.kind for place in problem.places} == {"heads", "units"}
    choice = solve([problem], {}, "bytes")
    done = measured(source, judge, known.fit, recipe_of(choice, target))
    assert done["costs"]["bytes"] == choice.costs["bytes"] < 0.7 * problem.fixed["bytes"]


SITE = "units of down"


@pytest.fixture
def tied() -> Problem:
    """A site and its two linears, which hold two forms at each of two sizes; and another linear."""
    held = [Form("quantize", bits, 32) for bits in (2, 4)]
    shares = [Thinned("down", "units", gone) for gone in (0.0, 0.5)]
    site = Place(SITE, [
        Option(what, {"bytes": 0.0, "loss": 6.0 * (what.gone > 0)}, "heads") for what in shares
    ])  # fmt: skip
    linears = [
        Place(name, [
            Option(
                Held((name,), form, gone=what.gone),
                {"bytes": 10.0 * form.bits * (1 - what.gone), "loss": loss}, "any",
                beside=(SITE, what),
            )
            for what in shares for form, loss in zip(held, losses, strict=True)
        ])
        for name, losses in (("up", (9.0, 2.0)), ("down", (5.0, 1.0)))
    ]  # fmt: skip
    other = Place("o", [
        Option(Held(("o",), form), {"bytes": 10.0 * form.bits, "loss": loss}, "any")
        for form, loss in zip(held, (3.0, 1.0), strict=True)
    ])  # fmt: skip
    return Problem([site, *linears, other], {"bytes": 1.0})


@pytest.mark.parametrize("limit", [41, 61, 71, 81, 91, 121])
def test_what_a_linear_holds_goes_with_what_its_site_holds(tied: Problem, limit: int) -> None:
    def legal(options: tuple[Option, ...]) -> bool:
        return all(o.beside is None or o.beside == (SITE, options[0].what) for o in options)

    every = [
        tied.choice(dict(zip((p.name for p in tied.places), options, strict=True)), {})
        for options in itertools.product(*(place.options for place in tied.places))
        if legal(options)
    ]
    within = [choice for choice in every if choice.costs["bytes"] <= limit]
    choice = solve([tied], {"bytes": limit}, "loss")
    assert choice.key in {one.key for one in every}
    assert choice.costs["loss"] == min(one.costs["loss"] for one in within)


def test_a_site_that_shrinks_is_one_change_with_all_its_linears(tied: Problem) -> None:
    centre = solve([tied], {}, "loss")
    nearest = best([tied], {"bytes": 81}, "loss", near(centre, 1, [centre]))
    assert nearest is not None and nearest.chosen[SITE].what.gone == 0.5
    assert {o.what.form.bits for n, o in nearest.chosen.items() if n != SITE} == {4}
    (price,) = (price for price in prices([tied], centre) if price.knob == "heads")
    assert price.last is not None and price.next is None
    assert price.last.price == pytest.approx(6 / 40 * 1e6)
    assert str(price.last) == f"{SITE}: all units to 50% of units gone"
    doubled = tied.with_losses(lambda _, option: 2 * option.costs["loss"])
    (price,) = (price for price in prices([doubled], centre) if price.knob == "heads")
    assert price.last is not None and price.last.price == pytest.approx(2 * 6 / 40 * 1e6)


def test_sites_stay_whole_but_for_some(tied: Problem) -> None:
    whole, same = with_all_heads(tied), with_all_heads(tied, but=["down"])
    assert [len(place.options) for place in whole.places] == [1, 2, 2, 2] and same == tied
    assert solve([whole], {}, "bytes").costs["bytes"] == 61


def test_behind_a_cut_the_heads_that_it_looks_at_stay(llava: View) -> None:
    view = llava.copy()
    canonicalize(view)
    sites = sites_of(view, recognize(view))
    places = [
        Place(site.name, [
            Option(what, {}, "heads" if what.gone else KEPT) for what in site.options
        ])
        for site in sites
    ]  # fmt: skip
    assert {"vision_tower" in place.name for place in places} == {True, False}
    inside = in_tower(places, recognize(view))
    assert inside == {place.name for place in places if "vision_tower" not in place.name}
    after = fit_for(Problem(places, {}), view, sites, FasterVLM(keep="50%"))
    (whole,) = (place.name for place in after.places if len(place.options) == 1)
    assert whole.startswith("heads of") and "vision_tower" in whole
