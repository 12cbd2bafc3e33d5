"""``ziplm``: heads and units go until the model is as fast as asked, where outputs lose least."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...ir.core.errors import BadInput
from ...ir.run.statistics import Gram, Stat, Statistics
from ..base import REDEFINED, STORED, Context, Needs, Pass, PassResult
from ..linear_pass import weight_of
from .flap import SHRUNK
from .structured import Place, Repair, find_places, learned, shrunk_sites, take_away
from .structured_obs import Removal, refitted, removal

BUCKETS = 10_000
"""Steps of time in the dynamic program."""
DENSITY = 0.9
"""Each level of a feed-forward keeps so much of the one before it."""


@dataclass(frozen=True, kw_only=True)
class ZipLM(Pass):
    """Remove heads and units until the model is ``speedup`` times as fast, by a table of times.

    ZipLM (Kurtic et al. 2023, arXiv 2302.04089), its one-shot part: from each place structures go
    one after another, that of the lowest ``tr(W_T ((H^-1)_TT)^-1 W_T^T)`` first (``H = X X^T``),
    and what stays makes up for it by least squares. Each level of a place has an error ``||D X||^2
    / ||W X||^2`` and a time; a dynamic program over the time to be saved takes the levels of least
    error together. The published search then varies the weights of the places by the model's loss;
    this does not. ``table`` is what ``optimize-model bench MODEL --ziplm-table FILE`` measures
    where the model is to run; without it a time is the number of weights. Large feed-forwards lose
    several units at a time. Heads that share keys go together, one head and one unit stay in each
    place, and a graph with a key-value cache keeps its heads (see ``flap``). Needs calibration
    data.
    """

    name: ClassVar[str] = "ziplm"
    exact: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(stats=(Stat("gram", at="linear"),))
    provides: ClassVar[tuple[str, ...]] = (SHRUNK, REDEFINED)
    excludes: ClassVar[tuple[str, ...]] = (STORED,)
    speedup: float = 1.5
    """How many times as fast the model is to be."""
    table: str | None = None
    """File of measured times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.speedup > 1:
            raise BadInput(f"ziplm: speedup={self.speedup} must be above 1")

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        places = find_places(context, result, ("heads", "units"))
        if not places:
            return result
        times = self._times(context, places)
        by_place = learned(context, self, places, _removal, "removal")
        removals = {name: Removal(**fields) for name, fields in by_place.items()}
        kept, predicted = self._chosen(places, removals, times)

        def fit(context: Context, place: Place, statistics: Statistics) -> dict[str, Any]:
            weight = weight_of(context.view, place.sink).read()
            columns = place.columns(kept[place.name])
            sink = refitted(weight.double(), statistics[Gram].matrix.double(), columns)
            return {"sink": sink.to(weight.dtype)}

        shrinking = [place for place in places if len(kept[place.name]) < place.count]
        sinks = learned(context, self, shrinking, fit, "sinks")
        repairs: dict[str, Repair] = {
            name: (fields["sink"], None) for name, fields in sinks.items()
        }
        take_away(context, kept, places, repairs, result, self.name)
        by = f"times of {self.table}" if self.table else "the number of weights: no table= is given"
        result.notes.append(f"{predicted:.2f} times as fast, by {by}")
        return result

    def plan(self, context: Context) -> PassResult:
        """As if errors were alike: each place gives the same share."""
        result = PassResult()
        places = find_places(context, result, ("heads", "units"))
        if places:
            share = self._share(places, self._times(context, places))
            for place in places:
                remaining = max(1, round((1 - share) * place.count))
                if remaining < place.count:
                    result.sites += shrunk_sites(context, place, remaining)
        result.notes.append("which heads and units go is decided by the calibration data")
        return result

    def _share(self, places: Sequence[Place], times: Times) -> float:
        most = sum(times.saved(place, 1) for place in places)
        return min(1.0, times.total * (1 - 1 / self.speedup) / max(most, 1e-30))

    def _times(self, context: Context, places: Sequence[Place]) -> Times:
        if self.table is not None:
            return Times.read(Path(self.table).expanduser(), places)
        linears = context.structure.linears
        total = sum(x.out_features * x.in_features for x in linears)
        return Times(float(total), {})

    def _chosen(
        self, places: Sequence[Place], removals: Mapping[str, Removal], times: Times
    ) -> tuple[dict[str, list[int]], float]:
        """What stays of each place, and the speed-up that the times predict."""
        levels = {place.name: _levels(place) for place in places}
        errors = [[removals[p.name].error(level) for level in levels[p.name]] for p in places]
        saved = [[times.saved(p, level) for level in levels[p.name]] for p in places]
        need = times.total * (1 - 1 / self.speedup)
        most = sum(max(row) for row in saved)
        if most < need:
            raise BadInput(
                f"ziplm: speedup={self.speedup} cannot be reached: with one head and one unit in "
                f"each place the model is {times.total / (times.total - most):.2f} times as fast"
            )
        picks = least_error(errors, saved, need)
        kept = {
            place.name: removals[place.name].stays(levels[place.name][pick])
            for place, pick in zip(places, picks, strict=True)
        }
        spared = sum(row[pick] for row, pick in zip(saved, picks, strict=True))
        return kept, times.total / (times.total - spared)


@dataclass(frozen=True)
class Times:
    """The time of the whole model, and what smaller places save of it, in any unit."""

    total: float
    measured: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    """By signature, sizes in ascending order and what each saves."""

    def saved(self, place: Place, remaining: int) -> float:
        """What a place saves of which ``remaining`` heads or units stay."""
        if not self.measured:
            return float(place.cost * (place.count - remaining))
        sizes, saved = self.measured[place.signature]
        return float(np.interp(remaining, sizes, saved))

    @classmethod
    def read(cls, path: Path, places: Sequence[Place]) -> Times:
        """Raises ``BadInput`` where the file is not a table, or lacks a place of this model."""
        try:
            held = json.loads(path.read_text())
            total = float(held["total_ms"])
            measured = {
                str(name): ([int(n) for n in entry["sizes"]], [float(t) for t in entry["saved_ms"]])
                for name, entry in held["places"].items()
            }
        except OSError as error:
            raise BadInput(f"ziplm: table={path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"ziplm: table={path} is not a table of times ({error!r})") from None
        lacking = [place for place in places if place.signature not in measured]
        if lacking:
            raise BadInput(
                f"ziplm: table={path} has no times of {lacking[0].signature} ({lacking[0].name}): "
                "it is another model's"
            )
        return cls(total, measured)


def _removal(context: Context, place: Place, statistics: Statistics) -> dict[str, Any]:
    weight = weight_of(context.view, place.sink).read()
    return vars(removal(weight.double(), statistics[Gram].matrix.double(), place.each))


def _levels(place: Place) -> list[int]:
    """How many heads or units may stay, from all to one."""
    if place.kind == "heads":
        return list(range(place.count, 0, -1))
    levels = [place.count]
    while levels[-1] > 1:
        levels.append(min(levels[-1] - 1, max(1, int(levels[-1] * DENSITY))))
    return levels


def least_error(
    errors: Sequence[Sequence[float]], saved: Sequence[Sequence[float]], need: float
) -> list[int]:
    """The level of each place, such that together they save ``need`` at the least sum of errors.

    A dynamic program over ``BUCKETS`` steps of what is saved, each rounded down: never less than
    asked is saved.
    """
    step = need / BUCKETS
    best = np.full(BUCKETS + 1, np.inf)
    best[0] = 0.0
    choices = []
    for row, spared in zip(errors, saved, strict=True):
        candidates = np.full((len(row), BUCKETS + 1), np.inf)
        came = np.zeros((len(row), BUCKETS + 1), np.int64)
        for level, (error, time) in enumerate(zip(row, spared, strict=True)):
            gain = min(BUCKETS, max(0, int(time / step)))
            reached = np.minimum(np.arange(BUCKETS + 1) + gain, BUCKETS)
            order = np.lexsort((best, reached))
            places, first = np.unique(reached[order], return_index=True)
            candidates[level, places] = best[order[first]] + error
            came[level, places] = order[first]
        pick = candidates.argmin(0)
        columns = np.arange(BUCKETS + 1)
        best = candidates[pick, columns]
        choices.append((pick, came[pick, columns]))
    picks, place = [], BUCKETS
    for pick, came_from in reversed(choices):
        picks.append(int(pick[place]))
        place = int(came_from[place])
    return picks[::-1]
