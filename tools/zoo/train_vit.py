"""Train ``zoo:tiny-vit``: ``python -m graphwright.tools.zoo.train_vit OUT [--seed 0]``.

A vision transformer of 6 layers that says which digit is in a picture: real handwritten digits,
enlarged, on a noisy canvas with strokes that are no digits (``ir/load/zoo/scenes.py``).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from ...ir.load.zoo import scenes
from ..evaluate.stats import bootstrap
from .saving import save_weights, write_preprocessor
from .training import Schedule, train, write_record

BATCH = 64
SCHEDULE = Schedule(steps=3000, lr=3e-3, evaluate_every=500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    run(options.out, options.seed, options.steps, resume=options.resume)


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
                  evaluate=lambda: {"validation": hits(model, "validation", 5).mean()})  # fmt: skip
    model.set_attn_implementation("sdpa")
    save_weights(model, out)
    write_preprocessor(out, "ViTImageProcessor", scenes.VIT_IMAGE)
    figures = measure(model.float())
    write_record(out, seed=seed, schedules={"digits": schedule}, curves={"digits": curve},
                 figures=figures)  # fmt: skip
    print(json.dumps(figures, indent=1))


def make_model(seed: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=scenes.VIT_IMAGE, patch_size=scenes.PATCH, num_channels=3, hidden_size=128,
        intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        id2label={i: str(i) for i in range(10)}, label2id={str(i): i for i in range(10)},
    )  # fmt: skip
    return ViTForImageClassification(config)


def measure(model: Any) -> dict[str, Any]:
    """Test accuracy, each digit drawn three times, and that of the most frequent class.

    The interval of 95 % is a bootstrap over digits: pictures of one digit are no independent
    samples.
    """
    scores = hits(model, "test", 3)
    labels = scenes.digits("test")[1].tolist()
    by_digit = [scores.sum(0), np.full(len(labels), len(scores))]
    interval = bootstrap(by_digit, lambda sums: sums[0] / sums[1]) or (0.0, 1.0)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_images": scores.size,
        "test_accuracy": round(float(scores.mean()), 4),
        "test_interval": [round(end, 4) for end in interval],
        "most_frequent_class": round(max(Counter(labels).values()) / len(labels), 4),
    }


def hits(model: Any, split: scenes.Split, times: int) -> NDArray[np.float64]:
    """Which of the split's digits are named right, ``[times, digits]``, drawn so many times."""
    parts = []
    count = times * len(scenes.digits(split)[1])
    with torch.no_grad():
        for pixels, labels in scenes.classified(split, count):
            parts.append(model(pixel_values=pixels).logits.argmax(-1) == labels)
    return torch.cat(parts).double().numpy().reshape(times, -1)


if __name__ == "__main__":
    main()
