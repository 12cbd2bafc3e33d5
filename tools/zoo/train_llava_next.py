"""Train ``zoo:tiny-llava-next``: ``python -m graphwright.tools.zoo.train_llava_next OUT``.

``zoo:tiny-llava``, taught further to look at scenes of 192 pixels as a thumbnail and four quarters.
First its vision tower learns to read the thumbnail's digits of 8 to 12 pixels and to tell by the
frame where in the scene a quarter was cut. Then projector and language model learn to answer from
the tokens of all five pictures, at most steps from a part of them, the digits' first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...ir.load.zoo import scenes
from ...ir.load.zoo.tiny_vision import LLAVA
from .llava_learner import Learner, make_tokenizer, part_of
from .llava_tower import TowerTeacher
from .llava_training import finish, options, train_answers
from .train_llava import CROWDED, CROWDED_UNTIL
from .training import Schedule, train_stage

TOWER = Schedule(steps=900, lr=2e-3, warmup=0.05, cooldown=0.54, evaluate_every=150)
ANSWERS = Schedule(steps=750, lr=2e-3, warmup=0.04, cooldown=0.66, evaluate_every=200)
TOWER_BATCH, QUARTERS = 6, 2
"""Scenes in a step of the tower, and how many of a scene's quarters stand beside the thumbnail."""
BATCH, WHOLE_BATCH = 8, 4
"""Scenes in a step from a part of the tokens, and in one from all of them."""
LEAST, MOST, WHOLE = 0.06, 0.36, 0.08
"""The share of visual tokens in a step, and how often all of them stay."""


def main() -> None:
    chosen = options(__doc__, steps=ANSWERS.steps, tower_steps=TOWER.steps, start=LLAVA)
    run(
        chosen.out, chosen.start, chosen.seed, chosen.tower_steps, chosen.steps,
        resume=chosen.resume,
    )  # fmt: skip


def run(
    out: Path, start: Path, seed: int, tower_steps: int, steps: int, *, resume: bool
) -> None:  # fmt: skip
    """Train both stages, measure, write."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = start_model(start, seed)
    model.set_attn_implementation("eager")  # as in train_llava
    stages = {"tower": replace(TOWER, steps=tower_steps), "answers": replace(ANSWERS, steps=steps)}
    curves = {
        "tower": _train_tower(model, stages["tower"], out, seed, resume),
        "answers": _train_answers(
            Learner(model, tokenizer), stages["answers"], out, seed, resume
        ),
    }
    asked, others = (scenes.questions("test", count, seed=seed, size=scenes.LARGE)
                     for count, seed in ((1000, 0), (500, 1)))  # fmt: skip
    finish(
        model, tokenizer, out, seed=seed, schedules=stages, curves=curves, asked=asked,
        looked_at=others, size=scenes.LARGE,
    )  # fmt: skip


def start_model(folder: Path, seed: int) -> Any:
    """The trained model, with a config that says that an image comes as five pictures."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.config.image_seq_length = scenes.CROPS * scenes.TOKENS
    return model


def _train_tower(
    model: Any, schedule: Schedule, out: Path, seed: int, resume: bool
) -> list[dict[str, float]]:
    teacher = TowerTeacher(model.model.vision_tower, model.config.vision_config.hidden_size)
    held = [scenes.pictures(q.scene) for q in scenes.questions("validation", 64, size=scenes.LARGE)]

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, step, 1])
        crowded = step < CROWDED_UNTIL * schedule.steps
        shown: list[scenes.Scene] = []
        for i in range(TOWER_BATCH):
            counts = CROWDED if crowded or i % 2 else scenes.COUNTS
            thumbnail, *quarters = scenes.pictures(
                scenes.draw_scene("train", rng, scenes.LARGE, counts)
            )
            chosen = rng.choice(len(quarters), QUARTERS, replace=False)
            shown += [thumbnail, *(quarters[q] for q in chosen)]
        return teacher.loss(shown)

    return train_stage(
        teacher, loss, schedule, out, title="tiny-llava-next, tower", resume=resume, stage="tower",
        evaluate=lambda: _legible(teacher, held),
    )  # fmt: skip


def _legible(
    teacher: TowerTeacher, held: Sequence[Sequence[scenes.Scene]]
) -> dict[str, float]:
    """What the tower reads in thumbnails and in quarters."""
    small = teacher.accuracy([thumbnail for thumbnail, *_ in held])
    large = teacher.accuracy([quarter for _, *quarters in held for quarter in quarters])
    return {f"{name}_small": value for name, value in small.items()} | large


def _train_answers(
    learner: Learner, schedule: Schedule, out: Path, seed: int, resume: bool
) -> list[dict[str, float]]:
    def loss(rng: np.random.Generator) -> torch.Tensor:
        whole = rng.random() < WHOLE
        drawn = [
            scenes.draw_scene("train", rng, scenes.LARGE)
            for _ in range(WHOLE_BATCH if whole else BATCH)
        ]
        count = round(scenes.CROPS * scenes.TOKENS * rng.uniform(LEAST, MOST))
        return learner.loss(drawn, rng, None if whole else part_of(drawn, count, rng))

    held = scenes.questions("validation", 100, size=scenes.LARGE)
    return train_answers(
        learner, loss, schedule, out, name="tiny-llava-next", held=held, seed=seed, number=2,
        resume=resume,
    )  # fmt: skip


if __name__ == "__main__":
    main()
