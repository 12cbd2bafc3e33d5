"""Halves of blocks that are left out, and the maps of the stream that stand in for them.

What stands in is fitted to the model's own stream, so it is the same whatever else is left out, but
that neighbours have one map together: one sweep fits all that a survey asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor

from ...ir.core.view import View
from ...ir.moves.block_path import Path
from ...ir.run.calibrate import Request, calibrate
from ...ir.run.statistics import Stat, Statistics, StreamFit
from ...ir.structure.recognize import Structure, last_tower
from ...ir.structure.units import Unit, in_halves
from ...passes.base import Context
from ...passes.depth.heal import StreamMap, fit_map
from ...passes.depth.path import FollowPath
from ...passes.depth.path_pass import joined, leave_out, runs_left_out, texts_begun_before

Run = tuple[str, ...]
"""Neighbours that are left out together, by name."""
RANK = 16
"""Of each map."""
NAME = "search"
SUMS = Stat("stream_fit", at="block")


def followed(path: Path, *, heal: bool) -> FollowPath:
    """The pass that leaves out what a path does, and may put maps in its place."""
    if not heal:
        return FollowPath(blocks=str(path))
    return FollowPath(blocks=str(path), heal="linear", heal_rank=RANK)


class Healing:
    """A canonical graph's maps, fitted to some batches, each of which explains something."""

    def __init__(
        self, view: View, structure: Structure, units: Sequence[Unit],
        batches: Sequence[Mapping[str, Tensor]],
    ) -> None:  # fmt: skip
        """``units`` are the halves that may be left out, in the order of the graph."""
        self.view, self.structure, self.units, self.batches = view, structure, units, batches
        self.heals = True
        """Whether anything is put in the place of what goes: with few data a model loses more by
        maps, though they explain something of what was held back. (Of zoo:tiny-vit by 128 pictures
        they bring back half of each loss and more; by 8 they add to it.)"""

    @cached_property
    def maps(self) -> Mapping[Run, StreamMap]:
        """Of each unit, and of each two neighbours; of those where the pass puts one."""
        maps: dict[Run, StreamMap] = {}

        def done(run: Run, statistics: Statistics) -> None:
            fitted = fit_map(statistics[StreamFit], RANK)
            if fitted.helps:
                maps[run] = fitted

        requests = []
        for run in [*([unit] for unit in self.units), *self.neighbours]:
            ends = joined(run)
            told = partial(done, _names(run))
            requests.append(Request(ends.name, ((ends.entry, ends.exit),), (SUMS,), told))
        more = texts_begun_before(self.view, self.structure, self.batches)
        calibrate(self.view, [*self.batches, *more], requests)
        return maps

    @property
    def neighbours(self) -> list[list[Unit]]:
        """Two units that have one map together where both are left out."""
        return [[one, other] for one, other in pairwise(self.units) if one.exit is other.entry]

    def nbytes(self, *units: Unit) -> int:
        """What the map in the place of a unit, or of two neighbours, weighs; nothing, where there
        is none."""
        fitted = self.maps.get(_names(units)) if self.heals else None
        dtype = self.view.type(units[0].entry).dtype
        if fitted is None or dtype is None:
            return 0
        numbers = fitted.down.numel() + fitted.up.numel() + fitted.bias.numel()
        return numbers * dtype.itemsize

    def without(self, *gone: Unit) -> View:
        """A copy of the graph without some units, of which no more than two are neighbours."""
        return _shorter(self.view, _names(gone), self.maps if self.heals else {})


def healed_at_random(view: View, gone: Sequence[str], *, heal: bool = True) -> View:
    """A copy of a canonical graph without some halves of blocks, by name, that takes as long as one
    that is healed, or is not, and is fitted to nothing."""
    if not heal:
        return _shorter(view, gone, {})
    random = torch.Generator().manual_seed(0)
    maps: dict[Run, StreamMap] = {}
    for run in _runs(in_halves(last_tower(Context(view).structure)), gone):
        shape = view.type(run[0].entry).shape
        assert shape is not None
        width = shape[-1]
        assert isinstance(width, int)
        down = torch.randn(min(RANK, width), width, generator=random) / width
        maps[_names(run)] = StreamMap(down, down.T.contiguous(), torch.zeros(width), 1.0, None)
    return _shorter(view, gone, maps)


def _shorter(view: View, gone: Sequence[str], maps: Mapping[Run, StreamMap]) -> View:
    context = Context(view.copy())
    blocks = last_tower(context.structure)
    halves = in_halves(blocks)
    path = Path.through(unit for unit in halves if unit.name not in gone)
    by_entry = {run[0].entry: maps.get(_names(run)) for run in _runs(halves, gone)}
    units, places = path.units(blocks)  # whole blocks, where no half is left
    runs = runs_left_out(units, [places.count(i) for i in range(len(units))])
    instead = {
        run[0].name: fitted for run in runs if (fitted := by_entry[run[0].entry]) is not None
    }
    leave_out(context, path, instead, rule=NAME)
    context.view.drop_unused_weights()
    return context.view


def _runs(units: Sequence[Unit], gone: Sequence[str]) -> Iterator[list[Unit]]:
    yield from runs_left_out(units, [int(unit.name not in gone) for unit in units])


def _names(run: Sequence[Unit]) -> Run:
    return tuple(unit.name for unit in run)
