"""Calls of a decoder on one text: what it is fed, and the cache that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ...ir.core.errors import BadInput
from ...ir.structure.cache_slots import PAST_AXIS, POSITIONS, past_slot, present_of
from ...ir.structure.tree_input import TREE, tree_mask
from ..base import Executable, Stepping, Steps
from .drafts import Guess
from .steps import ROOM, PlainSteps

Cache = Mapping[str, torch.Tensor]
"""Keys and values by the names of the graph's inputs."""


def feeds(run: Executable, text: Sequence[int], held: int) -> dict[str, torch.Tensor]:
    """The inputs of a call that reads what of a text lies behind ``held`` tokens."""
    inputs = {
        "input_ids": torch.tensor([list(text[held:])]),
        "attention_mask": torch.ones(1, len(text), dtype=torch.int64),
        POSITIONS: torch.arange(held, len(text))[None],
    }
    return {name: tensor for name, tensor in inputs.items() if name in run.input_names}


class StepFeeds:
    """The inputs of steps but the cache, one token a row: tensors that are written anew.

    Behind a step no cache of the processor holds what torch needs to make one, which takes 30 us
    each then.
    """

    def __init__(self, run: Executable, places: torch.Tensor, mask: torch.Tensor) -> None:
        """``places`` ``[rows, 1]`` are those of the last tokens that were read, ``mask``
        ``[rows, length]`` says which ones count, both i64 and changed by steps."""
        self._names = frozenset(run.input_names)
        # Where no layer keeps keys, a mask is of the tokens that are read.
        self._new = all(past_slot(name) is None for name in self._names)
        self._ids = torch.zeros_like(places)
        self._places, self._mask = places, mask
        self.length = mask.shape[1]
        """Tokens that were read, padding among them."""

    def __call__(self, tokens: Sequence[int], open_: Sequence[bool]) -> dict[str, torch.Tensor]:
        """Those of a step that reads these tokens. An ended row reads on, and its positions stay
        within the context."""
        self._ids.numpy()[:, 0] = tokens
        self._places.numpy()[:, 0] += open_
        if self.length == self._mask.shape[1]:
            self._mask = torch.nn.functional.pad(self._mask, (0, ROOM))
        self._mask.numpy()[:, self.length] = open_
        self.length += 1
        inputs = {
            "input_ids": self._ids,
            "attention_mask": self._mask[:, self.length - 1 if self._new else 0 : self.length],
            POSITIONS: self._places,
        }
        return {name: tensor for name, tensor in inputs.items() if name in self._names}


def called(
    run: Executable, text: Sequence[int], cache: Cache, guess: Guess | None = None
) -> dict[str, torch.Tensor]:
    """Outputs on what of the text is not in the cache yet, and on guesses behind it.

    Where these are no line, all of the text but its last token is in the cache.
    """
    held = length(cache)
    if guess is None or guess.is_line:
        tokens = () if guess is None else guess.tokens
        return run(**feeds(run, [*text, *tokens], held), **cache)
    inputs = feeds(run, [*text, *guess.tokens], held)
    inputs[TREE] = tree_mask(guess.parents, held)
    if POSITIONS in inputs:
        inputs[POSITIONS] = held + torch.tensor([[0, *guess.depths]])
    return run(**inputs, **cache)


def length(cache: Cache) -> int:
    """Tokens in a cache."""
    return next((tensor.shape[PAST_AXIS] for tensor in cache.values()), 0)


def cache_of(
    run: Executable, outputs: Mapping[str, torch.Tensor], count: int, rows: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """Keys and values of the first ``count`` tokens, and of the tokens in ``rows`` behind them.

    Where rows do not follow each other, they are moved where they lie: the outputs change. Raises
    ``BadInput`` where some tokens have left.
    """
    pasts = (name for name in run.input_names if past_slot(name) is not None)
    cache = {past: outputs[present_of(past)] for past in pasts}
    end = count + len(rows)
    if any(tensor.shape[PAST_AXIS] < end for tensor in cache.values()):
        raise BadInput("a draft is taken back, and this cache keeps a part of the text alone")
    if list(rows) != list(range(count, end)):
        for tensor in cache.values():
            tensor[:, :, count:end] = tensor[:, :, list(rows)]
    return {name: tensor[:, :, :end] for name, tensor in cache.items()}


def steps_of(run: Executable, outputs: Mapping[str, torch.Tensor]) -> Steps:
    """Steps behind a call that gave these outputs."""
    return run.steps(outputs) if isinstance(run, Stepping) else PlainSteps(run, outputs)


def steps_behind(
    run: Executable, outputs: Mapping[str, torch.Tensor], held: int
) -> Callable[[int], torch.Tensor]:
    """Steps of one text, of which ``held`` tokens were read, behind a call that gave these outputs:
    from the next token to the logits ``[1, columns]`` behind it."""
    steps = steps_of(run, outputs)
    places, mask = torch.full((1, 1), held - 1), torch.ones(1, held, dtype=torch.int64)
    fed = StepFeeds(run, places, mask)
    return lambda token: steps(fed([token], [True]))[0]
