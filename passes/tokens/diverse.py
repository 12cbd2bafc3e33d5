"""``diverse``: keep the image tokens that are least like each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.view import Value, View
from ...ir.moves.matching import similarity
from ...ir.moves.selection import ascending
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
from ...ir.vocab.builder import Builder
from .token_pass import KeepPass, by_picture, in_image, shared


@dataclass(frozen=True, kw_only=True)
class Diverse(KeepPass):
    """Prune image tokens before the language model so that those left differ most.

    DivPrune (Alvar et al. 2025, arXiv 2503.02175; DART, arXiv 2502.11494, is of the same kind): the
    greedy choice of the largest least distance, ``1 - cos`` of the projected features. The first
    token is the one whose nearest neighbour is farthest; each next one is farthest from those
    chosen. It asks neither the tower's attention nor the text, so that it works with every tower.
    Where an image comes as several pictures, each keeps the same number, chosen within it.

    The ONNX form has three small nodes for each kept token of a picture and no loop.
    """

    name: ClassVar[str] = "diverse"
    positions: ClassVar[Positions] = "renumbered"

    def check(self, images: ImageTokens) -> None:
        images.check_whole("it chooses among all patches")
        images.check_patches()

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        features, each = by_picture(view, images), shared(images, left)
        b = Builder(view, view.after(view.maker(features)))
        # Rounding may leave a cosine above 1.
        distance = b.clamp(b.sub(1.0, similarity(b, features)), min=0.0)
        places = b.farthest_tokens(distance, count=each)
        return in_image(view, ascending(b, places, each), images, left)
