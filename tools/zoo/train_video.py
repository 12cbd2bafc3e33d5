"""Train ``zoo:tiny-video``: ``python -m graphwright.tools.zoo.train_video OUT``.

A LLaVA whose image is a video of eight frames (``ir/load/zoo/videos.py``). It starts from
``zoo:tiny-llava-next``, which reads digits of 8 to 24 pixels in pictures of 96: the tower keeps the
places in the middle of these for its frames of 48 and learns them alone first; then projector and
language model learn what came when, the tower frozen, at most steps from a part of the tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...ir.load.zoo import scenes, videos
from ...ir.load.zoo.tiny_vision import LLAVA_NEXT
from .llava_learner import WORDS, Learner, Turn, make_tokenizer
from .llava_tower import TowerTeacher
from .llava_training import finish, options, train_answers
from .training import Schedule, train_stage

TOWER = Schedule(steps=250, lr=1.5e-3, warmup=0.05, cooldown=0.6, evaluate_every=125)
ANSWERS = Schedule(steps=1000, lr=2e-3, warmup=0.04, cooldown=0.66, evaluate_every=250)
TOWER_BATCH, BATCH = 5, 12
"""Videos in a step of the tower, and of the rest."""
LEAST, WHOLE = 0.08, 0.3
"""The least share of visual tokens in a step, and how often all of them stay."""
PLACES = "position_embedding.weight"


class VideoLearner(Learner):
    """Asks of every video what came first and last, how many, and what came after each digit."""

    def dialogue(self, scene: scenes.Scene, rng: np.random.Generator) -> list[Turn]:
        asked = [videos.ask(scene, kind, rng) for kind in ("first", "last", "count")]
        asked += [videos.ask_after(scene, place) for place in range(len(scene.digits))]
        asked += [scenes.ask(scene, "contains", rng) for _ in range(2)]
        return self.turns(asked)


def part_of(drawn: Sequence[scenes.Scene], rng: np.random.Generator) -> torch.Tensor:
    """So many visual tokens of each video, i64 ``[videos, count]``, ascending: by chance, with
    those on digits first, or at even distances."""
    on = torch.stack([scenes.digit_tokens(s) for s in drawn]).float()
    count = round(on.shape[1] * rng.uniform(LEAST, 1))
    way = int(rng.integers(3))
    if way == 2:
        line = (2 * torch.arange(count) + 1) * on.shape[1] // (2 * count)
        return line.expand(len(drawn), -1)
    chance = torch.from_numpy(rng.random(on.shape, dtype=np.float32))
    return (on * way + chance).topk(count).indices.sort().values


def main() -> None:
    chosen = options(__doc__, steps=ANSWERS.steps, tower_steps=TOWER.steps, start=LLAVA_NEXT)
    run(
        chosen.out, chosen.start, chosen.seed, chosen.tower_steps, chosen.steps,
        resume=chosen.resume,
    )  # fmt: skip


def run(
    out: Path, start: Path, seed: int, tower_steps: int, steps: int, *, resume: bool
) -> None:  # fmt: skip
    """Train both stages, measure, write."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(*videos.WORDS)
    model = start_model(start, seed)
    model.set_attn_implementation("eager")  # as in train_llava
    stages = {"tower": replace(TOWER, steps=tower_steps), "answers": replace(ANSWERS, steps=steps)}
    curves = {
        "tower": _train_tower(model, stages["tower"], out, seed, resume),
        "answers": _train_answers(
            VideoLearner(model, tokenizer), stages["answers"], out, seed, resume
        ),
    }
    finish(
        model, tokenizer, out, seed=seed, schedules=stages, curves=curves,
        asked=videos.questions("test", 1200), looked_at=videos.questions("test", 400, seed=1),
        size=videos.FRAME,
    )  # fmt: skip


def start_model(folder: Path, seed: int) -> Any:
    """The trained model, for frames instead of crops and for some more words."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    old = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    old.resize_token_embeddings(len(WORDS) + len(videos.WORDS), mean_resizing=False)
    config = copy.deepcopy(old.config)
    config.image_seq_length = videos.FRAMES * videos.PATCHES
    config.vision_config.image_size = videos.FRAME
    model = LlavaForConditionalGeneration(config)
    state = {
        name: middle(value) if name.endswith(PLACES) else value
        for name, value in old.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def middle(table: torch.Tensor) -> torch.Tensor:
    """Of a picture's places ``[1 + patches, width]``, the CLS token's first, those of a frame in
    the middle of it."""
    picture, frame = scenes.IMAGE // scenes.PATCH, videos.FRAME // scenes.PATCH
    rim = (picture - frame) // 2
    grid = table[1:].reshape(picture, picture, -1)
    inside = grid[rim : rim + frame, rim : rim + frame].flatten(0, 1)
    return torch.cat([table[:1], inside])


def _train_tower(
    model: Any, schedule: Schedule, out: Path, seed: int, resume: bool
) -> list[dict[str, float]]:
    teacher = TowerTeacher(model.model.vision_tower, model.config.vision_config.hidden_size)
    rng = np.random.default_rng(0)
    held = [frame for _ in range(24) for frame in videos.draw_video("validation", rng).parts]

    def loss(step: int) -> torch.Tensor:
        drawn = np.random.default_rng([seed, step, 1])
        return teacher.loss([
            frame for _ in range(TOWER_BATCH) for frame in videos.draw_video("train", drawn).parts
        ])  # fmt: skip

    return train_stage(
        teacher, loss, schedule, out, title="tiny-video, tower", resume=resume, stage="tower",
        evaluate=lambda: teacher.accuracy(held),
    )  # fmt: skip


def _train_answers(
    learner: VideoLearner, schedule: Schedule, out: Path, seed: int, resume: bool
) -> list[dict[str, float]]:
    def loss(rng: np.random.Generator) -> torch.Tensor:
        drawn = [videos.draw_video("train", rng) for _ in range(BATCH)]
        return learner.loss(drawn, rng, None if rng.random() < WHOLE else part_of(drawn, rng))

    return train_answers(
        learner, loss, schedule, out, name="tiny-video",
        held=videos.questions("validation", 200), seed=seed, number=2, resume=resume,
    )  # fmt: skip


if __name__ == "__main__":
    main()
