"""``uniform-tokens``: image tokens at even distances, a baseline without a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.view import Value, View
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
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
        places = [(2 * i + 1) * images.count // (2 * left) for i in range(left)]
        return same_for_all(view, images, places, "uniform_tokens.places")
