"""How the passes of a run learn from calibration data: requests joined, one sweep for a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from ..ir.core.errors import BadInput
from ..ir.core.view import Node, View
from ..ir.core.weights import Spool, Weight
from ..ir.run.calibrate import Compressed, Place, Request, calibrate
from ..ir.run.statistics import Stat, Statistic, Statistics
from ..ir.run.sweep import Results
from ..ir.structure.low_rank import wholes
from ..ir.structure.recognize import Structure, recognize
from ..ir.structure.units import Unit
from .base import CHANGED, Context, Group, Needs, Pass, Propagate
from .linear_pass import LinearPass

Done = Callable[[Group, Statistics], None]


class Learning:
    """What one run keeps between its passes: the graph before its weights changed, and statistics
    that a pass shares a sweep with but uses later."""

    def __init__(self, passes: Sequence[Pass], original: View | None = None) -> None:
        """``original`` is the dense graph of a source that is compressed already."""
        self._passes = passes
        changing = (
            i for i, p in enumerate(passes, 1) if isinstance(p, LinearPass) or CHANGED in p.provides
        )
        self._first = next(changing, len(passes) + 1)
        self._dense: tuple[View, Structure] | None = None
        if original is not None:
            self._first = 0
            self._dense = original, recognize(original)
        self._put_away: dict[tuple[int, Group], list[PutAway]] = {}

    def before(self, context: Context) -> None:
        """Keep the graph as it is before the first pass that changes weights, where a later one
        asks for it; forget what was put away for passes that have run."""
        waiting = (item for item in self._put_away.items() if item[0][0] >= context.step)
        self._put_away = dict(waiting)
        later = (p.requires() for p in self._passes[context.step :])
        if context.step == self._first and any(n.stats and n.propagate == "dense" for n in later):
            view = context.view.copy()
            self._dense = view, recognize(view)

    def at_linears(
        self,
        context: Context,
        needs: Needs,
        groups: Sequence[Group],
        done: Done,
        compressed: Mapping[str, Compressed],
    ) -> None:
        """Call ``done`` with the statistics of each group of linears, in the order of the graph.

        ``compressed`` says by name what stands in for a linear's results.
        """
        if not groups:
            return
        if all((context.step, group) in self._put_away for group in groups):
            self._hand_out([(group, self._put_away[context.step, group]) for group in groups], done)
            return
        view, structure = self._graph(context, needs.propagate)
        requests = _at_linears(view, structure, needs, groups, done)
        # What the first pass that changes weights finds is the dense graph.
        unchanged = needs.propagate == "current" and context.step == self._first
        if needs.propagate == "dense" or unchanged:
            changed = {name for group in groups for name in group}
            requests += self._of_later_passes(context, view, structure, changed)
        at: dict[Node, Compressed] = {}
        linears = wholes(structure) if compressed else {}
        for name, stand_in in compressed.items():
            at.update(_compressed_at(linears[name].nodes, stand_in))
        calibrate(view, context.calibration, requests, at)

    def at_units(
        self, context: Context, stats: Sequence[Stat], units: Sequence[Unit],
        more: Sequence[Mapping[str, Tensor]] = (),
    ) -> dict[Stat, list[Statistics]]:  # fmt: skip
        """The statistics of each run of ``span`` units in the graph as it is, by its first one;
        on ``more`` than the calibration data, where it is given."""
        statistics: dict[Stat, list[Statistics]] = {stat: [] for stat in stats}
        requests = [r for stat in stats for r in _at_units(stat, units, statistics[stat].append)]
        calibrate(context.view, [*context.calibration, *more], requests)
        return statistics

    def graph_before_weights_changed(self) -> View | None:
        """The dense graph, where a pass that is still to come asks for it."""
        return None if self._dense is None else self._dense[0]

    def _hand_out(self, stored: Sequence[tuple[Group, list[PutAway]]], done: Done) -> None:
        """Linears with one input follow each other: what is read for the first serves them all, and
        is gone before anything else is read."""
        held: list[PutAway] = []
        statistics = Statistics()
        for group, items in stored:
            if items != held:
                held, statistics = items, Statistics()
                statistics = Statistics(item.read() for item in items)
            done(group, statistics)

    def _graph(self, context: Context, propagate: Propagate) -> tuple[View, Structure]:
        if propagate == "dense" and self._dense is not None:
            return self._dense
        return context.view, context.structure

    def _of_later_passes(
        self, context: Context, view: View, structure: Structure, changed: set[str]
    ) -> list[Request]:
        """What the passes behind this one ask of the same graph, as long as they only change
        linears; it is put away until they run. ``changed`` are the linears of this one."""
        requests: list[Request] = []
        if self._passes[context.step - 1].rebases:
            return requests
        linears = wholes(structure)
        stored: WeakKeyDictionary[Statistic, PutAway] = WeakKeyDictionary()
        for step, pass_ in enumerate(self._passes[context.step :], context.step + 1):
            if pass_.rebases or not isinstance(pass_, LinearPass):
                break
            needs = pass_.requires()
            names = [linear.name for linear in pass_.foreseen(context, changed)]
            if CHANGED in pass_.provides:
                changed = changed.union(names)
            if not needs.stats or needs.propagate != "dense":
                continue
            there = [linears[name].linear for name in names if name in linears]
            groups = pass_.groups(view, there)

            def put_away(group: Group, statistics: Statistics, step: int = step) -> None:
                for item in statistics.values():
                    if item not in stored:
                        stored[item] = PutAway(item, context.spool)
                self._put_away[step, group] = [stored[item] for item in statistics.values()]

            requests += _at_linears(view, structure, needs, groups, put_away)
        return requests


class PutAway:
    """A statistic whose tensors lie in the spool; while somebody holds it, it is not read again."""

    def __init__(self, statistic: Statistic, spool: Spool) -> None:
        self._kind = type(statistic)
        self._live = ref(statistic)
        self._attributes: dict[str, Any] = {
            name: spool.store(value) if isinstance(value, Tensor) else value
            for name, value in vars(statistic).items()
        }

    def read(self) -> Statistic:
        live = self._live()
        if live is not None:
            return live
        statistic: Statistic = object.__new__(self._kind)
        for name, value in self._attributes.items():
            setattr(statistic, name, value.read() if isinstance(value, Weight) else value)
        self._live = ref(statistic)
        return statistic


def _compressed_at(nodes: Sequence[Node], stand_in: Compressed) -> dict[Node, Compressed]:
    """Where ``stand_in`` changes the results of a linear. One of two nodes reads its input at the
    first of them and gives its results at the second."""
    first, last = nodes[0], nodes[-1]
    if first is last:
        return {last: stand_in}
    held: list[Tensor] = []

    def hold(inputs: list[Tensor], results: list[Results]) -> list[Results]:
        held[:] = inputs
        return results

    def change(inputs: list[Tensor], results: list[Results]) -> list[Results]:
        changed = stand_in(list(held), results)
        held.clear()
        return changed

    return {first: hold, last: change}


def _at_linears(
    view: View, structure: Structure, needs: Needs, groups: Sequence[Group], done: Done
) -> list[Request]:
    linears = wholes(structure)
    requests = []
    for group in groups:
        unknown = [name for name in group if name not in linears]
        if unknown:
            raise BadInput(
                f"{', '.join(stat.name for stat in needs.stats)} matches no site: the graph in "
                f"which it is taken ({needs.propagate}) has no linear {unknown[0]}"
            )
        # What is compressed on the way is decided at the first linear that holds the weight.
        members = group if needs.propagate in ("current", "dense") else group[:1]
        places: tuple[Place, ...] = tuple((linears[name].input(view),) for name in members)
        requests.append(Request(group[0], places, needs.stats, partial(done, group)))
    return requests


def _at_units(
    stat: Stat, units: Sequence[Unit], done: Callable[[Statistics], None]
) -> list[Request]:
    ends = zip(units, units[stat.span - 1 :], strict=False)
    return [
        Request(first.name, ((first.entry, last.exit),), (stat,), done) for first, last in ends
    ]
