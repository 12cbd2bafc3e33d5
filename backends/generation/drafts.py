"""What may come next: guesses, who makes them, and the numbers by which tokens are drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from .sampling import Sampling, token_at, uniform


@dataclass(frozen=True)
class Guess:
    """Tokens that may come behind the last one of a text: a tree, of which that one is the root."""

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    """Of each the row of its parent in a call: 0 is the root, 1 the first of ``tokens``. Parents
    come first."""

    @classmethod
    def line(cls, tokens: Sequence[int]) -> Guess:
        """Each below the one before it."""
        return cls(tuple(tokens), tuple(range(len(tokens))))

    @property
    def is_line(self) -> bool:
        return self.parents == tuple(range(len(self.tokens)))

    @cached_property
    def depths(self) -> list[int]:
        """How far each stands behind the root."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths[1:]

    def child(self, row: int, token: int) -> int | None:
        """The row of this token below a row; ``None`` where it was not guessed there."""
        rows = enumerate(zip(self.parents, self.tokens, strict=True), 1)
        return next((i for i, pair in rows if pair == (row, token)), None)


class Draws:
    """The uniform numbers of the next tokens, and the tokens that logits give by them; no numbers
    where the likeliest is taken."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._drawn = sampling.temperature > 0
        self._source = torch.Generator().manual_seed(sampling.seed)
        self._numbers: deque[float] = deque()

    def token(self, logits: torch.Tensor, ahead: int) -> int:
        """The column of ``logits`` ``[columns]`` that is drawn at the place ``ahead`` of the next
        one."""
        while self._drawn and len(self._numbers) <= ahead:
            self._numbers.append(uniform(self._source))
        number = self._numbers[ahead] if self._drawn else 0.0
        return token_at(logits.float().cpu(), self._sampling, number)

    def taken(self, count: int) -> None:
        """So many tokens were written."""
        for _ in range(count if self._drawn else 0):
            self._numbers.popleft()


class Drafter(Protocol):
    """What writes ahead. It learns of what the whole model says of its guesses."""

    most: int
    """Tokens of a guess, at most."""
    remark: str
    """What a person should know of it; empty for nothing."""

    def guess(
        self, text: Sequence[int], cache: Mapping[str, torch.Tensor], draws: Draws, count: int
    ) -> Guess:
        """At most ``count`` tokens behind a text, whose last token is not in the cache yet."""

    def judged(self, guess: Guess, last: int, fresh: Sequence[int]) -> None:
        """Behind the text's token ``last`` the whole model wrote ``fresh``: guesses that it took,
        and one token more."""

    def heard(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """What the whole model says behind each of these tokens, ``[tokens, columns]``."""

    def written(self, count: int) -> float:
        """Tokens that a call of the whole model writes on average behind ``count`` guesses."""

    def example(self, token: int, count: int) -> Guess:
        """A guess of so many tokens, to be timed."""

    def seconds(self, text: Sequence[int], cache: Mapping[str, torch.Tensor]) -> float:
        """What one token of a guess takes, behind a text as in ``guess``. Raises ``BadInput`` where
        the whole model does not read guesses as it must."""
