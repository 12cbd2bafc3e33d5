"""``generate``: how long a greedy continuation stays the original's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput
from .documents import batched, check_text, shuffled, text_logits
from .stats import bootstrap, wilson
from .subject import TEXT, Subject
from .task import EvalResult, Finite, Setting, Task, limited

PROMPT, CONTINUED = 32, 32
PROMPTS = 48


class Generate(Task):
    """Length of the part of a greedy continuation that equals the original's, in tokens.

    A sample is a prompt of 32 tokens of test text (48 of them), continued by 32 tokens. Only the
    original generates, by plain recomputation without a cache. The judged model reads prompt and
    continuation at once: it would have written the same up to the first token that is not its own
    most likely one. ``identical`` is the share of continuations equal to the end. Intervals:
    bootstrap over prompts for ``equal_tokens``, Wilson for ``identical``.
    """

    name = "generate"
    kinds = (TEXT,)
    needs_reference = True
    headlines: ClassVar = {"equal_tokens": "higher"}
    proportions = ("identical",)

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        check_text(subject, setting)
        if subject.max_tokens < PROMPT + CONTINUED:
            raise BadInput(
                f"generate needs {PROMPT + CONTINUED} tokens, {subject.name} takes "
                f"{subject.max_tokens}"
            )

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        assert reference is not None
        starts, notes = _prompts(reference, setting)
        texts = self._continued(reference, starts, setting)
        return [self._judge(s, texts, notes, setting) for s in subjects]

    def _continued(
        self, reference: Subject, starts: Sequence[tuple[int, ...]], setting: Setting
    ) -> list[list[int]]:
        texts = [list(ids) for ids in starts]
        finite = Finite(self.name, reference, "steps")
        for step in range(CONTINUED):
            setting.progress(f"{reference.name} continues", step, CONTINUED)
            for rows, inputs in batched(texts):
                last = text_logits(reference, inputs)[:, -1]
                for row, index in enumerate(rows):
                    finite(last[row])
                    texts[index].append(int(last[row].argmax()))
            finite.settle()
        return texts

    def _judge(
        self, subject: Subject, texts: Sequence[Sequence[int]], notes: list[str], setting: Setting
    ) -> EvalResult:
        lengths = [0] * len(texts)
        finite = Finite(self.name, subject, "prompts")
        for rows, inputs in batched(texts):
            logits = text_logits(subject, inputs)
            for row, index in enumerate(rows):
                predictions = logits[row, PROMPT - 1 : -1]
                finite(predictions)
                lengths[index] = _equal_prefix(predictions.argmax(-1), texts[index][PROMPT:])
        finite.settle()
        whole = sum(length == CONTINUED for length in lengths)
        interval = {"identical": wilson(whole, len(lengths))}
        ends = bootstrap([lengths], lambda s: s[0] / len(lengths), setting.seed)
        if ends is not None:
            interval["equal_tokens"] = ends
        figures = {"equal_tokens": sum(lengths) / len(lengths), "identical": whole / len(lengths)}
        return EvalResult(
            self.name, figures, interval, len(lengths), "prompts",
            detail={"prompt_tokens": PROMPT, "continued_tokens": CONTINUED}, notes=tuple(notes),
        )  # fmt: skip


def _prompts(reference: Subject, setting: Setting) -> tuple[list[tuple[int, ...]], list[str]]:
    """The first tokens of documents that are long enough, and a note where they are too few."""
    most = setting.samples or PROMPTS
    tokenizer = reference.tokenizer()
    heads: dict[tuple[int, ...], None] = {}
    for text in shuffled(setting, reference.folder):
        ids = tokenizer.encode(text).ids
        if len(ids) >= PROMPT:
            heads[tuple(ids[:PROMPT])] = None
        if len(heads) == most:
            break
    if not heads:
        raise BadInput(f"generate: no document of the text has {PROMPT} tokens")
    count, notes = limited(len(heads), setting, PROMPTS, "prompts")
    return list(heads)[:count], notes


def _equal_prefix(chosen: torch.Tensor, expected: Sequence[int]) -> int:
    equal = chosen == torch.tensor(list(expected))
    return int(equal.int().cumprod(0).sum())
