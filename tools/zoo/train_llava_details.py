"""Train ``zoo:tiny-llava-details``: ``python -m graphwright.tools.zoo.train_llava_details OUT``.

Its vision tower is that of ``zoo:tiny-llava-next``, which reads digits of 8 to 24 pixels, and stays
as it is. Projector and language model, which start there too, learn the questions of
``ir.load.zoo.details`` in one stage, at most steps from part of the visual tokens: any part, so
that the model favours none of the ways to choose them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...ir.load.zoo import details, scenes
from ...ir.load.zoo.tiny_vision import LLAVA_NEXT
from .llava_learner import WORDS, Learner, Turn, make_tokenizer
from .llava_training import finish, options, train_answers
from .training import Schedule

ANSWERS = Schedule(steps=1000, lr=2e-3, warmup=0.04, cooldown=0.66, evaluate_every=250)
BATCH = 12
LEAST, WHOLE = 0.08, 0.25
"""The least share of visual tokens in a step, and how often all of them stay."""
MORE_WORDS = (details.WORD,)


class DetailLearner(Learner):
    """Asks of every cell of a scene which digit is there and how many lines, and counts."""

    def dialogue(self, scene: scenes.Scene, rng: np.random.Generator) -> list[Turn]:
        assert isinstance(scene, details.DetailScene)
        cells = range(len(scenes.CELLS))
        asked = [details.ask_digit(scene, "where", cell) for cell in cells]
        asked += [details.ask_lines(scene, cell) for cell in cells]
        return self.turns([*asked, details.ask_count(scene)])


def part_of(drawn: Sequence[scenes.Scene], rng: np.random.Generator) -> torch.Tensor:
    """So many visual tokens of each scene, i64 ``[scenes, count]``, ascending: by chance, with
    those on digits first, or a part of the picture whole."""
    on = torch.stack([scenes.digit_tokens(s) for s in drawn]).float()
    scores = torch.from_numpy(rng.random(on.shape, dtype=np.float32))
    way = int(rng.integers(3))
    if way == 1:
        scores += on
    if way == 2:
        edge = scenes.IMAGE // scenes.PATCH
        middle = torch.from_numpy(rng.uniform(0, edge, (len(drawn), 2, 1)).astype(np.float32))
        places = torch.arange(edge * edge)
        grid = torch.stack([places // edge, places % edge]).float()
        scores -= (grid - middle).square().sum(1).sqrt()
    count = round(scenes.TOKENS * rng.uniform(LEAST, 1))
    return scores.topk(count).indices.sort().values


def main() -> None:
    chosen = options(__doc__, steps=ANSWERS.steps, start=LLAVA_NEXT)
    run(chosen.out, chosen.start, chosen.seed, chosen.steps, resume=chosen.resume)


def run(out: Path, start: Path, seed: int, steps: int, *, resume: bool) -> None:
    """Train, measure, write."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(*MORE_WORDS)
    model = start_model(start, seed)
    model.set_attn_implementation("eager")  # as in train_llava
    schedule = replace(ANSWERS, steps=steps)
    curve = _train(DetailLearner(model, tokenizer), schedule, out, seed, resume)
    finish(
        model, tokenizer, out, seed=seed, schedules={"answers": schedule},
        curves={"answers": curve}, asked=details.questions("test", 1200),
        looked_at=details.questions("test", 400, seed=1),
    )  # fmt: skip


def start_model(folder: Path, seed: int) -> Any:
    """The trained model, for one picture an image and some more words."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.config.image_seq_length = scenes.TOKENS
    model.resize_token_embeddings(len(WORDS) + len(MORE_WORDS), mean_resizing=False)
    return model


def _train(
    learner: DetailLearner, schedule: Schedule, out: Path, seed: int, resume: bool
) -> list[dict[str, float]]:
    def loss(rng: np.random.Generator) -> torch.Tensor:
        drawn = [details.draw_scene("train", rng) for _ in range(BATCH)]
        return learner.loss(drawn, rng, None if rng.random() < WHOLE else part_of(drawn, rng))

    return train_answers(
        learner, loss, schedule, out, name="tiny-llava-details",
        held=details.questions("validation", 200), seed=seed, number=4, resume=resume,
    )  # fmt: skip


if __name__ == "__main__":
    main()
