"""``random-tokens``: the baseline that every score of image tokens must beat."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.view import Value, View
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
from .raster import fixed_tokens
from .token_pass import KeepPass, same_for_all


@dataclass(frozen=True, kw_only=True)
class RandomTokens(KeepPass):
    """Keep image tokens at random places before the language model, the same for every image.

    The places are drawn once, with ``seed``, and frozen into the graph.
    """

    name: ClassVar[str] = "random-tokens"
    positions: ClassVar[Positions] = "renumbered"
    seed: int = 0
    """Of the places that are drawn."""

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        newlines = images.newlines
        patches = random.Random(self.seed).sample(range(images.count - newlines), left - newlines)
        places = fixed_tokens(images, sorted(patches))
        return same_for_all(view, images, places, "random_tokens.places")
