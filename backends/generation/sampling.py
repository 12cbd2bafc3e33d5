"""How a token is chosen from logits: the likeliest, or drawn by temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...ir.core.errors import BadInput

FLOOR = 1e-3
"""A nucleus is first looked for among words at least so likely as this part of the likeliest: to
sort all of 65536 words takes 13 ms, which is longer than a small model's step."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. ``temperature`` 0 takes the most likely one; above 0 one is drawn from
    ``softmax(logits / temperature)``, cut to the ``top_k`` most likely tokens (0: all; Fan et al.
    2018, arXiv 1805.04833) and then to their nucleus: the fewest most likely tokens that hold
    ``top_p`` of what is left (Holtzman et al. 2020, arXiv 1904.09751). Row ``i`` draws by
    ``seed + i``, one uniform number a token.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise BadInput(f"temperature {self.temperature} must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            raise BadInput(f"top_k {self.top_k} must be 0 (all) or above")

    def chooser(self, rows: int) -> Chooser:
        """What chooses the tokens of one run over so many rows."""
        return Chooser(self, [torch.Generator().manual_seed(self.seed + i) for i in range(rows)])


class Chooser:
    """Chooses tokens step by step; each row draws from a stream of its own."""

    def __init__(self, sampling: Sampling, generators: Sequence[torch.Generator]) -> None:
        self._sampling = sampling
        self._generators = generators

    def __call__(self, logits: torch.Tensor) -> list[int]:
        """One token a row of ``[batch, words]``. Raises ``BadInput`` where a row holds NaN."""
        rows, drawn = logits.float().cpu(), self._sampling.temperature > 0
        return [
            token_at(row, self._sampling, uniform(source) if drawn else 0.0)
            for row, source in zip(rows, self._generators, strict=True)
        ]


def uniform(source: torch.Generator) -> float:
    """The number by which the next token of a row is drawn."""
    return float(torch.rand(1, generator=source, dtype=torch.float64))


def token_at(logits: torch.Tensor, sampling: Sampling, number: float) -> int:
    """The token of ``logits`` f32 ``[words]``, on the CPU, that the number of [0, 1) stands for;
    the likeliest at temperature 0. Raises ``BadInput`` where one is NaN."""
    # numpy finds the highest of 65536 in 8 us, torch in 150.
    numbers = logits.numpy()
    likeliest = int(numbers.argmax())  # of a row with a NaN, its place
    if math.isnan(numbers[likeliest]):
        raise BadInput("the model's logits are NaN: no token can be chosen")
    if sampling.temperature == 0:
        return likeliest
    words, likely = candidates(logits / sampling.temperature, sampling)
    sums = likely.double().cumsum(0)
    index = int(torch.searchsorted(sums, number * sums[-1], right=True))
    return int(words[min(index, len(words) - 1)])


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Words i64 ``[n]`` that may be drawn, and how likely each is ``[n]``, of ``logits``
    ``[words]``; the likelihoods need not add up to 1. The most likely word is always among them."""
    count = len(logits)
    if sampling.top_k and sampling.top_k < count:
        logits, words = logits.topk(sampling.top_k)
        return _nucleus(words, torch.softmax(logits, -1), sampling.top_p)
    likely = torch.softmax(logits, -1)
    if sampling.top_p == 1:
        return torch.arange(count), likely
    for floor in (FLOOR * float(likely.max()), 0.0):
        (words,) = (likely >= floor).nonzero(as_tuple=True)
        if float(likely[words].sum()) >= sampling.top_p:
            break
    ordered, places = likely[words].sort(descending=True, stable=True)
    return _nucleus(words[places], ordered, sampling.top_p)


def _nucleus(
    words: torch.Tensor, likely: torch.Tensor, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest of ``words``, the most likely first, that hold ``top_p``."""
    kept = likely.cumsum(0) - likely < top_p
    kept[0] = True
    return words[kept], likely[kept]
