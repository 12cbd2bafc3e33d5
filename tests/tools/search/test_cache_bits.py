"""The bits of keys and values as a knob: what they make smaller, and where they are none."""

from __future__ import annotations

from dataclasses import replace

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.structure.recognize import recognize
from graphwright.tools.search.cache_bits import NARROW, narrowed, timed_caches, why_wide
from graphwright.tools.search.points import Found
from graphwright.tools.search.problem import KEPT
from graphwright.tools.search.recipe_of import HeldCache
from graphwright.tools.search.search import search
from graphwright.tools.search.skips import Measured
from graphwright.tools.search.telling import search_entry
from graphwright.tools.search.times import Times
from graphwright.tools.search.timing import Subject, _caches, one_row

from tests.models import qwen2

from .conftest import Batches

LIGHT = ("layers", "heads", "cache")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> View:
    folder = tmp_path_factory.mktemp("qwen2")
    qwen2().module.model.save_pretrained(folder)
    return load(folder, cache=True)


@pytest.fixture(scope="module")
def outcome(cached: View, batches: Batches) -> Found:
    return search(cached, budget="kv=10%", calibration=batches, using=LIGHT, rounds=2)


def test_what_the_cache_takes_is_forecast_to_the_byte(outcome: Found) -> None:
    """4 bits are an eighth of float32; a tenth takes an attention that goes, with its scales."""
    assert "quantize-cache{bits=4}" in str(outcome.recipe)
    assert any(name.endswith(".attn") for name in outcome.best.choice.dropped)
    assert outcome.best.costs["kv"] <= 0.1 * outcome.source["kv"]
    measured = [point for point in outcome.front if point.measured]
    assert len(measured) > 1
    for point in measured:
        assert point.costs["kv"] == point.choice.costs["kv"]
        assert point.costs["bytes"] == point.choice.costs["bytes"]


def test_its_front_and_prices_are_of_the_cache(outcome: Found) -> None:
    """Twice the bits would save some loss; what one attention more would lose is told too."""
    entry = search_entry(outcome)
    assert entry.axis == "kv"
    costs = [point.costs["kv"] for point in entry.front]
    assert len({*costs}) > 1 and costs == sorted(costs)
    of_cache = {price.knob: price for price in entry.prices if price.of == "kv"}
    assert {"cache", "layers"} <= {*of_cache}
    wider = of_cache["cache"]
    assert wider.next_step == "keys and values: cache in 4 bits to cache in 8 bits"
    four, eight = (
        next(p for p in outcome.menu.problems if p.places[-1].options[0].what == held)
        for held in (HeldCache(4), HeldCache(8))
    )
    now, then = four.again(outcome.best.choice), eight.like(outcome.best.choice)
    assert then is not None and wider.next is not None
    saved = (now.costs["loss"] - then.costs["loss"]) * outcome.factors["cache"]
    added = then.costs["kv"] - now.costs["kv"]
    assert wider.next == pytest.approx(saved / added * 1e6)


def test_each_number_of_bits_has_problems_of_its_own(outcome: Found) -> None:
    kept, *narrow = outcome.menu.problems
    assert [p.places[-1].options[0].what for p in (kept, *narrow)] == [HeldCache(), *NARROW]
    for problem, share in zip(narrow, (4, 8), strict=True):
        assert problem.fixed["kv"] == pytest.approx(kept.fixed["kv"] / share)
        assert problem.places[-1].options[0].costs["loss"] > 0
    alone = outcome.menu.without("cache")
    assert alone.problems == [kept] and "cache" not in alone.using
    assert outcome.menu.bits_alone().problems[0].places[-1].options[0].kind == KEPT


def test_the_least_loss_that_keeps_half_is_8_bits(cached: View, batches: Batches) -> None:
    found = search(cached, budget="kv=50%", calibration=batches, using=LIGHT, rounds=1)
    assert str(found.recipe) == "clean,quantize-cache"


def test_where_it_is_no_knob(cached: View, views: dict[str, View], batches: Batches) -> None:
    with pytest.raises(gw.BadInput, match="cache take nothing of what bytes=50% bounds"):
        search(cached, budget="bytes=50%", calibration=batches, using=("cache",))
    with pytest.raises(gw.BadInput, match="by cache: no keys and values are kept that could"):
        search(views["fx"], budget="kv=50%", calibration=batches, using=("cache",))
    assert narrowed(views["fx"], HeldCache(8), batches) is None


def test_it_is_timed_and_left_out_where_a_table_knows_none(
    cached: View, batches: Batches, outcome: Found
) -> None:
    source = cached.copy()
    subject = Subject(source, None, outcome.menu.target, caches=NARROW)  # type: ignore[arg-type]
    graphs = dict(_caches(subject))
    assert list(graphs) == ["cache in 8 bits", "cache in 4 bits"]
    row = one_row(graphs["cache in 4 bits"], batches[0])
    assert row["past_key_values.0.key"].dtype == torch.uint8
    caches = [(held, Measured({}, 0.0)) for held in NARROW]
    table = Times(1.0, caches={"cache in 8 bits": 0.1})
    known, notes = timed_caches(caches, table)
    assert known == caches[:1] and notes == [
        "the cache keeps its bits: the table of times has none of fewer"
    ]
    assert timed_caches(caches, replace(table, caches=dict.fromkeys(graphs, 0.1))) == (caches, [])


def test_a_cache_that_keeps_its_bits_is_told(cached: View, batches: Batches) -> None:
    odd = cached.copy()
    canonicalize(odd)
    notes = why_wide(odd, recognize(odd), [])
    assert notes == ["no cache in 8 bits: it does not run", "no cache in 4 bits: it does not run"]
    measured = [(held, Measured({}, 0.0)) for held in NARROW]
    assert why_wide(odd, recognize(odd), measured) == []
    narrow = narrowed(odd, HeldCache(8), batches)
    assert narrow is not None
    first, second = why_wide(narrow, recognize(narrow), [])
    assert first.startswith("no cache in 8 bits: past_key_values.0.key: ") and "codes" in second
