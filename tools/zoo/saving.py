"""How the zoo's trainers write a model: bf16 weights and what other tools need to use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...ir.load.zoo import scenes


def save_weights(model: Any, out: Path) -> None:
    """Config and weights as transformers writes them, in bf16, readable for everyone."""
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def write_preprocessor(out: Path, kind: str, size: int) -> None:
    """What transformers' image processor ``kind`` does to an image of 0 to 255."""
    content = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [scenes.MEAN] * 3,
        "image_std": [scenes.STD] * 3,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(content, indent=1) + "\n")
