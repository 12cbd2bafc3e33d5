"""Monte Carlo tree search over paths: blocks that are skipped, run, or run again."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

REACH = 4
"""Blocks that one decision skips or repeats at most, and how often it repeats them at most."""
CHANCE = 0.1
"""Of trying a decision at random that was not tried yet, where others were."""
EXPLORE = 0.5
"""Weight of what was seldom tried. The paper does not say its own."""

Path = tuple[int, ...]


@dataclass
class _State:
    """Decisions so far: the path through the blocks before ``place``."""

    path: Path
    place: int
    children: list[_State] = field(default_factory=list)
    untried: list[tuple[Path, int]] = field(default_factory=list)
    visits: int = 0
    reward: float = 0.0


@dataclass(frozen=True)
class LayerTree:
    """Searches paths through ``blocks`` blocks of which ``longest`` are run, at most.

    ``reward(path, shared)`` is that of a path, of which the first ``shared`` blocks are decided. A
    state is chosen by ``Q/v + c sqrt(ln V / v) - penalty |path| / blocks`` (CoLa, arXiv
    2507.07996); where its path is open, which of the blocks that are left are run is drawn, with
    ``likely`` in proportion to what that says of each block.
    """

    blocks: int
    longest: int
    penalty: float
    reward: Callable[[Path, int], float]
    seed: int
    likely: Sequence[float] | None = None

    def search(self, simulations: int) -> dict[Path, float]:
        """The reward of each path that was tried."""
        draw = random.Random(self.seed)
        root = self._state((), 0)
        tried: dict[Path, float] = {}
        for _ in range(simulations):
            line = self._line(root, draw)
            path = self._completed(line[-1], draw)
            if path not in tried:
                tried[path] = self.reward(path, len(line[-1].path))
            for state in line:
                state.visits += 1
                state.reward += tried[path]
        return tried

    def _state(self, path: Path, place: int) -> _State:
        state = _State(path, place)
        rest = range(1, min(REACH, self.blocks - place) + 1)
        runs = [tuple(range(place, place + count)) for count in rest]
        options = [((), len(run)) for run in runs] + [(run * (r + 1), len(run)) for run in runs
                   for r in range(REACH + 1) if r or len(run) == 1]  # fmt: skip
        for added, count in options:
            length = len(path) + len(added)
            if length <= self.longest and (length or place + count < self.blocks):
                state.untried.append((path + added, place + count))
        return state

    def _line(self, root: _State, draw: random.Random) -> list[_State]:
        """From the root to a state that is new, or at the end of the blocks."""
        line = [root]
        while line[-1].untried or line[-1].children:
            state = line[-1]
            fresh = state.untried and (not state.children or draw.random() < CHANCE)
            if fresh or (state.untried and len(state.children) <= math.isqrt(state.visits)):
                choice = state.untried.pop(draw.randrange(len(state.untried)))
                state.children.append(self._state(*choice))
                return [*line, state.children[-1]]
            line.append(max(state.children, key=lambda child: self._value(child, state)))
        return line

    def _value(self, child: _State, parent: _State) -> float:
        seldom = math.sqrt(math.log(parent.visits) / child.visits)
        length = len(child.path) + self.blocks - child.place
        mean = child.reward / child.visits
        return mean + EXPLORE * seldom - self.penalty * min(length, self.longest) / self.blocks

    def _completed(self, state: _State, draw: random.Random) -> Path:
        rest = range(state.place, self.blocks)
        room = min(self.longest - len(state.path), len(rest))
        if self.likely is None:
            return state.path + tuple(sorted(draw.sample(rest, room)))
        # The largest of u^(1/w) are drawn without replacement in proportion to w (Efraimidis and
        # Spirakis 2006).
        keys = {place: draw.random() ** (1 / self.likely[place]) for place in rest}
        return state.path + tuple(sorted(sorted(rest, key=lambda i: -keys[i])[:room]))
