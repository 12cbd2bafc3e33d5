"""Train ``zoo:tiny-llava``: ``python -m graphwright.tools.zoo.train_llava OUT [--seed 0]``.

A LLaVA of 2.4 M parameters (CLIP vision tower, projector, Llama) that answers questions about
scenes of handwritten digits (``ir/load/zoo/scenes.py``). First the tower learns alone: its CLS
token says which digits there are, how many, and where, and the patches in the middle of a digit say
which it is (``llava_tower.py``). Then projector and language model learn to answer, the tower
frozen. Last they learn it of images that miss part of their background.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...ir.load.zoo import scenes
from .llava_learner import BOS, EOS, IMAGE, PAD, WORDS, Learner, make_tokenizer, part_of
from .llava_tower import TowerTeacher
from .llava_training import finish, options, train_answers
from .training import Schedule, train_stage

BATCH = 16
TOWER = Schedule(steps=3200, lr=3e-3, evaluate_every=200)
ANSWERS = Schedule(steps=2400, lr=3e-3, evaluate_every=300)
FEWER = Schedule(steps=800, lr=1.5e-3, evaluate_every=200)
LEAST, WHOLE = 0.2, 0.3
"""In the last stage: the least share of visual tokens, and how often all of them stay. Without it
the model reads places off the order of tokens, and answers worse (68 %) of the quarter with the
digits than of a random one (75 %)."""
CROWDED = (5, 9)
"""Digits in a scene while the tower learns to read: more digits an image, so more an hour."""
CROWDED_BATCH, MIXED_BATCH = 8, 16
CROWDED_UNTIL = 0.6
"""Of the tower's steps; after it every second scene has as many digits as it will have later."""


def main() -> None:
    chosen = options(__doc__, steps=ANSWERS.steps, tower_steps=TOWER.steps)
    run(chosen.out, chosen.seed, chosen.tower_steps, chosen.steps, resume=chosen.resume)


def run(out: Path, seed: int, tower_steps: int, steps: int, *, resume: bool) -> None:
    """Train both stages, measure, write."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_model(seed)
    model.set_attn_implementation("eager")  # 0.51 s a step where sdpa's backward takes 0.88 in bf16
    stages = {
        "tower": replace(TOWER, steps=tower_steps), "answers": replace(ANSWERS, steps=steps),
        "fewer": replace(FEWER, steps=max(1, FEWER.steps * steps // ANSWERS.steps)),
    }  # fmt: skip
    curves = {"tower": _train_tower(model, stages["tower"], out, seed, resume)}
    learner = Learner(model, tokenizer)
    for number, stage in enumerate(("answers", "fewer"), 2):
        curves[stage] = _train_answers(learner, stage, number, stages[stage], out, seed, resume)
    finish(
        model, tokenizer, out, seed=seed, schedules=stages, curves=curves,
        asked=scenes.questions("test", 2000), looked_at=scenes.questions("test", 500, seed=1),
    )  # fmt: skip


def _train_tower(
    model: Any, schedule: Schedule, out: Path, seed: int, resume: bool
) -> list[dict[str, float]]:
    teacher = TowerTeacher(model.model.vision_tower, model.config.vision_config.hidden_size)
    held = [scenes.draw_scene("validation", np.random.default_rng([0, i])) for i in range(128)]

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, step, 1])
        counts = [CROWDED] * CROWDED_BATCH
        if step >= CROWDED_UNTIL * schedule.steps:
            counts = [CROWDED, scenes.COUNTS] * (MIXED_BATCH // 2)
        return teacher.loss([scenes.draw_scene("train", rng, counts=c) for c in counts])

    return train_stage(
        teacher, loss, schedule, out, title="tiny-llava, tower", resume=resume, stage="tower",
        evaluate=lambda: teacher.accuracy(held),
    )  # fmt: skip


def _train_answers(
    learner: Learner, stage: str, number: int, schedule: Schedule, out: Path, seed: int,
    resume: bool,
) -> list[dict[str, float]]:  # fmt: skip
    def loss(rng: np.random.Generator) -> torch.Tensor:
        drawn = [scenes.draw_scene("train", rng) for _ in range(BATCH)]
        kept = None
        if stage == "fewer" and rng.random() >= WHOLE:
            kept = part_of(drawn, round(scenes.TOKENS * rng.uniform(LEAST, 1)), rng)
        return learner.loss(drawn, rng, kept)

    return train_answers(
        learner, loss, schedule, out, name="tiny-llava", held=scenes.questions("validation", 200),
        seed=seed, number=number, resume=resume, stage=stage,
    )  # fmt: skip


def make_model(seed: int) -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        image_size=scenes.IMAGE, patch_size=scenes.PATCH, hidden_size=128, intermediate_size=384,
        num_hidden_layers=6, num_attention_heads=4, projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        pad_token_id=WORDS.index(PAD), bos_token_id=WORDS.index(BOS),
        eos_token_id=WORDS.index(EOS), tie_word_embeddings=True,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=WORDS.index(IMAGE),
        vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=scenes.TOKENS, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    _start_well(model.model.vision_tower.embeddings)
    return model


def _start_well(embeddings: Any) -> None:
    """Starting values with which the tower finds that near patches belong together.

    Positions start as sines and cosines of row and column, patches as filters that answer to shape
    and not to brightness.
    """
    table = embeddings.position_embedding.weight
    filters = embeddings.patch_embedding.weight
    grid = scenes.IMAGE // scenes.PATCH
    rates = 1.0 / 30 ** torch.linspace(0, 1, table.shape[1] // 4)
    angles = torch.arange(grid)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    with torch.no_grad():
        table[1:] = 0.5 * torch.cat([rows, columns], 2).flatten(0, 1)
        filters.normal_(std=filters[0].numel() ** -0.5)
        filters -= filters.mean((1, 2, 3), keepdim=True)


if __name__ == "__main__":
    main()
