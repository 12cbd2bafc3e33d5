"""How projector and language model of the zoo's LLaVAs learn to answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ...ir.load.zoo import scenes

ASKED = (*scenes.TYPES, "where", "where", "contains", "contains")
TOLD = 5
"""Statements about a scene beside the questions: where a named digit is, or that it is not there.
To find what a word names is learned from them; from yes and no alone it was not, in 1400 steps."""
PAD, BOS, EOS, IMAGE, UNKNOWN = "<pad>", "<s>", "</s>", "<image>", "<unk>"
WORDS = [
    PAD, BOS, EOS, IMAGE, UNKNOWN, "?", *map(str, range(10)), "none", "yes", "no", "which",
    "digit", "digits", "is", "at", "the", "how", "many", "are", "there", "a", "largest", "top",
    "bottom", "left", "right", "center",
]  # fmt: skip
Turn = tuple[list[int], list[int]]
"""Tokens, and what is to follow each of the last of them."""


class Learner(nn.Module):
    """Projector and language model, learning of a scene by questions and statements.

    The tower is frozen, as LLaVA does it. All that is said of a scene stands in one row; each part
    sees the image and itself alone, at the positions that it would have if it were the only one.
    Features of a large scene's crops follow each other.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.words = tokenizer.get_vocab()
        model.model.vision_tower.requires_grad_(False)

    def loss(
        self, drawn: Sequence[scenes.Scene], rng: np.random.Generator,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Of a batch of scenes; ``kept`` says which visual tokens each has, if not all."""
        dialogues = [self.dialogue(scene, rng) for scene in drawn]
        longest = max(sum(len(ids) for ids, _ in row) for row in dialogues)
        words = torch.zeros(len(drawn), longest, dtype=torch.long)
        turns = torch.full((len(drawn), longest), -1)
        places = torch.zeros(len(drawn), longest, dtype=torch.long)
        labels = torch.full((len(drawn), longest), -100)
        for r, row in enumerate(dialogues):
            at = 0
            for turn, (ids, targets) in enumerate(row):
                end = at + len(ids)
                words[r, at:end] = torch.tensor(ids)
                turns[r, at:end] = turn
                places[r, at:end] = torch.arange(len(ids))
                labels[r, end - len(targets) : end] = torch.tensor(targets)
                at = end
        pixels = scenes.normalized([scenes.seen(s) for s in drawn])
        with torch.autocast("cpu", torch.bfloat16):
            logits = self._logits(pixels, words, places, turns, kept)
        return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    def dialogue(self, scene: scenes.Scene, rng: np.random.Generator) -> list[Turn]:
        """What is said of one scene."""
        asked = [scenes.ask(scene, kind, rng) for kind in ASKED]
        return self.turns(asked) + [self._description(scene, rng) for _ in range(TOLD)]

    def turns(self, asked: Sequence[scenes.Question]) -> list[Turn]:
        return [(self._ids(q.text), self._ids(q.answer)) for q in asked]

    def _description(self, scene: scenes.Scene, rng: np.random.Generator) -> Turn:
        values = [digit.value for digit in scene.digits]
        single = [d for d in scene.digits if values.count(d.value) == 1]
        if single and rng.random() < 0.65:
            digit = single[int(rng.integers(len(single)))]
            value, place = digit.value, self._ids(scenes.CELLS[digit.cell])
        else:
            absent = [v for v in range(10) if v not in values]
            value, place = absent[int(rng.integers(len(absent)))], self._ids("none")
        return [*self._ids(f"the {value} is at the"), *place], [*place, self.words[EOS]]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _logits(
        self, pixels: torch.Tensor, words: torch.Tensor, places: torch.Tensor,
        turns: torch.Tensor, kept: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """At the questions' tokens, ``[batch, seq, words]``."""
        inner = self.model.model
        with torch.no_grad():
            crops = pixels.flatten(0, -4)
            hidden = inner.vision_tower(crops, output_hidden_states=True).hidden_states[-2]
        image = inner.multi_modal_projector(hidden[:, 1:])
        image = image.reshape(len(words), -1, image.shape[-1])
        if kept is not None:
            image = image.take_along_dim(kept[:, :, None], 1)
        start = torch.full_like(words[:, :1], self.words[BOS])
        embed = inner.language_model.embed_tokens
        embedded = torch.cat([embed(start), image.to(embed.weight.dtype), embed(words)], 1)
        first = image.shape[1] + 1
        common = torch.arange(first).expand(len(words), -1)
        # -1 is the image's own turn and the padding's, which nobody reads.
        turn = torch.cat([torch.full_like(common, -1), turns], 1)
        triangle = torch.ones(embedded.shape[1], embedded.shape[1], dtype=torch.bool).tril()
        same = (turn[:, :, None] == turn[:, None, :]) | (torch.arange(len(triangle)) < first)
        mask = torch.zeros(same.shape).masked_fill(~(triangle & same), -1e4).unsqueeze(1)
        states = inner.language_model(
            inputs_embeds=embedded, attention_mask=mask.to(torch.bfloat16),
            position_ids=torch.cat([common, places + first], 1), use_cache=False,
        ).last_hidden_state  # fmt: skip
        logits: torch.Tensor = self.model.lm_head(states[:, first:])
        return logits


def part_of(drawn: Sequence[scenes.Scene], count: int, rng: np.random.Generator) -> torch.Tensor:
    """``count`` visual tokens of each scene, those on digits first: i64 ``[scenes, count]``,
    ascending."""
    on = torch.stack([scenes.digit_tokens(s) for s in drawn]).float()
    chance = torch.from_numpy(rng.random(on.shape, dtype=np.float32))
    return (on + chance).topk(count).indices.sort().values


def make_tokenizer(*more: str) -> Any:
    """A word, a token; ``more`` words behind ``WORDS``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate([*WORDS, *more])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([PAD, BOS, EOS, IMAGE, UNKNOWN])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return tokenizer
