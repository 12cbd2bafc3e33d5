"""``uniform-tokens``: image tokens at even distances, a baseline without a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.view import Value, View
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
from .raster import fixed_tokens
from .token_pass import KeepPass, same_for_all


@dataclass(frozen=True, kw_only=True)
class UniformTokens(KeepPass):
    """Keep every n-th image token before the language model: each stands in the middle of its run.

    In raster order, so that few tokens fall into few columns of the patch grid.
    """

    name: ClassVar[str] = "uniform-tokens"
    positions: ClassVar[Positions] = "renumbered"

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        total, count = images.count - images.newlines, left - images.newlines
        patches = [(2 * i + 1) * total // (2 * count) for i in range(count)]
        places = fixed_tokens(images, patches)
        return same_for_all(view, images, places, "uniform_tokens.places")
