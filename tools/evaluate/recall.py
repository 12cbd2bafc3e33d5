"""``recall``: what a model can fetch from its own context."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...ir.core.errors import BadInput
from .documents import batched, text_logits
from .stats import wilson
from .subject import TEXT, Subject
from .task import EvalResult, Finite, Setting, Task

PAIRS = (4, 8, 16)
"""Lengths of the key-value lists."""
COPIED = (8, 16, 32)
"""Lengths of the texts to copy."""
CUE, CONTINUED = 2, 3
"""Of a text to copy, so many words are given again, and so many must follow."""
PROMPTS = 384
WORDS = 2000
"""Of the tokenizer's whole words the first so many: a BPE learns the frequent ones first."""
FEWEST_WORDS = 2 * max(PAIRS) + 2


@dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt and of the answer that must follow it."""

    kind: str
    length: int
    ids: tuple[int, ...]
    answer: tuple[int, ...]


class Recall(Task):
    """Key-value recall and copying in context: abilities that perplexity hides, after LLM-KICK
    (arXiv 2310.01382).

    ``recall``: " river: stone, table: cloud, ... river:" must go on with " stone". ``copy``: a list
    of words, then its first two again, must go on with the next three. Words are whole words of the
    tokenizer's own, drawn by the seed; lists of 4, 8 and 16 pairs, texts of 8, 16 and 32 words. A
    sample is a prompt (384, a sixth of each kind), right where every token of the answer is the
    most likely one: the same as greedy decoding. Intervals: Wilson. Guessing among a list's values
    gives 1/length.
    """

    name = "recall"
    kinds = (TEXT,)
    headlines: ClassVar = {"recall": "higher", "copy": "higher"}
    proportions = ("recall", "copy")

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        subject.tokenizer_file()

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        return [self._judge(subject, setting) for subject in subjects]

    def _judge(self, subject: Subject, setting: Setting) -> EvalResult:
        asked = prompts(subject.tokenizer(), setting.samples or PROMPTS, setting.seed)
        fitting = [p for p in asked if len(p.ids) + len(p.answer) <= subject.max_tokens]
        if not fitting:
            raise BadInput(f"{subject.name} takes {subject.max_tokens} tokens: too few for recall")
        notes = []
        if len(fitting) < len(asked):
            gone = sorted({f"{p.kind} {p.length}" for p in set(asked) - set(fitting)})
            notes.append(f"longer than the model's {subject.max_tokens} tokens: {', '.join(gone)}")
        hits = self._hits(subject, fitting, setting)
        figures, interval = {}, {}
        detail: dict[str, Any] = {}
        for kind in dict.fromkeys(p.kind for p in fitting):
            right = [hit for p, hit in zip(fitting, hits, strict=True) if p.kind == kind]
            figures[kind] = sum(right) / len(right)
            interval[kind] = wilson(sum(right), len(right))
        for kind, length in dict.fromkeys((p.kind, p.length) for p in fitting):
            part = [h for p, h in zip(fitting, hits, strict=True)
                    if (p.kind, p.length) == (kind, length)]  # fmt: skip
            detail[f"{kind} {length}"] = _share(part)
        return EvalResult(
            self.name, figures, interval, len(fitting), "prompts", detail, tuple(notes)
        )

    def _hits(self, subject: Subject, asked: Sequence[Prompt], setting: Setting) -> list[bool]:
        hits = [False] * len(asked)
        finite = Finite(self.name, subject, "prompts")
        done = 0
        for rows, inputs in batched([p.ids + p.answer for p in asked]):
            setting.progress(f"{self.name} of {subject.name}", done, len(asked))
            logits = text_logits(subject, inputs)
            for row, index in enumerate(rows):
                start, answer = len(asked[index].ids) - 1, asked[index].answer
                predictions = logits[row, start : start + len(answer)]
                hits[index] = (
                    finite(predictions) and tuple(predictions.argmax(-1).tolist()) == answer
                )
            done += len(rows)
        finite.settle()
        return hits


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    return {"accuracy": sum(hits) / len(hits), "interval": list(wilson(sum(hits), len(hits))),
            "samples": len(hits)}  # fmt: skip


def prompts(tokenizer: Any, count: int, seed: int) -> list[Prompt]:
    """About ``count`` prompts, equally many of each kind and length; the same for the same seed.

    Raises ``BadInput`` where the tokenizer has too few whole words.
    """
    words = whole_words(tokenizer)
    if len(words) < FEWEST_WORDS:
        raise BadInput(
            f"recall needs {FEWEST_WORDS} words that are one token each, this tokenizer has "
            f"{len(words)}"
        )
    rng = random.Random(seed)
    shapes = [("recall", n) for n in PAIRS] + [("copy", n) for n in COPIED]
    each = -(-count // len(shapes))
    examples = []
    for kind, length in shapes:
        make = _recall_text if kind == "recall" else _copy_text
        for _ in range(each):
            prompt, answer = make(words, length, rng)
            examples.append(_encode(tokenizer, kind, length, prompt, answer))
    return examples


def whole_words(tokenizer: Any) -> list[str]:
    """Lower-case words of three letters and more that are one token after a space, by id."""
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    plain = (token.lstrip("Ġ▁") for token, _ in by_id)
    known = [w for w in dict.fromkeys(plain) if re.fullmatch(r"[a-z]{3,12}", w)][: 4 * WORDS]
    codes = tokenizer.encode_batch([f" {w}" for w in known], add_special_tokens=False)
    return [w for w, code in zip(known, codes, strict=True) if len(code.ids) == 1][:WORDS]


def _recall_text(words: Sequence[str], length: int, rng: random.Random) -> tuple[str, str]:
    drawn = rng.sample(words, 2 * length)
    pairs = list(zip(drawn[:length], drawn[length:], strict=True))
    key, value = rng.choice(pairs)
    listed = ",".join(f" {k}: {v}" for k, v in pairs)
    return f"{listed}, {key}:", f" {value}"


def _copy_text(words: Sequence[str], length: int, rng: random.Random) -> tuple[str, str]:
    drawn = [f" {w}" for w in rng.sample(words, min(length, len(words)))]
    # The cue lies anywhere in the text, so that its place says nothing.
    start = rng.randrange(len(drawn) - CUE - CONTINUED + 1)
    cue = "".join(drawn[start : start + CUE])
    return f"{''.join(drawn)}.{cue}", "".join(drawn[start + CUE : start + CUE + CONTINUED])


def _encode(tokenizer: Any, kind: str, length: int, prompt: str, answer: str) -> Prompt:
    plain = tokenizer.encode(prompt, add_special_tokens=False).ids
    both = tokenizer.encode(prompt + answer, add_special_tokens=False).ids
    if both[: len(plain)] != plain or len(both) == len(plain):
        raise BadInput(
            f"the tokenizer joins {prompt[-12:]!r} and {answer!r} into one token: recall does not "
            "work with it"
        )
    head = _prefix(tokenizer)
    return Prompt(kind, length, (*head, *plain), tuple(both[len(plain) :]))


def _prefix(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text: a BOS, or none."""
    bare = tokenizer.encode(" a", add_special_tokens=False).ids
    full = tokenizer.encode(" a").ids
    return list(full[: full.index(bare[0])]) if bare and bare[0] in full else []
