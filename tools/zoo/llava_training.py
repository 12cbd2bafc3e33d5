"""What the trainers of LLaVAs share: their options, the stage that learns to answer, the end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...ir.load.zoo import scenes
from .llava_figures import accuracy, measure
from .llava_learner import BOS, EOS, IMAGE, PAD, UNKNOWN, Learner
from .saving import save_weights, write_preprocessor
from .training import Schedule, train_stage, write_record

Curve = list[dict[str, float]]


def options(
    about: str, *, steps: int, tower_steps: int | None = None, start: Path | None = None
) -> argparse.Namespace:
    """A folder for the model, a seed, steps of the stages, and the trained model to start from,
    where there are such."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    if start is not None:
        parser.add_argument("--start", type=Path, default=start, help=f"a trained zoo:{start.name}")
    if tower_steps is not None:
        parser.add_argument("--tower-steps", type=int, default=tower_steps)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def train_answers(
    learner: Learner, loss: Callable[[np.random.Generator], torch.Tensor], schedule: Schedule,
    out: Path, *, name: str, held: Sequence[scenes.Question], seed: int, number: int,
    resume: bool, stage: str = "answers",
) -> Curve:  # fmt: skip
    """Train projector and language model of ``name``; ``loss`` draws its batch by the numbers it is
    given, which are those of the seed, the step and the stage's ``number``. The curve has the
    accuracy on ``held``."""
    return train_stage(
        learner, lambda step: loss(np.random.default_rng([seed, step, number])), schedule, out,
        title=f"{name}, {stage}", resume=resume, stage=stage,
        evaluate=lambda: {"validation": accuracy(learner.model, learner.tokenizer, held)},
    )  # fmt: skip


def finish(
    model: Any, tokenizer: Any, out: Path, *, seed: int, schedules: Mapping[str, Schedule],
    curves: Mapping[str, Curve], asked: Sequence[scenes.Question],
    looked_at: Sequence[scenes.Question], size: int = scenes.IMAGE,
) -> None:  # fmt: skip
    """Write the model, for pictures of ``size`` pixels, measure it and write how it was made; the
    stages' states leave."""
    model.set_attn_implementation("sdpa")
    write_model(model, tokenizer, out, size)
    figures = measure(model.float(), tokenizer, asked, [question.scene for question in looked_at])
    write_record(out, seed=seed, schedules=schedules, curves=curves, figures=figures)
    for stage in schedules:
        (out / f"{stage}.pt").unlink()
    print(json.dumps(figures, indent=1))


def write_model(model: Any, tokenizer: Any, out: Path, size: int = scenes.IMAGE) -> None:
    """Weights, and the files that say how pictures of ``size`` pixels and words are read."""
    save_weights(model, out)
    write_preprocessor(out, "CLIPImageProcessor", size)
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
               "pad_token": PAD, "unk_token": UNKNOWN, "image_token": IMAGE}  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(special, indent=1) + "\n")
