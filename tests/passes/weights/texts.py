"""Ids to learn from and to be checked on, for the small language models of ``tests/models.py``."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import torch
from graphwright.ir.core.view import View
from torch import Tensor

Inputs = dict[str, Tensor]


def ids(count: int = 3) -> list[Inputs]:
    rng = torch.Generator().manual_seed(5)
    mask = torch.ones(4, 9, dtype=torch.int64)
    return [{"input_ids": torch.randint(0, 97, (4, 9), generator=rng), "attention_mask": mask}
            for _ in range(count)]  # fmt: skip


def on_model(view: View, recipe: str) -> Any:
    return gw.optimize(view, recipe, samples=ids(1), calibration=ids())
