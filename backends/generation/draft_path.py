"""A draft by a cheaper path through the model's own blocks.

Draft & Verify (Zhang et al. 2023, arXiv 2309.08168): the draft is the model itself with blocks left
out. It goes on from the whole model's own keys and values, of the blocks that it has, so that it
takes no bytes of weights and no cache that stays. Its tokens are drawn by the numbers that the
whole model's are drawn by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from ...ir.core.errors import BadInput
from ...ir.structure.cache_slots import PARTS, past_name, past_slot
from ..base import Executable
from .draft_costs import shortest, steady
from .drafts import Draws, Guess
from .text_calls import Cache, called, steps_behind

SURE, SURER, AIM, EASE = 0.6, 0.01, 0.9, 0.9
"""A draft ends behind a token that it holds for less likely than ``SURE``, which moves by ``SURER``
a round towards where a share of ``AIM`` is accepted; shares are averaged with a weight of ``EASE``
on what was. The paper's constants, but for the start (.8)."""


class PathDraft:
    """Guesses lines for ``run`` by ``draft``, a path through its blocks.

    Raises ``BadInput`` where the two have no cache, or not of the same blocks.
    """

    most = 8
    remark = ""

    def __init__(self, run: Executable, draft: Executable) -> None:
        self._draft = draft
        self._words: Sequence[int] = getattr(run, "head_tokens", ())
        self._slots = _shared_slots(run, draft)
        self._share, self._sure = AIM, SURE

    def guess(
        self, text: Sequence[int], cache: Mapping[str, torch.Tensor], draws: Draws, count: int
    ) -> Guess:
        """See ``Drafter``; the last token may be one that it is not sure of."""
        drafted: list[int] = []
        if count < 1:
            return Guess()
        outputs = called(self._draft, text, self._own(cache))
        logits, step = outputs["logits"][0, -1], steps_behind(self._draft, outputs, len(text))
        while True:
            column = draws.token(logits, len(drafted))
            drafted.append(self._words[column] if self._words else column)
            unsure = float(torch.softmax(logits.float(), -1).max()) < self._sure
            if len(drafted) == count or unsure:
                return Guess.line(drafted)
            logits = step(drafted[-1])[-1]

    def heard(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Nothing is learned of it."""

    def judged(self, guess: Guess, last: int, fresh: Sequence[int]) -> None:
        """See ``Drafter``."""
        if guess.tokens:
            accepted = (len(fresh) - 1) / len(guess.tokens)
            self._share = EASE * self._share + (1 - EASE) * accepted
            step = SURER if self._share < AIM else -SURER
            self._sure = min(0.99, max(0.0, self._sure + step))

    def written(self, count: int) -> float:
        """See ``Drafter``."""
        return steady(self._share, count)

    def example(self, token: int, count: int) -> Guess:
        """See ``Drafter``."""
        return Guess.line([token] * count)

    def seconds(self, text: Sequence[int], cache: Mapping[str, torch.Tensor]) -> float:
        """See ``Drafter``."""
        return shortest(partial(called, self._draft, text, self._own(cache)))

    def _own(self, cache: Cache) -> dict[str, torch.Tensor]:
        return {
            past_name(own, part): cache[past_name(slot, part)]
            for own, slot in enumerate(self._slots) for part in PARTS
        }  # fmt: skip


def _shared_slots(run: Executable, draft: Executable) -> list[int]:
    """For each slot of the draft's cache that of the whole model with the same block."""
    whole, own = _layers(run), _layers(draft)
    if not whole or not own:
        raise BadInput(
            "a draft goes on from the model's key-value cache, and the graph has none: make the "
            "artifact with --cache (cache=True in Python)"
        )
    strange = next((layer for layer in own if layer not in whole), None)
    if strange is not None:
        raise BadInput(f"the draft goes through block {strange}, which the model does not have")
    if len(own) > len(whole):
        raise BadInput(
            f"the draft's path is longer than the model: {len(own)} blocks, and the model has "
            f"{len(whole)}; a draft is to be cheaper"
        )
    return [whole.index(layer) for layer in own]


def _layers(run: Executable) -> list[int]:
    """For each slot of a cache the block that it is of."""
    count = len({past_slot(name) for name in run.input_names} - {None})
    return list(getattr(run, "kv_layers", ()) or range(count))
