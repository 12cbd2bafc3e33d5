"""``similarity``: drop the image tokens that another one is most like, or merge them into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.core.view import Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.moves.matching import closest_of, similarity
from ...ir.moves.selection import best
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
from ...ir.vocab import END
from ...ir.vocab.builder import Builder
from .token_pass import KeepPass, by_picture, in_image, put_back, shared

TIE = 3e-7
"""By how much less a token counts than an equal one before it: above what rounding does to 1."""


@dataclass(frozen=True, kw_only=True)
class Similarity(KeepPass):
    """Keep the image tokens that no other is like; ``merge`` adds the others to their nearest.

    The weight-free score of TextMonkey (Liu et al. 2024, arXiv 2403.04473): a token counts
    ``1 - max cos`` with the others, over the projected features. With ``merge`` a dropped token
    goes into the kept one that is most like it, whose features are then the mean of its group, as
    DC² (Wang et al. 2024, arXiv 2408.15556) merges patches. Where an image comes as several
    pictures, each keeps the same number. Two tokens that are alike both count little: all copies of
    a pattern may leave, where ``diverse`` keeps one of them.
    """

    name: ClassVar[str] = "similarity"
    positions: ClassVar[Positions] = "renumbered"
    merge: bool = False
    """Add what leaves to the token most like it."""

    def check(self, images: ImageTokens) -> None:
        images.check_whole("it compares all patches")
        images.check_patches()

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        features, each = by_picture(view, images), shared(images, left)
        b = Builder(view, view.after(view.maker(features)))
        alike = similarity(b, features)
        # The highest is a token's likeness to itself.
        nearest = b.topk(alike, k=min(2, images.patches), dim=2, largest=True, sorted=True)
        # Two tokens that are each other's nearest have one score: the first of them counts more.
        order = torch.arange(images.patches) * TIE - 1
        later = view.add_weight("similarity.order", MemoryWeight(order))
        scores = b.neg(b.add(b.squeeze(b.slice(nearest, -1, END, dim=2), dims=(2,)), later))
        places = best(b, scores, each)
        if self.merge:
            home = closest_of(b, alike, places, images.patches)
            put_back(view, images, b.token_merge(features, home, count=each), home)
        return in_image(view, places, images, left)
