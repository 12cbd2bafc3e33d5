"""Figures of ``zoo:tiny-llava``: answers by type, whole and with a quarter of the visual tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...ir.zoo import scenes
from ..evaluate.stats import wilson

VISUAL = (scenes.IMAGE // scenes.PATCH) ** 2
Hits = NDArray[np.bool_]

Rank = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of random numbers, of what lies on digits and of the CLS token's attention, each ``[VISUAL]``:
which visual tokens to keep first."""
RANKS: Mapping[str, Rank] = {
    "random": lambda chance, digits, attention: chance,
    "digits_first": lambda chance, digits, attention: digits + chance,
    "cls_attention": lambda chance, digits, attention: attention,
}


def accuracy(model: Any, tokenizer: Any, split: scenes.Split, count: int) -> float:
    """Share of ``count`` questions of the split that are answered right, all tokens kept."""
    return float(_judge(model, tokenizer, scenes.questions(split, count), {})["all"].mean())


def measure(model: Any, tokenizer: Any, count: int = 2000) -> dict[str, Any]:
    """Test accuracy with 95 % intervals (Wilson), whole and cut to a quarter of the visual tokens.

    Beside it: the share of the CLS token's attention (layer -2, mean of heads) that lies on the
    patches of digits, the share of these patches, and how a model would do that knew the most
    frequent answer.
    """
    asked = scenes.questions("test", count)
    found = _judge(model, tokenizer, asked, RANKS)
    kinds = np.array([q.type for q in asked])
    answers = [q.answer for q in asked]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_questions": count,
        "test_accuracy": _share(found["all"]),
        "test_interval": _interval(found["all"]),
        "test_accuracy_by_type": {k: _share(found["all"][kinds == k]) for k in scenes.TYPES},
        "quarter_of_tokens": {name: _share(found[name]) for name in RANKS},
        "quarter_of_tokens_interval": {name: _interval(found[name]) for name in RANKS},
        "most_frequent_answer": _share(np.array(answers) == _commonest(answers)),
        "most_frequent_answer_by_type": {
            k: _share(np.array(part) == _commonest(part))
            for k in scenes.TYPES
            for part in [[q.answer for q in asked if q.type == k]]
        },
        **cls_attention(model),
    }


def _share(hits: Hits) -> float:
    return round(float(hits.mean()), 4)


def _interval(hits: Hits) -> list[float]:
    return [round(end, 4) for end in wilson(int(hits.sum()), len(hits))]


def _commonest(answers: Sequence[str]) -> str:
    return Counter(answers).most_common(1)[0][0]


def _judge(
    model: Any, tokenizer: Any, asked: Sequence[scenes.Question], ranks: Mapping[str, Rank]
) -> dict[str, Hits]:
    """Which answers are right: with ``all`` visual tokens, and with a quarter by each rank."""
    found: dict[str, list[bool]] = {name: [] for name in ("all", *ranks)}
    inner = model.model
    with torch.no_grad():
        for i, question in enumerate(asked):
            features, attention = _seen(model, question.scene)
            image = inner.multi_modal_projector(features)
            ids = torch.tensor([tokenizer.encode(question.text).ids])
            words = inner.language_model.embed_tokens(ids)
            chance = torch.rand(VISUAL, generator=torch.Generator().manual_seed(i))
            digits = scenes.digit_patches(question.scene).float()
            kept = {"all": torch.arange(VISUAL)} | {
                name: rank(chance, digits, attention).topk(VISUAL // 4).indices.sort().values
                for name, rank in ranks.items()
            }
            for name, chosen in kept.items():
                embedded = torch.cat([words[:, :1], image[:, chosen], words[:, 1:]], 1)
                states = inner.language_model(inputs_embeds=embedded, use_cache=False)
                word = int(model.lm_head(states.last_hidden_state[:, -1]).argmax())
                found[name].append(tokenizer.id_to_token(word) == question.answer)
    return {name: np.array(hits) for name, hits in found.items()}


def _seen(model: Any, scene: scenes.Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``[1, VISUAL, width]``, and the CLS token's attention to each in layer -2."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    output = tower(
        scenes.normalized([scene.image]), output_hidden_states=True, output_attentions=True
    )
    tower.set_attn_implementation(before)
    return output.hidden_states[-2][:, 1:], output.attentions[-2][0, :, 0, 1:].mean(0)


def cls_attention(model: Any, count: int = 500) -> dict[str, float]:
    """Over ``count`` test scenes: share of CLS attention on digits, share of digits' patches."""
    mass = share = 0.0
    with torch.no_grad():
        for question in scenes.questions("test", count, seed=1):
            row = _seen(model, question.scene)[1]
            on_digits = scenes.digit_patches(question.scene)
            mass += float(row[on_digits].sum() / row.sum()) / count
            share += float(on_digits.float().mean()) / count
    return {"cls_attention_on_digits": round(mass, 4), "patches_on_digits": round(share, 4)}
