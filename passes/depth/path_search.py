"""How paths are chosen to be measured: one block at a time, by a tree, or by what is guessed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from .cheap_scores import cheapest_first
from .layer_tree import LayerTree
from .path_runner import PathRunner, Places
from .surrogate import Array, expected_improvement

POOL = 256
"""Paths, or weights, among which the next one is chosen."""
FIRST = 5
"""Of them are measured before anything is guessed."""
SHORT = 0.5
"""Of the blocks that one round could leave out, those that are measured where scores are mixed."""


class Trials:
    """Paths that are measured, no more than a budget."""

    def __init__(self, runner: PathRunner, budget: int) -> None:
        self._runner, self.budget = runner, budget
        self.moved: dict[Places, float] = {}

    def up_to(self, budget: int) -> Trials:
        """The same measurements, of which there may be no more than ``budget``."""
        part = Trials(self._runner, max(1, budget))
        part.moved = self.moved
        return part

    @property
    def open(self) -> bool:
        """Whether another path may be measured."""
        return len(self.moved) < self.budget

    def measure(self, path: Places, shared: int | None = None) -> float:
        """How far the outputs move by a path; nothing is run for one that was measured."""
        if path not in self.moved:
            self.moved[path] = self._runner.divergence(path, shared)
        return self.moved[path]


def by_greed(
    trials: Trials, blocks: int, length: int, worth: Sequence[float] | None = None
) -> Places:
    """Leave out block after block, each time the one without which outputs move least; what is
    left. With ``worth`` only those of less worth are tried. Where the budget ends, worth decides
    the rest, or what was measured last."""
    path, last = tuple(range(blocks)), dict(enumerate(worth or [0.0] * blocks))
    while len(path) > length:
        places = sorted(range(len(path)), key=lambda place: last[path[place]])
        if worth is not None:
            places = places[: math.ceil(SHORT * len(places))]
        moved: dict[int, float] = {}
        for place in places:
            if trials.open or not moved:
                moved[place] = trials.measure((*path[:place], *path[place + 1 :]), place)
        gone = min(moved, key=lambda place: (moved[place], place))
        if worth is None:
            last |= {path[place]: far for place, far in moved.items()}
        path = path[:gone] + path[gone + 1 :]
    return path


def by_tree(
    trials: Trials, blocks: int, length: int, worth: Sequence[float] | None, seed: int
) -> None:
    """CoLa's tree search. With ``worth`` half of the budget goes to the path that is cheapest by it
    and to greed first, and open paths are completed by blocks of more worth: with 100 trials and
    nothing to start from, the best that was drawn for one calibration set of three had perplexity
    535 by ``bench.depth_table``, where 42 was to be had."""
    if worth is not None:
        most = min(length, blocks)
        trials.measure(next(cheapest_first(worth, most)))
        # A round of greed measures one path at least, also where no budget is left.
        if trials.budget >= 2 * blocks:
            by_greed(trials.up_to(trials.budget // 2), blocks, most, worth)
    likely = None if worth is None else [math.exp(w) for w in worth]
    tree = LayerTree(
        blocks, length, 0.0, lambda path, shared: math.exp(-trials.measure(path, shared)), seed,
        likely,
    )  # fmt: skip
    tree.search(trials.budget - len(trials.moved))


def by_guesses(trials: Trials, blocks: int, length: int, seed: int) -> None:
    """Measure the path of the largest expected improvement, over vectors of which blocks are run
    (Draft & Verify, arXiv 2309.08168)."""
    draw = np.random.default_rng(seed)
    every = math.comb(blocks, length)
    while trials.open and len(trials.moved) < every:
        pool = {tuple(sorted(draw.choice(blocks, length, replace=False).tolist()))
                for _ in range(POOL)}  # fmt: skip
        if len(trials.moved) >= FIRST:
            best = sorted(trials.moved, key=trials.moved.__getitem__)[:3]
            pool |= {near for path in best for near in _swapped(path, blocks)}
        candidates = sorted(pool - set(trials.moved))
        if not candidates:
            candidates = [p for p in itertools.combinations(range(blocks), length)
                          if p not in trials.moved]  # fmt: skip
        choice = int(draw.integers(len(candidates)))
        if len(trials.moved) >= FIRST:
            known = list(trials.moved)
            values = np.array([trials.moved[path] for path in known])
            gains = expected_improvement(_vectors(known, blocks), values,
                                         _vectors(candidates, blocks))  # fmt: skip
            choice = int(gains.argmax())
        trials.measure(candidates[choice])


def by_mixed_guesses(
    trials: Trials, blocks: int, length: int, scores: torch.Tensor, seed: int
) -> None:
    """RoBoT (He et al. 2024, arXiv 2403.07591): half of the budget looks for weights of the cheap
    scores whose best path is good, by expected improvement; the rest measures the paths that come
    next by the best weights."""
    draw = np.random.default_rng(seed)
    table = scores.numpy()
    tried: list[Array] = []
    values: list[float] = []
    while trials.open and len(tried) < max(1, trials.budget // 2):
        pool = draw.dirichlet(np.ones(len(table)), POOL)
        pool[0] = 1 / len(table)
        choice = 0 if not tried else int(draw.integers(POOL))
        if len(tried) >= FIRST:
            choice = int(expected_improvement(np.array(tried), np.array(values), pool).argmax())
        tried.append(pool[choice])
        path = next(cheapest_first((pool[choice] @ table).tolist(), length))
        values.append(trials.measure(path))
    best = tried[int(np.argmin(values))]
    for path in cheapest_first((best @ table).tolist(), length):
        if not trials.open:
            return
        trials.measure(path)


def _swapped(path: Places, blocks: int) -> Iterable[Places]:
    """The paths that run one other block in the place of one of these."""
    others = [i for i in range(blocks) if i not in path]
    for place, new in itertools.product(range(len(path)), others):
        yield tuple(sorted((*path[:place], *path[place + 1 :], new)))


def _vectors(paths: Sequence[Places], blocks: int) -> Array:
    vectors = np.zeros((len(paths), blocks))
    for row, path in enumerate(paths):
        vectors[row, list(path)] = 1
    return vectors
