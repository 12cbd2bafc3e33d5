"""The search: one survey, one integer program, and rounds of measuring what it chose."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput, near_misses
from ...ir.core.given import check_graph
from ...ir.core.view import View
from ...ir.run.batches import as_batches, check_batches
from ...ir.structure.recognize import recognize
from ...ir.vocab.targets import CPU, find_target
from ...passes.checkpoint_store import CheckpointStore
from ..data.calibration import read
from .budget import Budget
from .data import Parts, parts, unfitted
from .judge import Judge
from .measure import measured
from .menu import Menu
from .points import Found
from .ray_workers import RAY, OnRay
from .rounds import Rounds
from .skips import graph_measures
from .times import Times
from .timing import Timing
from .workers import Forked, Here, Workers

Progress = Callable[[str, int, int], None]
Batch = Mapping[str, torch.Tensor]
KNOBS = ("tokens", "layers", "heads", "bits", "rank", "cache")
ROUNDS = 4
"""Of measuring and solving again, at most."""


def search(
    graph: View,
    *,
    budget: str | Budget,
    calibration: str | Sequence[Batch],
    judged: Sequence[Batch] = (),
    using: Sequence[str] = KNOBS,
    target: str = CPU.name,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
    checkpoints: CheckpointStore | None = None,
    workers: int | str = 0,
    reload: Callable[[], View] | None = None,
    times: Times | None = None,
    machine: str = "this machine",
    refine: float = 0.0,
) -> Found:
    """The recipe that spends ``budget`` best on ``graph``, which stays as it is.

    ``budget`` bounds what it names (``bytes=25%``, ``loss=1%``) and makes what it does not name as
    small as it can. Bytes are those of all weights of the graph, as the cost model counts them.
    ``calibration`` is fitted to and losses are measured by ``judged``; without that, by each second
    batch of ``calibration``, the others being fitted to. Named as ``--calib`` takes it, it is read
    on for what is judged by. ``using`` are the knobs; image tokens are only dropped where the
    cache or the time is bounded, and keys and values only kept in fewer bits where the cache is.
    Without ``rounds`` nothing is measured: the recipe is the best by forecast.
    ``checkpoints`` keeps what was surveyed and each measured point, and gives them back to the same
    search on the same graph and data. ``workers`` are processes that measure beside each other, or
    ``"ray"`` for those of a Ray cluster; the result is the same for any number of them above 0,
    where they measure on one thread each. Those of Ray load the graph by its source's name, or by
    ``reload`` where that does not make the same of it.
    Where time is bounded, that of one run on one row of what is judged by, ``times`` is a table of
    it; else one is measured here, on ``machine``, or counted where the target runs elsewhere. Each
    recipe that is measured is then timed too, in turns with the source, and the best again at
    the end.
    After the rounds ``refine`` seconds may be spent on measuring neighbours of the best (see
    ``refine``); it ends before where these bring nothing, so that with ``math.inf`` the result does
    not depend on how fast this machine is. What was measured before counts as well: the result is
    never behind that of the rounds.

    Raises ``BadInput`` for a budget that nothing meets, with the nearest that there is, for bounds
    that contradict each other, and where there are no data; ``Missing`` where Ray is not there.
    """
    check_graph(graph)
    bounds = Budget.parse(budget) if isinstance(budget, str) else budget
    if not isinstance(bounds, Budget):
        raise BadInput(f"budget is a {type(budget).__name__}, and must be a text such as bytes=25%")
    using = using.split(",") if isinstance(using, str) else using
    unknown = [knob for knob in using if knob not in KNOBS]
    if unknown:
        raise BadInput(f"using {unknown[0]}: {near_misses(unknown[0], KNOBS)}")
    if not refine >= 0:
        raise BadInput(f"refine={refine}: seconds, 0 or more")
    if not calibration:
        raise BadInput(
            "a budget is spent by what the loss minds, which takes data: give --calib DATA "
            "(calibration=[...] in Python)"
        )
    turned = saving(bounds.bounded, using)
    if not turned:
        raise BadInput(
            f"{' and '.join(using)} take nothing of what {bounds} bounds: bound the cache, such as "
            "by kv=50%"
        )
    timing = Timing(times, machine) if "ms" in bounds.bounded else None
    if isinstance(calibration, str):
        data: Sequence[Batch] = read(calibration, graph).batches
        judged = judged or unfitted(calibration, graph, data)
    else:
        data = as_batches(calibration, "calibration")
    tell = progress or (lambda *_: None)
    source = graph.copy()
    canonicalize(source)
    check_batches(source, [*data, *judged])
    known = parts(source, data, judged)
    judge = Judge(source, recognize(source), known.judge)
    with contextlib.closing(_workers(workers, graph, judge, known, reload)) as engine:
        aim = find_target(target)
        cache = bounds.limit_of("kv", graph_measures(source, judge.batches[0]))
        menu = Menu.of(source, known, judge, aim, turned, tell, checkpoints, timing, cache)
        return Rounds(
            graph, source, bounds, known, menu, judge, rounds, tell, checkpoints, engine, refine
        ).found()


def saving(bounded: Collection[str], using: Sequence[str]) -> list[str]:
    """The knobs that may save what a budget bounds; to survey the others would be for nothing.

    Fewer image tokens take no byte of a weight, nor do keys and values in few bits, which take as
    long, too; where the cache alone is bounded, bytes are free, and bits only lose.
    """
    useless = set[str]()
    if not {"kv", "ms"} & {*bounded}:
        useless.add("tokens")
    if "kv" not in bounded:
        useless.add("cache")
    turned = [knob for knob in using if knob not in useless]
    lighter = [knob for knob in turned if knob not in ("bits", "rank")]
    return lighter if {*bounded} == {"kv"} and lighter else turned


def _workers(
    workers: int | str, graph: View, judge: Judge, data: Parts, reload: Callable[[], View] | None
) -> Workers:
    if workers == RAY:
        return OnRay(graph, data, reload)
    if not isinstance(workers, int):
        raise BadInput(f"workers={workers!r}: a number of processes, or {RAY}")
    measure = partial(measured, graph, judge, data.fit)
    return Forked(workers, measure) if workers else Here(measure)
