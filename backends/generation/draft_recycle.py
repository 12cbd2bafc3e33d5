"""A draft that costs no run: what the model held likely behind each token before.

Token Recycling (Luo et al. 2024, arXiv 2408.08696): a matrix holds for each token the eight words
that the model last held for the likeliest behind it. From the last token of a text it gives a tree
of guesses, which the whole model reads in one call (``ir.structure.tree_input``), and whatever it
says behind each of them goes into the matrix. It is 16 bytes a word up to 65,536 words (1 MB), 32
above; it lasts as long as the process.

The published tree is one of 80 tokens for all. Here its size follows from what calls cost on this
machine, and its form from how often each rank of the matrix was right so far: the nodes are those
of the largest products of such chances.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ...ir.core.errors import BadInput
from ...ir.structure.tree_input import TREE
from ..base import Executable
from .drafts import Draws, Guess
from .text_calls import called

WIDTH = 8
"""Words that are kept for each token."""
CHANCES = (0.40, 0.12, 0.07, 0.05, 0.04, 0.03, 0.02, 0.02)
"""How often each rank is right, before anything was seen, with the weight of ``BELIEF`` tokens."""
BELIEF = 32
RENEWED = 16
"""Calls behind which a tree's form is chosen anew, where one is drafted."""
LEARNED = 512
"""Tokens of a prompt from which the matrix is filled, the last ones."""
APART = 1e-2
"""How far logits of a tree may be from those of a line, in relative L2: rounding of activations to
8 bits moves them by 1e-3, a token that stands one place too far by .1 and more."""
SMALL = 1 << 16
"""Words that two bytes can name."""
Form = tuple[tuple[int, int], ...]
"""For each node of a tree its parent, 0 the root and 1 the first node, and its rank there."""


class Recycled:
    """Guesses trees for ``run``, of what it said before.

    Raises ``BadInput`` where it does not take trees.
    """

    most = 80

    def __init__(self, run: Executable, words: int) -> None:
        """``words`` is how many tokens the model reads."""
        if not getattr(run, "takes_tree", False):
            raise BadInput(
                f"draft recycle: a tree of candidates is read by the input {TREE}, which the "
                "artifact does not have: make it with the pass tree-mask behind the others"
            )
        self._run, small = run, words <= SMALL
        self.matrix = np.zeros((words, WIDTH), np.uint16 if small else np.int32)
        self._counts = np.zeros(words, np.uint8)
        self._columns = np.asarray(getattr(run, "head_tokens", ()), dtype=np.int64)
        self._hits = [BELIEF * chance for chance in CHANCES]
        self._tried = float(BELIEF)
        self._form, self._written = form(CHANCES, self.most)
        self._judged = 0
        size = f"{self.nbytes / 1e6:.1f} MB of recycled words"
        self.remark = size if small else f"{size}, as the model has {words} of them"

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept between calls."""
        return self.matrix.nbytes + self._counts.nbytes

    @property
    def chances(self) -> list[float]:
        """How often the word of each rank came next."""
        return [hits / self._tried for hits in self._hits]

    def guess(
        self, text: Sequence[int], cache: Mapping[str, torch.Tensor], draws: Draws, count: int
    ) -> Guess:
        """See ``Drafter``. Below a token of which nothing is known stands nothing."""
        self._renew()
        tokens, parents = [text[-1]], [0]
        rows: list[int | None] = [0]
        for parent, rank in self._form[:count]:
            row = rows[parent]
            known = row is not None and rank < self._known(tokens[row])
            rows.append(len(tokens) if known else None)
            if row is not None and known:
                tokens.append(int(self.matrix[tokens[row], rank]))
                parents.append(row)
        return Guess(tuple(tokens[1:]), tuple(parents[1:]))

    def heard(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """See ``Drafter``. Of a token that occurs twice the later counts."""
        width = min(WIDTH, logits.shape[-1])
        likely = logits[-LEARNED:].float().topk(width).indices.cpu().numpy()
        words = self._columns[likely] if len(self._columns) else likely
        places = np.asarray(tokens[-LEARNED:])
        known = places < len(self.matrix)
        self.matrix[places[known], :width] = words[known]
        self._counts[places[known]] = width

    def judged(self, guess: Guess, last: int, fresh: Sequence[int]) -> None:
        """See ``Drafter``."""
        for token, word in itertools.pairwise([last, *fresh]):
            count = self._known(token)
            self._tried += bool(count)
            for rank in np.flatnonzero(self.matrix[token, :count] == word) if count else ():
                self._hits[rank] += 1
        self._judged += 1

    def written(self, count: int) -> float:
        """See ``Drafter``."""
        self._renew()
        return self._written[min(count, len(self._written) - 1)]

    def example(self, token: int, count: int) -> Guess:
        """See ``Drafter``."""
        return Guess((token,) * count, (0,) * count)

    def seconds(self, text: Sequence[int], cache: Mapping[str, torch.Tensor]) -> float:
        """See ``Drafter``: a look into a matrix is not counted.

        A branch must be read as the line that it is. What a graph makes of places beside what was
        recognised when it was written would show here.
        """
        first, second = int(text[0]), int(text[-1])
        line, tree = Guess.line([second, first]), Guess((first, second, first), (0, 0, 2))
        alone = called(self._run, text, cache, line)["logits"][0].float()
        among = called(self._run, text, cache, tree)["logits"][0, [0, 2, 3]].float()
        gap = float((alone - among).norm() / alone.norm())
        if not gap < APART:
            raise BadInput(
                f"draft recycle: in a tree the model says something else behind a text than in a "
                f"line ({gap:.1g} apart, relative L2): it looks at where tokens lie"
            )
        return 0.0

    def _renew(self) -> None:
        """Choose the form of trees anew, when it is asked for: while nothing is drafted none is."""
        if self._judged >= RENEWED:
            self._form, self._written = form(self.chances, self.most)
            self._judged = 0

    def _known(self, token: int) -> int:
        return int(self._counts[token]) if token < len(self._counts) else 0


def form(chances: Sequence[float], count: int) -> tuple[Form, list[float]]:
    """The tree of ``count`` nodes in which the next tokens lie most often, where the word of each
    rank comes next with one of these chances; and how many tokens a call writes behind the first
    0, 1, 2 and so on of them, which are the best tree of so many."""
    nodes: list[tuple[int, int]] = []
    written, open_ = [1.0], _children(0, 1.0, chances)
    heapq.heapify(open_)
    while open_ and len(nodes) < count:
        share, parent, rank = heapq.heappop(open_)
        nodes.append((parent, rank))
        written.append(written[-1] - share)
        for child in _children(len(nodes), -share, chances):
            heapq.heappush(open_, child)
    return tuple(nodes), written


def _children(
    parent: int, share: float, chances: Sequence[float]
) -> list[tuple[float, int, int]]:
    return [(-share * chance, parent, rank) for rank, chance in enumerate(chances)]
