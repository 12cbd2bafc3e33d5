"""Speculation: a draft writes several tokens ahead, the whole model reads them in one call.

What the whole model would have chosen itself is taken, up to the first token that was not guessed,
and then that of the whole model. Who drafts: a cheaper path (``draft_path``), or what the model
said before (``draft_recycle``).

Each token that is drawn takes one uniform number (``sampling``), the draft's and the whole model's
at a place the same one: the text is the one that the whole model alone writes, greedy and drawn, so
that the distribution is kept. The two may part where logits lie closer than what a product of
several rows rounds differently from one of a single row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ...ir.core.errors import BadInput
from ...ir.structure.cache_slots import is_recurrent, present_of
from ..base import Executable
from .draft_costs import Costs, shortest, timed_calls
from .drafts import Drafter, Draws, Guess
from .sampling import Sampling
from .text_calls import Cache, cache_of, called, steps_behind


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


def takes_back(run: Executable) -> bool:
    """Whether a graph's cache can be cut back to fewer tokens."""
    return not any(map(is_recurrent, run.input_names))


def check_takes_back(run: Executable) -> None:
    """Raise ``BadInput`` for a graph whose cache cannot be cut back to fewer tokens."""
    if not takes_back(run):
        raise BadInput(
            "a draft that is wrong is taken back, and this model has layers whose state holds "
            "every token that was read (past.N.recurrent, past.N.conv): write without a draft"
        )


class Speculator:
    """Continues one text by ``run`` with what one of ``drafters``, by their names, guesses.

    Who guesses, and how many tokens, follows from what calls cost, measured on the first prompt
    where ``costs`` does not say so, and from what was accepted so far: in each round whatever is
    forecast to be fastest. Where steps are faster nothing is drafted, and where they would be even
    if all guesses were right nothing is learned for later texts either; with ``always`` as many as
    cost least, one at the least.
    """

    def __init__(
        self, run: Executable, drafters: Mapping[str, Drafter], *, always: bool,
        costs: Mapping[str, Costs] | None = None,
    ) -> None:  # fmt: skip
        """Raises ``BadInput`` as ``check_takes_back``."""
        check_takes_back(run)
        self._run, self._drafters, self._always = run, drafters, always
        self._words: Sequence[int] = getattr(run, "head_tokens", ())
        self.costs = dict(costs or {})
        self._hopeful: Mapping[str, Drafter] = {}
        """Those that would be faster than steps if all their guesses were right."""
        self.done = Speculation()

    def measured(self, prompt: Sequence[int]) -> dict[str, Costs]:
        """What steps and calls cost behind a prompt, on this machine, with each drafter."""
        outputs = called(self._run, prompt, {})
        cache = self._cache(outputs, len(prompt))
        return {name: self._measured(drafter, prompt, int(prompt[-1]), cache)
                for name, drafter in self._drafters.items()}  # fmt: skip

    def write(
        self, prompt: Sequence[int], limit: int, sampling: Sampling, eos: Collection[int]
    ) -> Iterator[int]:
        """The tokens behind a prompt, until one of ``eos`` or a text of ``limit`` tokens."""
        self.done = done = Speculation()
        text, draws = list(prompt), Draws(sampling)
        outputs = called(self._run, text, {})
        _check_rows(outputs, len(text))
        cache = self._cache(outputs, len(text))
        fresh = [self._word(draws.token(outputs["logits"][0, -1], 0))]
        for name in self._drafters.keys() - self.costs.keys():
            self.costs[name] = self._measured(self._drafters[name], text, fresh[0], cache)
        self._hopeful = {
            name: drafter for name, drafter in self._drafters.items()
            if self._always or self.costs[name].may_pay
        }  # fmt: skip
        self._tell(text, outputs["logits"][0])
        while True:
            draws.taken(len(fresh))
            for token in fresh:
                text.append(token)
                yield token
                if token in eos or len(text) >= limit:
                    return
            room = limit - len(text) - 1
            name, count = self._choice(room) if room else ("", 0)
            if room and not count:
                written = len(text) - len(prompt)
                whatever = "" if self._hopeful else ", whatever is guessed"
                done.note = f"off behind {written} tokens: steps are faster{whatever}"
                yield from self._plainly(text, outputs["logits"], cache, draws, limit, eos)
                return
            guess = self._drafters[name].guess(text, cache, draws, count) if name else Guess()
            outputs = called(self._run, text, cache, guess)
            rows, fresh = self._walk(guess, outputs["logits"][0], draws)
            held = len(text) - 1
            cache = self._cache(outputs, held + 1, [held + row for row in rows])
            for other, drafter in self._hopeful.items():
                drafter.judged(guess if other == name else Guess(), text[-1], fresh)
            self._tell([text[-1], *guess.tokens], outputs["logits"][0])
            done.rounds += 1
            done.written += len(fresh)
            done.drafted += len(guess.tokens)
            done.accepted += len(rows)

    def _choice(self, room: int) -> tuple[str, int]:
        """Who guesses next, and how many tokens, of ``room`` at the most; 0 where steps are
        faster."""
        name, count, gain = "", 0, 0.0
        for each, drafter in self._hopeful.items():
            most = min(drafter.most, room)
            pays, faster = self.costs[each].best(drafter.written, most, int(self._always))
            if pays and faster > gain:
                name, count, gain = each, pays, faster
        if not name:
            return "", 0
        who = [name] if len(self._drafters) > 1 else []
        parts = [*who, f"forecast {gain:.2f} times the speed of steps", self._drafters[name].remark]
        self.done.note = ", ".join(filter(None, parts))
        return name, count

    def _tell(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        for drafter in self._hopeful.values():
            drafter.heard(tokens, logits)

    def _walk(
        self, guess: Guess, logits: torch.Tensor, draws: Draws
    ) -> tuple[list[int], list[int]]:
        """The rows of guesses that the whole model takes, and the tokens that it writes."""
        rows: list[int] = []
        fresh: list[int] = []
        row = 0
        while True:
            fresh.append(self._word(draws.token(logits[row], len(rows))))
            below = guess.child(row, fresh[-1])
            if below is None:
                return rows, fresh
            rows.append(below)
            row = below

    def _plainly(
        self, text: list[int], logits: torch.Tensor, cache: Cache, draws: Draws, limit: int,
        eos: Collection[int],
    ) -> Iterator[int]:  # fmt: skip
        """The rest of the text, token by token."""
        presents = {present_of(name): tensor for name, tensor in cache.items()}
        outputs = {**presents, "logits": logits[:, -1:]}
        step = steps_behind(self._run, outputs, len(text) - 1)
        while len(text) < limit:
            logits = step(text[-1])
            fresh = self._word(draws.token(logits[-1], 0))
            for drafter in self._hopeful.values():
                drafter.judged(Guess(), text[-1], [fresh])
            self._tell(text[-1:], logits)
            text.append(fresh)
            draws.taken(1)
            yield fresh
            if fresh in eos:
                return

    def _word(self, column: int) -> int:
        return self._words[column] if self._words else column

    def _cache(
        self, outputs: Mapping[str, torch.Tensor], count: int, rows: Sequence[int] = ()
    ) -> dict[str, torch.Tensor]:
        return cache_of(self._run, outputs, count, rows)

    def _measured(self, drafter: Drafter, text: Sequence[int], token: int, cache: Cache) -> Costs:
        """Of steps as they are without a draft, and of whole rounds with guesses of each size."""
        longer, held = [*text, token], len(text)
        seconds = drafter.seconds(longer, cache)
        outputs = called(self._run, longer, cache, drafter.example(token, 2))
        # As a round leaves it: with memory behind it that is not its own.
        cache = self._cache(outputs, held)

        def rounded(size: int) -> None:
            guess = drafter.example(token, size - 1)
            outputs = called(self._run, longer, cache, guess)
            self._cache(outputs, held + 1, [held + size - 1] if size > 1 else [])
            drafter.heard([token, *guess.tokens], outputs["logits"][0])

        step = self._step_seconds(longer, called(self._run, longer, cache))
        return Costs({**timed_calls(rounded, drafter.most, step), 1: step}, seconds)

    def _step_seconds(self, text: Sequence[int], outputs: Mapping[str, torch.Tensor]) -> float:
        return shortest(partial(steps_behind(self._run, outputs, len(text)), text[-1]))


def _check_rows(outputs: Mapping[str, torch.Tensor], count: int) -> None:
    if outputs["logits"].shape[1] < count:
        raise BadInput(
            "a draft is checked by what the model says behind each token, and this graph gives the "
            "logits of the last one alone"
        )
