"""Speculation: a cheaper path drafts several tokens, the whole model reads them in one call.

Draft & Verify (Zhang et al. 2023, arXiv 2309.08168): the draft is the model itself with blocks left
out. It goes on from the whole model's own keys and values, of the blocks that it has, so that it
takes no bytes of weights and no cache that stays. What the whole model would have chosen itself is
taken, up to the first token where the two differ, and then that of the whole model.

Each token that is drawn takes one uniform number (``sampling``), the draft's and the whole model's
at a place the same one: the text is the one that the whole model alone writes, greedy and drawn, so
that the distribution is kept. The two may part where logits lie closer than what a product of
several rows rounds differently from one of a single row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..ir.core.errors import BadInput
from ..ir.structure.cache_slots import PARTS, PAST_AXIS, POSITIONS, past_name, past_slot, present_of
from .base import Executable, Stepping, Steps
from .sampling import Sampling, token_at, uniform
from .steps import PlainSteps

MOST = 8
"""Tokens of a draft, at most."""
SURE, SURER, AIM, EASE = 0.6, 0.01, 0.9, 0.9
"""A draft ends behind a token that it holds for less likely than ``SURE``, which moves by ``SURER``
a round towards where a share of ``AIM`` is accepted; shares are averaged with a weight of ``EASE``
on what was. The paper's constants, but for the start (.8)."""
ROUNDS = 5
"""Runs of which a cost is the shortest: what else the machine does only adds to it, and medians of
three were 25 ms for steps of 1.5 ms on a machine at work."""


@dataclass
class Speculation:
    """What drafting came to."""

    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    """Calls of the whole model behind the prompt."""
    written: int = 0
    note: str = ""

    def __str__(self) -> str:
        if not self.drafted:
            return self.note or "nothing was drafted"
        share = self.accepted / self.drafted
        text = (
            f"{self.accepted} of {self.drafted} drafted tokens accepted ({share:.0%}), "
            f"{self.written / max(1, self.rounds):.2f} tokens a call of the whole model"
        )
        return f"{text}; {self.note}" if self.note else text


@dataclass(frozen=True)
class Costs:
    """Seconds of a step of the whole model, of a step of the draft, and of calls of the whole model
    by the number of tokens."""

    step: float
    draft: float
    calls: Mapping[int, float]

    def best(self, share: float) -> tuple[int, float]:
        """How many tokens to draft where each is accepted with probability ``share``, and how many
        times as fast as steps that is; 0 and 1 where nothing is faster.

        A round of k drafted tokens writes (1 - a^(k+1)) / (1 - a) on average (Leviathan et al.
        2022, arXiv 2211.17192).
        """
        best, gain = 0, 1.0
        for count in range(1, MOST + 1):
            written = sum(share**i for i in range(count + 1))
            faster = written * self.step / (count * self.draft + self.call(count + 1))
            best, gain = (count, faster) if faster > gain else (best, gain)
        return best, gain

    def call(self, tokens: int) -> float:
        """Between the lengths that were measured, in a straight line."""
        below = max(n for n in self.calls if n <= tokens)
        above = min((n for n in self.calls if n >= tokens), default=below)
        if above == below:
            return self.calls[below]
        part = (tokens - below) / (above - below)
        return self.calls[below] * (1 - part) + self.calls[above] * part


class Speculator:
    """Continues one text by ``run`` with ``draft``, a path through its blocks.

    Without ``always`` costs are measured on the first prompt, the number of drafted tokens follows
    from them and from what was accepted so far, and where steps are faster nothing is drafted.
    Raises ``BadInput`` where the two have no cache, or not of the same blocks.
    """

    def __init__(self, run: Executable, draft: Executable, *, always: bool) -> None:
        self._run, self._draft, self._always = run, draft, always
        self._words: Sequence[int] = getattr(run, "head_tokens", ())
        self._slots = _shared_slots(run, draft)
        self._costs: Costs | None = None
        self._share = AIM
        self.done = Speculation()

    def measured(self, prompt: Sequence[int]) -> Costs:
        """What steps and calls cost behind a prompt, on this machine."""
        outputs = self._called(self._run, prompt, {})
        return self._measured(prompt, int(prompt[-1]), self._cache(outputs, len(prompt)))

    def write(
        self, prompt: Sequence[int], limit: int, sampling: Sampling, eos: Collection[int]
    ) -> Iterator[int]:
        """The tokens behind a prompt, until one of ``eos`` or a text of ``limit`` tokens."""
        self.done = done = Speculation()
        text, draws = list(prompt), _Draws(sampling)
        outputs = self._called(self._run, text, {})
        cache = self._cache(outputs, len(text))
        fresh = [self._word(draws.token(outputs["logits"][0, -1], 0))]
        if not self._always and self._costs is None:
            self._costs = self._measured(text, fresh[0], cache)
        sure = SURE
        while True:
            draws.taken(len(fresh))
            for token in fresh:
                text.append(token)
                yield token
                if token in eos or len(text) >= limit:
                    return
            most = min(MOST, limit - len(text) - 1)
            if self._costs is not None:
                count, gain = self._costs.best(self._share)
                if not count:
                    done.note = f"off behind {len(text) - len(prompt)} tokens: steps are faster"
                    yield from self._plainly(text, outputs["logits"], cache, draws, limit, eos)
                    return
                most = min(most, count)
                done.note = f"forecast {gain:.2f} times the speed of steps"
            drafted = self._drafted(text, cache, draws, most, sure)
            outputs = self._called(self._run, text + drafted, cache)
            logits = outputs["logits"][0]
            fresh = []
            for place in range(len(drafted) + 1):
                fresh.append(self._word(draws.token(logits[place], place)))
                if place == len(drafted) or fresh[-1] != drafted[place]:
                    break
            accepted = len(fresh) - 1
            cache = self._cache(outputs, len(text) + accepted)
            done.rounds += 1
            done.written += len(fresh)
            done.drafted += len(drafted)
            done.accepted += accepted
            if drafted:
                self._share = EASE * self._share + (1 - EASE) * accepted / len(drafted)
                sure = min(0.99, max(0.0, sure + (SURER if self._share < AIM else -SURER)))

    def _plainly(
        self, text: list[int], logits: torch.Tensor, cache: Mapping[str, torch.Tensor],
        draws: _Draws, limit: int, eos: Collection[int],
    ) -> Iterator[int]:  # fmt: skip
        """The rest of the text, token by token."""
        presents = {present_of(name): tensor for name, tensor in cache.items()}
        steps = _steps(self._run, {**presents, "logits": logits[:, -1:]})
        while len(text) < limit:
            logits = steps(_feeds(self._run, text, len(text) - 1))
            text.append(self._word(draws.token(logits[0, -1], 0)))
            draws.taken(1)
            yield text[-1]
            if text[-1] in eos:
                return

    def _word(self, column: int) -> int:
        return self._words[column] if self._words else column

    def _drafted(
        self, text: Sequence[int], cache: Mapping[str, torch.Tensor], draws: _Draws, most: int,
        sure: float,
    ) -> list[int]:  # fmt: skip
        """Tokens that the draft goes on with, up to ``most``; the last may be one that it is not
        sure of."""
        drafted: list[int] = []
        if most < 1:
            return drafted
        steps = None
        while len(drafted) < most:
            tokens = [*text, *drafted]
            if steps is None:
                outputs = self._called(self._draft, tokens, self._of_draft(cache))
                logits = outputs["logits"][0, -1]
                steps = _steps(self._draft, outputs)
            else:
                logits = steps(_feeds(self._draft, tokens, len(tokens) - 1))[0, -1]
            drafted.append(self._word(draws.token(logits, len(drafted))))
            if not self._always and most < MOST:
                continue
            if float(torch.softmax(logits.float(), -1).max()) < sure:
                break
        return drafted

    def _of_draft(self, cache: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            past_name(own, part): cache[past_name(slot, part)]
            for own, slot in enumerate(self._slots) for part in PARTS
        }  # fmt: skip

    def _called(
        self, run: Executable, text: Sequence[int], cache: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Outputs on what of the text is not in the cache yet."""
        held = next((t.shape[PAST_AXIS] for t in cache.values()), 0)
        return run(**_feeds(run, text, held), **cache)

    def _cache(self, outputs: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
        """Keys and values of the first tokens. Raises ``BadInput`` where some have left."""
        pasts = (name for name in self._run.input_names if past_slot(name) is not None)
        held = {past: outputs[present_of(past)] for past in pasts}
        if any(tensor.shape[PAST_AXIS] < length for tensor in held.values()):
            raise BadInput("a draft is taken back, and this cache keeps a part of the text alone")
        return {name: tensor[:, :, :length] for name, tensor in held.items()}

    def _measured(
        self, text: Sequence[int], token: int, cache: Mapping[str, torch.Tensor]
    ) -> Costs:
        own = self._of_draft(cache)
        calls = {
            count: _seconds(partial(self._called, self._run, [*text, *[token] * count], cache))
            for count in (1, 2, 4, MOST + 1)
        }
        draft = _seconds(partial(self._called, self._draft, [*text, token], own))
        return Costs(calls[1], draft, calls)


class _Draws:
    """The uniform numbers of the next tokens, and the tokens that logits give by them."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._source = torch.Generator().manual_seed(sampling.seed)
        self._numbers: deque[float] = deque()

    def token(self, logits: torch.Tensor, ahead: int) -> int:
        """The token at the place ``ahead`` of the next one."""
        while len(self._numbers) <= ahead:
            self._numbers.append(uniform(self._source))
        return token_at(logits.float().cpu(), self._sampling, self._numbers[ahead])

    def taken(self, count: int) -> None:
        for _ in range(count):
            self._numbers.popleft()


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


def _feeds(run: Executable, text: Sequence[int], held: int) -> dict[str, torch.Tensor]:
    feeds = {
        "input_ids": torch.tensor([list(text[held:])]),
        "attention_mask": torch.ones(1, len(text), dtype=torch.int64),
        POSITIONS: torch.arange(held, len(text))[None],
    }
    return {name: tensor for name, tensor in feeds.items() if name in run.input_names}


def _steps(run: Executable, outputs: Mapping[str, torch.Tensor]) -> Steps:
    return run.steps(outputs) if isinstance(run, Stepping) else PlainSteps(run, outputs)


def _seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
