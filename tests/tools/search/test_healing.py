"""Halves of blocks in a search: what goes with them, and when a map stands in for them."""

from __future__ import annotations

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.moves import Path as BlockPath
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.exact.clean import Clean
from graphwright.tools.search.data import parts
from graphwright.tools.search.healing import Healing, followed
from graphwright.tools.search.judge import Judge
from graphwright.tools.search.search import search
from graphwright.tools.search.skips import excess_of_pairs, left_out, may_go, units
from graphwright.tools.search.timing import changed
from graphwright.tools.search.wholes import gone_units

from .conftest import Batches, silent


def test_halves_of_blocks_that_go_take_their_linears_and_their_cache_along(
    views: dict[str, View], batches: Batches
) -> None:
    done = search(
        views["fx"], budget="kv=50%,bytes=60%", calibration=batches, using=("layers", "bits"),
        rounds=1,
    )  # fmt: skip
    assert any(name.endswith(".attn") for name in done.best.choice.dropped)
    assert "path{heal=linear blocks=" in str(done.recipe)
    source = views["fx"].copy()
    canonicalize(source)
    structure, fit = recognize(source), parts(source, batches).fit
    halves = units(source, structure)
    healing = Healing(source, structure, may_go(source, halves), fit)
    unit, measured = next(left_out(healing, done.judge, silent))
    (problem,) = done.menu.problems
    assert problem.units[unit.name].costs["loss"] == measured.loss
    probe = Judge(source, structure, parts(source, batches).probe)

    def loss(*names: str) -> float:
        path = BlockPath.through(half for half in halves if half.name not in names)
        recipe = gw.Recipe.of(Clean(optional=True), followed(path, heal=True))
        return probe.mean_of(gw.optimize(views["fx"], recipe, calibration=fit).graph)

    shares = dict(excess_of_pairs(healing, {
        name: option.costs["loss"] for name, option in problem.units.items()
    }, probe, silent))  # fmt: skip
    assert min(shares.values()) < 0  # which is no gain that adds up over many halves
    neighbours = {tuple(x.name for x in pair) for pair in healing.neighbours}
    worse = {pair for pair, share in shares.items() if share > 0}
    assert problem.pairs.keys() == worse | neighbours
    for pair, share in shares.items():
        assert share == pytest.approx(loss(*pair) / sum(map(loss, pair)) - 1, rel=1e-4)
        if share > 0:
            sums = sum(problem.units[name].costs["loss"] for name in pair)
            assert problem.pairs[pair].costs["loss"] == pytest.approx(share * sums, rel=1e-4)
    assert {point.costs["kv"] / done.source["kv"] for point in done.front} == {0.5, 1}
    for point in done.front:
        if not point.measured:  # along the first bound; the other one is kept
            assert point.costs["bytes"] <= 0.6 * done.source["bytes"]
        if point.measured:
            assert point.costs["kv"] == point.choice.costs["kv"]
            assert point.costs["bytes"] == point.choice.costs["bytes"]


def test_halves_go_as_they_are_where_the_data_are_too_few_to_heal_them(
    views: dict[str, View], batches: Batches
) -> None:
    source = views["fx"].copy()
    canonicalize(source)
    structure = recognize(source)
    halves = units(source, structure)
    judge = Judge(source, structure, batches[1:])
    few = [{name: tensor[:1, :6] for name, tensor in batches[0].items()}]
    healing = Healing(source, structure, may_go(source, halves), few)
    known = parts(source, few, batches[1:])
    gone = gone_units(healing, known, judge, silent, None)
    assert healing.maps and not healing.heals
    unit = healing.units[0]
    path = followed(BlockPath.through(half for half in halves if half != unit), heal=False)
    assert healing.nbytes(unit) == 0
    assert gone[unit.name].loss == judge.mean_of(changed(source, path))
    found = search(
        views["fx"], budget="kv=50%", calibration=few, judged=batches[1:], using=("layers",),
        rounds=1,
    )  # fmt: skip
    assert "path{blocks=" in str(found.recipe)
    assert "halves of blocks go as they are: the data are too few to heal them" in found.notes


def test_tokens_that_are_all_alike_heal_by_their_mean(views: dict[str, View]) -> None:
    rows = [{"input_ids": torch.full((4, 1), 7), "attention_mask": torch.ones(4, 1).long()}] * 2
    found = search(views["fx"], budget="bytes=60%", calibration=rows, using=("layers",), rounds=1)
    assert found.best.measured
