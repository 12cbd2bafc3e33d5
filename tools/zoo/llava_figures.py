"""Figures of the zoo's LLaVAs: answers by type, whole and with part of the visual tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...ir.load.zoo import scenes
from ..evaluate.stats import wilson

Hits = NDArray[np.bool_]

Rank = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of random numbers, of what lies on digits and of the CLS token's attention, each one a visual
token: which to keep first. Each picture of an image keeps the same number."""
RANKS: Mapping[str, Rank] = {
    "random": lambda chance, digits, attention: chance,
    "digits_first": lambda chance, digits, attention: digits + chance,
    "cls_attention": lambda chance, digits, attention: attention,
}


ALONE: Mapping[str, slice] = {
    "thumbnail": slice(0, scenes.TOKENS), "quarters": slice(scenes.TOKENS, None),
}  # fmt: skip
"""Pictures of a large scene without the others."""
PARTS: Mapping[str, int] = {"quarter": 4, "tenth": 10}
"""Of each picture's tokens one in so many is kept."""


def accuracy(model: Any, tokenizer: Any, asked: Sequence[scenes.Question]) -> float:
    """Share of questions that are answered right, all tokens kept."""
    return float(_judge(model, tokenizer, asked, parts=False)["all"].mean())


def measure(
    model: Any, tokenizer: Any, asked: Sequence[scenes.Question],
    looked_at: Sequence[scenes.Scene],
) -> dict[str, Any]:  # fmt: skip
    """Accuracy with 95 % intervals (Wilson), whole and with part of the visual tokens.

    Parts are those of ``PARTS``, and ``ALONE`` of a large scene.

    Beside it: the share of the CLS token's attention (layer -2, mean of heads) that lies on the
    patches of digits in the scenes ``looked_at``, the share of these patches, and how a model would
    do that knew the most frequent answer.
    """
    hits = _judge(model, tokenizer, asked)
    kinds = np.array([q.type for q in asked])
    types = list(dict.fromkeys(q.type for q in asked))
    answers = [q.answer for q in asked]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_questions": len(asked),
        "test_accuracy": _share(hits["all"]),
        "test_interval": _interval(hits["all"]),
        "test_accuracy_by_type": {k: _share(hits["all"][kinds == k]) for k in types},
        **{f"{name}_of_tokens": {r: _share(hits[f"{name} {r}"]) for r in RANKS} for name in PARTS},
        **{f"{name}_of_tokens_interval": {r: _interval(hits[f"{name} {r}"]) for r in RANKS}
           for name in PARTS},
        **{f"{name}_alone": _share(hits[name]) for name in hits if name in ALONE},
        "most_frequent_answer": _share(np.array(answers) == _commonest(answers)),
        "most_frequent_answer_by_type": {
            k: _share(np.array(part) == _commonest(part))
            for k in types
            for part in [[q.answer for q in asked if q.type == k]]
        },
        **cls_attention(model, looked_at),
    }


def _share(hits: Hits) -> float:
    return round(float(hits.mean()), 4)


def _interval(hits: Hits) -> list[float]:
    return [round(end, 4) for end in wilson(int(hits.sum()), len(hits))]


def _commonest(answers: Sequence[str]) -> str:
    return Counter(answers).most_common(1)[0][0]


def _judge(
    model: Any, tokenizer: Any, asked: Sequence[scenes.Question], *, parts: bool = True
) -> dict[str, Hits]:
    """Which answers are right: with ``all`` visual tokens, and with ``parts`` of them."""
    by_part: dict[str, list[bool]] = {}
    inner = model.model
    with torch.no_grad():
        for i, question in enumerate(asked):
            features, attention = _seen(model, question.scene)
            image = inner.multi_modal_projector(features)
            ids = torch.tensor([tokenizer.encode(question.text).ids])
            words = inner.language_model.embed_tokens(ids)
            kept = {"all": torch.arange(image.shape[1])}
            if parts:
                kept |= _parts(question.scene, attention, i)
            for name, chosen in kept.items():
                embedded = torch.cat([words[:, :1], image[:, chosen], words[:, 1:]], 1)
                states = inner.language_model(inputs_embeds=embedded, use_cache=False)
                word = int(model.lm_head(states.last_hidden_state[:, -1]).argmax())
                right = tokenizer.id_to_token(word) == question.answer
                by_part.setdefault(name, []).append(right)
    return {name: np.array(hits) for name, hits in by_part.items()}


def _parts(scene: scenes.Scene, attention: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Visual tokens that are kept, ascending, by the name of the part."""
    digits = scenes.digit_tokens(scene).float()
    chance = torch.rand(len(digits), generator=torch.Generator().manual_seed(seed))
    every = torch.arange(len(digits))
    alone = {name: every[part] for name, part in ALONE.items()}
    large = scene.image.shape[-1] == scenes.LARGE
    patches = len(every) // len(scenes.pictures(scene))
    return (alone if large else {}) | {
        f"{name} {by}": _best(rank(chance, digits, attention), patches, patches // each)
        for name, each in PARTS.items() for by, rank in RANKS.items()
    }  # fmt: skip


def _best(scores: torch.Tensor, patches: int, count: int) -> torch.Tensor:
    """The ``count`` best of the ``patches`` tokens of each picture, ascending."""
    first = torch.arange(0, len(scores), patches)
    best = scores.reshape(-1, patches).topk(count).indices
    return (best + first[:, None]).flatten().sort().values


def _seen(model: Any, scene: scenes.Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``[1, tokens, width]``, and the CLS token's attention to each in layer -2."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    pixels = scenes.normalized([scenes.seen(scene)]).flatten(0, -4)
    output = tower(pixels, output_hidden_states=True, output_attentions=True)
    tower.set_attn_implementation(before)
    row = output.attentions[-2][:, :, 0, 1:].mean(1)
    return output.hidden_states[-2][:, 1:].flatten(0, 1)[None], row.flatten()


def cls_attention(model: Any, looked_at: Sequence[scenes.Scene]) -> dict[str, float]:
    """Over scenes: the share of CLS attention on digits, the share of digits' patches."""
    mass = share = 0.0
    with torch.no_grad():
        for scene in looked_at:
            row = _seen(model, scene)[1]
            on_digits = scenes.digit_tokens(scene)
            mass += float(row[on_digits].sum() / row.sum()) / len(looked_at)
            share += float(on_digits.float().mean()) / len(looked_at)
    return {"cls_attention_on_digits": round(mass, 4), "patches_on_digits": round(share, 4)}
