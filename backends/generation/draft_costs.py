"""What calls of several tokens cost on a machine, and how many guesses pay by that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

ROUNDS = 5
"""Runs of which a cost is the shortest: what else the machine does only adds to it, and medians of
three were 25 ms for steps of 1.5 ms on a machine at work."""
SIZES = (2, 3, 5, 9, 17, 33, 65, 81)
"""Tokens of the calls that are timed."""
HOPELESS = 4.0
"""Larger calls than one that takes so many steps are not timed: trees of 80 guesses write 2.7
tokens a call (arXiv 2408.08696)."""


@dataclass(frozen=True)
class Costs:
    """Seconds of rounds with a call of the whole model by the number of its tokens, of a step for
    one token, and of one guess of the draft."""

    calls: Mapping[int, float]
    draft: float = 0.0

    @property
    def step(self) -> float:
        return self.calls[1]

    def best(
        self, written: Callable[[int], float], most: int, least: int = 0
    ) -> tuple[int, float]:
        """How many guesses to read in a call, from ``least`` to ``most``, and how many times as
        fast as steps that is; 0 and 1 where nothing is faster and ``least`` is 0.

        ``written`` says how many tokens a call writes behind so many guesses.
        """
        best, gain = (least, 0.0) if least else (0, 1.0)
        for count in range(max(1, least), min(most, max(self.calls) - 1) + 1):
            spent = count * self.draft + self.call(count + 1)
            faster = written(count) * self.step / spent
            best, gain = (count, faster) if faster > gain else (best, gain)
        return best, gain

    @property
    def may_pay(self) -> bool:
        """Whether guesses of some length would be faster than steps if all of them were right."""
        return self.best(lambda count: count + 1.0, max(self.calls))[0] > 0

    def call(self, tokens: int) -> float:
        """Between the lengths that were measured, in a straight line."""
        below = max(n for n in self.calls if n <= tokens)
        above = min((n for n in self.calls if n >= tokens), default=below)
        if above == below:
            return self.calls[below]
        part = (tokens - below) / (above - below)
        return self.calls[below] * (1 - part) + self.calls[above] * part


def steady(share: float, count: int) -> float:
    """Tokens that a call writes where each of ``count`` guesses in a line is accepted with
    probability ``share``, ``(1 - a^(k+1)) / (1 - a)`` (Leviathan et al. 2022, arXiv 2211.17192)."""
    return sum(share**i for i in range(count + 1))


def timed_calls(call: Callable[[int], Any], most: int, step: float) -> dict[int, float]:
    """Seconds of calls of 2 to ``most`` and one tokens, as far as they may pay beside steps."""
    calls: dict[int, float] = {}
    for size in SIZES:
        calls[size] = shortest(partial(call, size))
        if size > most or calls[size] > HOPELESS * step:
            break
    return calls


def shortest(work: Callable[[], Any]) -> float:
    """The least time of several runs."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
