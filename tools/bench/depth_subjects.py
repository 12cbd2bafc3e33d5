"""What the table of depths judges: a model, three sets of data to learn from, and unseen data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...backends import Executable
from ...ir.canonical.families import canonicalize
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.zoo import scenes
from ...ir.load.zoo.text import english_sentences, read_tokenizer, shipped_text, token_batches

Batch = Mapping[str, torch.Tensor]
WINDOWS, WINDOW, JUDGED = 24, 256, 128
SETS, LEARNED, TOKENS = 3, 14, 128
PICTURES, SENTENCES, QUESTIONS = 64, 48, 64
"""Of one set to learn from."""
UNSEEN = 1000
"""Pictures or questions to judge by; sentences are ``UNSEEN // 4``."""


class Score(NamedTuple):
    """What is judged; the figure of a graph in ONNX Runtime."""

    name: str
    of: Callable[[Executable], float]
    digits: int = 2


@dataclass(frozen=True)
class DepthSubject:
    """A model as its file has it, canonical, and its data."""

    view: View
    sets: list[list[dict[str, torch.Tensor]]]
    """``SETS`` of them, each in batches."""
    prompt: dict[str, torch.Tensor]
    """What is timed."""
    score: Score

    @property
    def samples(self) -> list[dict[str, torch.Tensor]]:
        """One short row, to verify on."""
        return [{name: rows[:1] for name, rows in self.sets[0][0].items()}]


def subject(name: str, *, beginnings: bool = False) -> DepthSubject:
    """One of ``SUBJECTS``; with ``beginnings`` of texts in the place of joined text, where it
    learns from text."""
    view = load(name, cache=name in ("zoo:tiny-llama", "zoo:tiny-llava"))
    canonicalize(view)  # once: every run takes a copy
    return SUBJECTS[name](view, beginnings)


# --- text -----------------------------------------------------------------------------------------


def _text(view: View, beginnings: bool) -> DepthSubject:
    unseen = windows(view, shipped_text("test"), WINDOWS, WINDOW)
    prompt = {name: rows[:1, :TOKENS] for name, rows in unseen[0].items()}
    sets = learned_sets(view, beginnings=beginnings)
    score = Score("perplexity", lambda run: perplexity(run, unseen))
    return DepthSubject(view, sets, prompt, score)


def learned_sets(view: View, *, beginnings: bool = False) -> list[list[dict[str, torch.Tensor]]]:
    """``SETS`` sets of ``LEARNED`` windows of ``TOKENS`` tokens of the calibration split: joined
    text, or each a text's ``beginnings``."""
    tokenizer, texts = _tokenizer(view), shipped_text("calibration")
    if not beginnings:
        return [windows(view, texts[n::SETS], LEARNED, TOKENS) for n in range(SETS)]
    whole = (tokenizer.encode(text).ids for text in texts if len(text) > 900)
    rows = torch.tensor([ids[:TOKENS] for ids in whole if len(ids) >= TOKENS])
    return [_batches(rows[n::SETS][:LEARNED]) for n in range(SETS)]


def windows(
    view: View, texts: Sequence[str], count: int, length: int
) -> list[dict[str, torch.Tensor]]:
    """Batches of windows of joined texts, one behind the other."""
    tokenizer = _tokenizer(view)
    ids = [i for text in texts for i in tokenizer.encode(text).ids]
    return _batches(torch.tensor(ids[: count * length]).view(count, length))


def _tokenizer(view: View) -> Any:
    tokenizer = read_tokenizer(Path(view.source.folder or ""))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _batches(rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Of up to eight rows of tokens."""
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)}
            for part in torch.split(rows, 8)]  # fmt: skip


def perplexity(run: Executable, batches: Sequence[Batch]) -> float:
    """Of the last ``JUDGED`` tokens of each row."""
    total, count = 0.0, 0
    for batch in batches:
        likely = run(**batch)["logits"][:, -JUDGED - 1 : -1].log_softmax(-1)
        next_ids = batch["input_ids"][:, -JUDGED:, None]
        total -= float(likely.gather(-1, next_ids).sum(dtype=torch.float64))
        count += next_ids.numel()
    return math.exp(total / count)


# --- pictures, sentences, questions ---------------------------------------------------------------


def _pictures(view: View, _: bool) -> DepthSubject:
    drawn = [pixels for pixels, _ in scenes.classified("calibration", SETS * PICTURES, 5, 8)]
    unseen = list(scenes.classified("test", UNSEEN, 3))
    sets = [[{"pixel_values": pixels} for pixels in drawn[n::SETS]] for n in range(SETS)]

    def right(run: Executable) -> float:
        shown = ((run(pixel_values=pixels)["logits"], labels) for pixels, labels in unseen)
        return _share(shown)

    return DepthSubject(view, sets, {"pixel_values": drawn[0]}, Score("right, %", right, 1))


def _share(judged: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Of rows of ``[rows, answers]`` those whose largest is the right one, in per cent."""
    hits = [(logits.argmax(-1) == right) for logits, right in judged]
    return 100 * float(torch.cat(hits).double().mean())


def _sentences(view: View, _: bool) -> DepthSubject:
    tokenizer = read_tokenizer(Path(view.source.folder or ""))
    count = SETS * SENTENCES
    chosen = english_sentences(count + UNSEEN // 4)
    # Sentences of one topic follow each other: every part takes of all of them.
    learned = [text for place, text in enumerate(chosen) if place % 11 < 4][:count]
    unseen = [text for text in chosen if text not in set(learned)][: UNSEEN // 4]
    judged = token_batches(tokenizer, unseen, batch=32, longest=128)
    sets = [token_batches(tokenizer, learned[n::SETS], batch=8, longest=128) for n in range(SETS)]
    whole: list[torch.Tensor] = []

    def cosine(run: Executable) -> float:
        vectors = torch.cat([run(**batch)["sentence_embedding"] for batch in judged]).double()
        if not whole:  # the first that is judged is the model itself
            whole.append(vectors)
        return float((vectors * whole[0]).sum(1).mean())

    return DepthSubject(view, sets, sets[0][0], Score("cosine to the model", cosine, 4))


def _questions(view: View, _: bool) -> DepthSubject:
    tokenizer = read_tokenizer(Path(view.source.folder or ""))
    asked = scenes.questions("calibration", SETS * QUESTIONS, 5)
    sets = [scenes.prompt_batches(asked[n::SETS], tokenizer, batch=8) for n in range(SETS)]
    judged = scenes.questions("test", UNSEEN, 3)
    batches = scenes.prompt_batches(judged, tokenizer, batch=20)
    answers = torch.tensor([tokenizer.token_to_id(question.answer) for question in judged])

    def right(run: Executable) -> float:
        last = (run(**batch)["logits"][:, -1] for batch in batches)
        return _share(zip(last, torch.split(answers, 20), strict=True))

    one = {name: rows[:1] for name, rows in batches[0].items()}
    return DepthSubject(view, sets, one, Score("right, %", right, 1))


SUBJECTS: Mapping[str, Callable[[View, bool], DepthSubject]] = {
    "zoo:tiny-llama": _text, "zoo:tiny-vit": _pictures, "zoo:minilm": _sentences,
    "zoo:tiny-llava": _questions,
}  # fmt: skip
