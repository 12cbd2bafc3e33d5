"""``search-path``: the path through the blocks that a search within a budget finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...ir.core.errors import BadInput
from .cheap_scores import cheap_scores
from .path_runner import PathRunner, Places
from .path_search import Trials, by_greed, by_guesses, by_mixed_guesses, by_tree
from .searched_path import SearchedPath


@dataclass(frozen=True, kw_only=True)
class SearchPath(SearchedPath):
    """Freeze the best path of at most ``max_path`` blocks that ``trials`` measurements find: that
    by which the outputs move least, as in ``drop-blocks{score=kl}``.

    ``method=bayes`` guesses by a Gaussian process what to measure next, ``greedy`` leaves out one
    block after another, ``mcts`` is the tree of ``cola`` and may repeat blocks. ``score=mix`` lets
    cheap scores decide first (``cheap_scores``: turn, size, unlikeness, the outputs without each
    block alone): ``bayes`` then looks for weights of theirs whose best path is good, and measures
    the paths that come next by the best weights (RoBoT, He et al. 2024, arXiv 2403.07591);
    ``greedy`` measures the better half by their mean; ``mcts`` spends half of the trials on what
    comes first by that mean and by greed, as most paths that a tree draws first are bad ones, and
    then draws by it. ``score=kl`` measures without them. No method's path is taken that moves the
    outputs more than that of greed with no budget, which is measured in any case. The paths share
    the runs of what they begin with; the report says what that saved. A quarter of the calibration
    data judges.
    """

    name: ClassVar[str] = "search-path"
    keeps_to_greed: ClassVar[bool] = True
    method: Literal["bayes", "greedy", "mcts"] = "bayes"
    """How paths are chosen to be tried."""
    score: Literal["mix", "kl"] = "mix"
    """What decides first: cheap scores, or none."""
    trials: int = 100
    """Paths to measure, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trials < 1:
            raise BadInput(
                f"search-path: trials={self.trials}: a search without a budget tries no path"
            )
        if self.method == "mcts" and self.heal != "none":
            raise BadInput(
                "search-path: paths of method=mcts may repeat blocks, and heal= is for those that "
                "do not"
            )

    def searched(self, runner: PathRunner, blocks: int) -> Mapping[Places, float]:
        """See ``SearchedPath``."""
        trials, length = Trials(runner, self.trials), min(self.max_path, blocks)
        scores = cheap_scores(runner, blocks) if self.score == "mix" else None
        worth = None if scores is None else scores.mean(0).tolist()
        if self.method == "greedy":
            by_greed(trials, blocks, length, worth)
        elif self.method == "mcts":
            by_tree(trials, blocks, self.max_path, worth, self.seed)
        elif scores is None:
            by_guesses(trials, blocks, length, self.seed)
        else:
            by_mixed_guesses(trials, blocks, length, scores, self.seed)
        # Greed measures longer paths on its way.
        return {path: far for path, far in trials.moved.items() if len(path) <= self.max_path}
