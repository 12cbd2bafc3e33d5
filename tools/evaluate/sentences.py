"""Texts for models that read a whole one: sentences, in batches as the tokenizer pads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...ir.core.errors import BadInput
from ...ir.load.side_files import padding_token
from ...ir.load.zoo.text import english_sentences
from ..data.text import cut_pair
from ..data.text_lines import Text
from .documents import documents
from .subject import ANSWERS, Subject
from .task import Setting

SENTENCES = 256
BATCH = 32
TOKENS = 128
QUESTION = "What does this say?"
"""What a model is asked of each text that answers by a stretch of it."""


@dataclass(frozen=True)
class Sentences:
    """Inputs of some texts, and how many tokens each has."""

    inputs: dict[str, torch.Tensor]
    lengths: tuple[int, ...]


def sentences(setting: Setting) -> list[str]:
    """The documents of ``setting.data``, or sentences of Python's language reference."""
    if setting.data is not None:
        return documents(setting)
    return english_sentences(max(SENTENCES, setting.samples or 0))


def encoded(
    subject: Subject, texts: Sequence[Text], longest: int = TOKENS
) -> Iterator[Sentences]:
    """Batches of texts, cut to ``longest`` tokens and padded to the longest; behind a question for
    a model that answers by a stretch of text. ``BadInput`` for a token that its table does not
    hold."""
    tokenizer = subject.tokenizer()
    longest = min(longest, subject.max_tokens)
    tokenizer.enable_truncation(longest)
    tokenizer.enable_padding(pad_id=padding_token(subject.folder, tokenizer))
    asked = subject.kind == ANSWERS
    for start in range(0, len(texts), BATCH):
        part = [text if isinstance(text, str) else cut_pair(tokenizer, text, longest)
                for text in texts[start : start + BATCH]]  # fmt: skip
        rows = tokenizer.encode_batch([(QUESTION, text) for text in part] if asked else part)
        mask = torch.tensor([row.attention_mask for row in rows])
        if not int(mask.sum(1).min()):
            raise BadInput(f"{subject.name}: its tokenizer makes no token of {part[0]!r}")
        inputs = {
            "input_ids": torch.tensor([row.ids for row in rows]),
            "attention_mask": mask,
            "token_type_ids": torch.tensor([row.type_ids for row in rows]),
        }
        yield Sentences(inputs, tuple(mask.sum(1).tolist()))
