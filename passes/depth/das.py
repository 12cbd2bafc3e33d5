"""``das``: leave out the blocks that a search by reward learns to skip."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput
from ...ir.moves.block_path import Path
from ...ir.moves.bypass_blocks import refusals
from ...ir.structure.recognize import last_tower
from ...ir.structure.units import whole
from ..base import Context, Needs, PassResult
from .path_pass import PathPass
from .path_runner import PathRunner

TRIALS = 3
"""Subsets of a round, of which the mean reward is the baseline."""


@dataclass(frozen=True, kw_only=True)
class DAS(PathPass):
    """Bypass the ``count`` blocks whose absence was rewarded (DAS, Wu et al. 2023, arXiv
    2309.01479), its part without training: the paper puts adapters in their place and trains them.

    Each block has a score ``s``, 0 at first, and ``p = sigmoid(s)``. A round draws three sets of
    ``count`` blocks, without replacement, in proportion to ``p``; each is rewarded with ``R =
    exp(-loss)``, and the scores of its members move by ``(R - b) p (1 - p)``, where ``b`` is the
    round's mean reward (its code's step is 1, whatever its ``lr`` says). The loss is how far the
    outputs move on the calibration data, as in ``drop-blocks{score=kl}``, beside which it stands.
    """

    name: ClassVar[str] = "das"
    count: int = 1
    """Blocks to leave out."""
    rounds: int = 40
    """Of three trials each."""
    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("count", "rounds"):
            if getattr(self, option) < 1:
                raise BadInput(f"das: {option}={getattr(self, option)} must be at least 1")

    def requires(self) -> Needs:
        return Needs(calibration=True, stats=self.heal_stats())

    def run(self, context: Context) -> PassResult:
        units, result = whole(last_tower(context.structure)), PassResult()
        reasons = refusals(context.view, units)
        free = [i for i, reason in enumerate(reasons) if not reason]
        result.refused += [(units[i].name, reason) for i, reason in enumerate(reasons) if reason]
        self._check(len(free))

        def search() -> list[float]:
            runner = PathRunner(context.view, context.structure, units, context.calibration)

            def reward(gone: Sequence[int]) -> float:
                path = tuple(i for i in range(len(units)) if i not in gone)
                return math.exp(-runner.divergence(path, 0))

            return self._scores(free, reward)

        scores = context.once("scores", search)
        gone = sorted(sorted(range(len(free)), key=lambda i: (-scores[i], i))[: self.count])
        named = " ".join(f"{free[i]}:{score:.4g}" for i, score in enumerate(scores))
        result.notes.append(f"scores of leaving out: {named}")
        dropped = {free[i] for i in gone}
        path = Path.of(i for i in range(len(units)) if i not in dropped)
        self.follow(context, path, result)
        result.notes.append(f"path of the blocks that stay: {path}")
        return result

    def plan(self, context: Context) -> PassResult:
        count = len(last_tower(context.structure))
        self._check(count)
        path = Path.of(i for i in range(count) if not count - 1 - self.count <= i < count - 1)
        note = "which blocks go is decided by the calibration data"
        return PassResult(sites=self.sites(context, path), notes=[note])

    def _check(self, free: int) -> None:
        if self.count >= free:
            raise BadInput(f"das: count={self.count} of {free} blocks; at least one must stay")

    def _scores(self, free: Sequence[int], reward: Callable[[Sequence[int]], float]) -> list[float]:
        draw, scores = random.Random(self.seed), [0.0] * len(free)
        for _ in range(self.rounds):
            likely = [1 / (1 + math.exp(-score)) for score in scores]
            trials = [_subset(likely, self.count, draw) for _ in range(TRIALS)]
            rewards = [reward([free[i] for i in trial]) for trial in trials]
            mean = sum(rewards) / TRIALS
            for trial, value in zip(trials, rewards, strict=True):
                for i in trial:
                    scores[i] += (value - mean) * likely[i] * (1 - likely[i])
        return scores


def _subset(likely: Sequence[float], count: int, draw: random.Random) -> list[int]:
    """So many places, drawn one after another in proportion to what is given for each."""
    places, chosen = list(range(len(likely))), []
    for _ in range(count):
        (place,) = draw.choices(places, [likely[i] for i in places])
        places.remove(place)
        chosen.append(place)
    return chosen
