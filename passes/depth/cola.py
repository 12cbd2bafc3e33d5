"""``cola``: the path through the blocks, some skipped and some run again, that a search finds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...ir.core.errors import BadInput
from .layer_tree import LayerTree
from .path_runner import PathRunner, Places
from .searched_path import SearchedPath


@dataclass(frozen=True, kw_only=True)
class CoLa(SearchedPath):
    """Freeze the best path of at most ``max_path`` blocks that a tree search over skips and repeats
    finds (CoLa, Li et al. 2025, arXiv 2507.07996; Learning Program-of-Layers, arXiv 2606.06574).

    A decision skips one to four blocks, or runs them again up to four times; ``simulations`` paths
    are tried, each prefix run once. The paper searches one path for each input, with its answer in
    sight; this is one path for all, and what it is rewarded for needs no answers: ``objective=kl``
    is ``exp(-KL)`` from the source's words that come next (``exp(-relative L2)`` without a head).
    A quarter of the calibration data is not searched on, and judges: the report says how far the
    path, and as many blocks chosen greedily one by one, move the outputs there. ``penalty`` is the
    paper's lambda, 5.0 there, where it alone makes paths short; here ``max_path`` does.
    """

    name: ClassVar[str] = "cola"
    simulations: int = 200
    """Paths to try."""
    penalty: float = 0.0
    """Of length, in choosing what to try."""
    objective: Literal["kl"] = "kl"
    """What a path is rewarded for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.simulations < 1:
            raise BadInput(
                f"cola: simulations={self.simulations}: a search without a budget tries no path"
            )
        if self.heal != "none":
            raise BadInput("cola: its paths may repeat blocks, and heal= is for those that do not")

    def searched(self, runner: PathRunner, blocks: int) -> Mapping[Places, float]:
        """See ``SearchedPath``."""
        moved: dict[Places, float] = {}

        def reward(path: Places, shared: int) -> float:
            moved[path] = runner.divergence(path, shared)
            return math.exp(-moved[path])

        tree = LayerTree(blocks, self.max_path, self.penalty, reward, self.seed)
        tree.search(self.simulations)
        return moved
