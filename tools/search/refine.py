"""The refinement: neighbours of the best choice, proposed by what was measured so far.

Thompson sampling (Russo et al., arXiv 1707.02038): a factor of each option's forecast loss is drawn
from what is believed of it, and the integer program is solved by the drawn losses, near the best,
without what was measured. So each proposal is the best one if the draw is right, and keeps the
bounds by forecast. Beliefs are Gaussian: a factor is 1 plus a deviation that all options have in
common, one of its place, and one of its own; that the measured losses are sums of such terms, but
for ``REST``, conditions them. A draw given these is one without them, put right by the linear
regression of what is missing (Matheron's rule: Wilson et al., arXiv 2002.09309), which solves for
as many unknowns as there are measured choices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .near import near
from .problem import Choice, Key, Problem
from .solve import best

COMMON, PLACE, OPTION = 0.3, 0.3, 0.2
"""Standard deviations of a forecast's factor, by what shares them."""
REST = 0.03
"""That of a measured loss from the sum of its parts, relatively."""
LEAST = 0.1
"""Of a drawn factor: no option gains by being taken."""
CHANGES = 6
"""Places and halves of blocks in which a neighbour may be otherwise than the best."""
WIDE = 4
"""Neighbours that are measured beside each other: the same for any number of workers."""
MOST_STEPS = 32
"""Of a refinement, whatever the time."""
PATIENCE = 3
"""Steps without a better one, after which a refinement ends."""
SEED = 17


class Allowance:
    """Time that steps may take together: one begins where one as long as the longest still fits."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._began: float | None = None
        self._longest = 0.0

    def step(self) -> bool:
        """Whether there is time for another; it begins now."""
        now = time.monotonic()
        if self._began is not None:
            self._longest = max(self._longest, now - self._began)
        self._began = now
        return now + self._longest < self._end


def neighbours(
    problems: Sequence[Problem], known: Sequence[tuple[Choice, float]], centre: Choice,
    limits: Mapping[str, float], goal: str, rng: Generator,
) -> list[Choice]:  # fmt: skip
    """``WIDE`` choices near ``centre`` that keep ``limits`` by forecast, or fewer where there are
    no more. ``known`` are the measured choices with their losses, as these add up."""
    besides = [choice for choice, _ in known]
    proposals: list[Choice] = []
    for _ in range(WIDE):
        rows = near(centre, CHANGES, [*besides, *proposals])
        proposal = best(drawn(problems, known, rng), limits, goal, rows)
        if proposal is not None:
            proposals.append(proposal)
    return proposals


def drawn(
    problems: Sequence[Problem], known: Sequence[tuple[Choice, float]], rng: Generator
) -> list[Problem]:
    """The problems with losses that are drawn from what is believed of them."""
    losses = {key: o.costs["loss"] for problem in problems for key, o in problem.options.items()}
    factors = dict(zip(losses, _factors(losses, known, rng), strict=True))
    return [
        problem.with_losses(lambda key, option: option.costs["loss"] * float(factors[key]))
        for problem in problems
    ]


def _factors(
    losses: Mapping[Key, float], known: Sequence[tuple[Choice, float]], rng: Generator
) -> NDArray[np.float64]:
    """One for each loss ``[n]``, drawn given ``m`` measured choices."""
    owners = {owner: i for i, owner in enumerate(dict.fromkeys(owner for owner, _ in losses))}
    owner_at = np.array([owners[owner] for owner, _ in losses])
    free = (
        1 + COMMON * rng.standard_normal() + PLACE * rng.standard_normal(len(owners))[owner_at]
        + OPTION * rng.standard_normal(len(losses))
    )  # fmt: skip
    rows = [(choice, loss) for choice, loss in known if loss > 0]
    column_at = {key: i for i, key in enumerate(losses)}
    shares = np.zeros((len(rows), len(losses)))  # of what was measured, by what was taken
    for row, (choice, loss) in zip(shares, rows, strict=True):
        for key in choice.keys:
            row[column_at[key]] = losses[key] / loss
    by_owner = shares @ (owner_at[:, None] == np.arange(len(owners)))
    # Covariances of all factors with the measured sums, [n, m], and of these with each other.
    shared = COMMON**2 * shares.sum(1) + PLACE**2 * by_owner.T[owner_at] + OPTION**2 * shares.T
    among = shares @ shared + REST**2 * np.eye(len(rows))
    missing = 1 + REST * rng.standard_normal(len(rows)) - shares @ free
    factors: NDArray[np.float64] = np.maximum(
        free + shared @ np.linalg.solve(among, missing), LEAST
    )
    return factors
