"""What the vision tower of ``zoo:tiny-llava`` learns by, before the language model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ...ir.load.zoo import scenes

CELLS = len(scenes.CELLS)
NONE = 10
"""The class of a place without a digit."""
BACKGROUND = 0.2
"""Weight of places without a digit, which are most."""
LAYERS = (-2, -1)
SMALL = 2 * scenes.PATCH
"""Below this many pixels a digit's middle may cover no patch: all of the digit counts."""


class TowerTeacher(nn.Module):
    """A CLIP tower with heads on its CLS token and on its patches.

    The CLS token, of the last layer and of the one before, whose features the language model gets,
    says which digits there are, how many, and what stands in each of the nine cells. A patch in the
    middle of a digit says which digit it is and in which cell.
    """

    def __init__(self, tower: Any, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in (*LAYERS, "patches")])
        self.head_presence = nn.ModuleList([nn.Linear(width, 10) for _ in LAYERS])
        self.head_count = nn.ModuleList([nn.Linear(width, CELLS) for _ in LAYERS])
        self.head_cells = nn.ModuleList([nn.Linear(width, CELLS * (NONE + 1)) for _ in LAYERS])
        self.head_patch = nn.Linear(width, NONE + 1)
        self.head_place = nn.Linear(width, CELLS)

    def hidden(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        """Of every layer, ``[batch, 1 + patches, width]``."""
        states: Sequence[torch.Tensor] = self.tower(
            pixel_values=pixels, output_hidden_states=True
        ).hidden_states
        return states

    def loss(self, drawn: Sequence[scenes.Scene]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.hidden(scenes.normalized([s.image for s in drawn]))
        return self._of_cls(hidden, drawn) + self._of_patches(hidden, drawn)

    def _of_cls(
        self, hidden: Sequence[torch.Tensor], drawn: Sequence[scenes.Scene]
    ) -> torch.Tensor:
        cells = torch.stack([cell_classes(s) for s in drawn])
        present = torch.zeros(len(drawn), NONE + 1).scatter(1, cells, 1.0)[:, :NONE]
        counts = torch.tensor([len(s.digits) - 1 for s in drawn])  # -1 in a crop without any
        total = torch.zeros(())
        for i, layer in enumerate(LAYERS):
            token = self.norms[i](hidden[layer][:, 0].float())
            total = total + binary_cross_entropy_with_logits(self.head_presence[i](token), present)
            counted = cross_entropy(self.head_count[i](token), counts, ignore_index=-1)
            total = total + 0.3 * counted
            logits = self.head_cells[i](token).unflatten(1, (CELLS, NONE + 1))
            total = total + cross_entropy(logits.flatten(0, 1), cells.flatten(), _weights())
        return total

    def _of_patches(
        self, hidden: Sequence[torch.Tensor], drawn: Sequence[scenes.Scene]
    ) -> torch.Tensor:
        patches = self.norms[-1](hidden[-2][:, 1:].float()).flatten(0, 1)
        values, places = (
            torch.cat(columns) for columns in zip(*map(patch_classes, drawn), strict=True)
        )
        placed = cross_entropy(self.head_place(patches), places, ignore_index=-1)
        return cross_entropy(self.head_patch(patches), values, _weights()) + 0.5 * placed

    def accuracy(self, drawn: Sequence[scenes.Scene]) -> dict[str, float]:
        """Of the cells as the CLS token of layer -2 tells them, and of the digits' own patches."""
        hidden = self.hidden(scenes.normalized([s.image for s in drawn]))
        logits = self.head_cells[0](self.norms[0](hidden[-2][:, 0])).unflatten(1, (CELLS, NONE + 1))
        cells = torch.stack([cell_classes(s) for s in drawn])
        patches = self.head_patch(self.norms[-1](hidden[-2][:, 1:])).argmax(-1)
        values = torch.stack([patch_classes(s)[0] for s in drawn])
        right = logits.argmax(-1) == cells
        return {
            "cells": float(right.all(1).float().mean()),
            "digits": float(right[cells != NONE].float().mean()),
            "patches": float((patches == values)[values != NONE].float().mean()),
        }


def _weights() -> torch.Tensor:
    return torch.tensor([1.0] * NONE + [BACKGROUND])


def cell_classes(scene: scenes.Scene) -> torch.Tensor:
    """The digit in each cell, ``[9]`` i64, ``NONE`` where there is none."""
    classes = torch.full((CELLS,), NONE)
    for digit in scene.digits:
        classes[digit.cell] = digit.value
    return classes


def patch_classes(scene: scenes.Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """The digit that a patch stands for and its cell, each ``[patches]`` i64.

    These are one to nine patches under the middle of a digit; others are ``NONE`` and -1.
    """
    values = torch.full(((scene.image.shape[-1] // scenes.PATCH) ** 2,), NONE)
    places = torch.full_like(values, -1)
    for digit in scene.digits:
        top, left, high = digit.box
        rim = high // 5 if high >= SMALL else 0
        middle = replace(digit, box=(top + rim, left + rim, high - 2 * rim))
        on = scenes.digit_patches(replace(scene, digits=(middle,)))
        values[on], places[on] = digit.value, digit.cell
    return values, places
