"""Train ``zoo:tiny-vit``: ``python -m graphwright.tools.zoo.train_vit OUT [--seed 0]``.

A vision transformer of 6 layers that says which digit is in a picture: real handwritten digits,
enlarged, on a noisy canvas with strokes that are no digits (``ir/zoo/scenes.py``).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ...ir.zoo import scenes
from .training import Schedule, train, write_record

BATCH = 64
SCHEDULE = Schedule(steps=3000, lr=3e-3, evaluate_every=500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    run(given.out, given.seed, given.steps, resume=given.resume)


def run(out: Path, seed: int, steps: int, *, resume: bool) -> None:
    """Train, measure, write."""
    schedule = Schedule(steps=steps, lr=SCHEDULE.lr, evaluate_every=SCHEDULE.evaluate_every)
    model = make_model(seed)
    model.set_attn_implementation("eager")  # 0.51 s a step where sdpa's backward takes 0.88 in bf16

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, step, 1])
        drawn = [scenes.draw_digit("train", rng) for _ in range(BATCH)]
        labels = torch.tensor([label for _, label in drawn])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixel_values=scenes.normalized([image for image, _ in drawn])).logits
        return cross_entropy(logits.float(), labels, label_smoothing=0.05)

    curve = train(model, loss, schedule, out, title="tiny-vit", resume=resume,
                  evaluate=lambda: {"validation": accuracy(model, "validation", 445)})  # fmt: skip
    rounded = model.to(torch.bfloat16).float()
    labels = scenes.digits("test")[1].tolist()
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_images": 3 * len(labels),
        "test_accuracy": round(accuracy(rounded, "test", 3 * len(labels)), 4),
        "most_frequent_class": round(max(Counter(labels).values()) / len(labels), 4),
    }
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(out)
    write_record(out, seed=seed, schedules={"digits": schedule}, curves={"digits": curve},
                 figures=figures)  # fmt: skip
    print(json.dumps(figures, indent=1))


def make_model(seed: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=scenes.VIT_IMAGE, patch_size=scenes.PATCH, num_channels=3, hidden_size=128,
        intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def accuracy(model: Any, split: scenes.Split, count: int) -> float:
    """Share of ``count`` pictures of the split's digits that are named right."""
    right = 0
    with torch.no_grad():
        for pixels, labels in scenes.classified(split, count):
            right += int((model(pixel_values=pixels).logits.argmax(-1) == labels).sum())
    return right / count


if __name__ == "__main__":
    main()
