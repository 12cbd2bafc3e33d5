"""``fopru``: keep the patches, or the rows of patches, that all patches look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...ir.core.errors import Refusal
from ...ir.core.view import Value, View
from ...ir.moves.attention_scores import received
from ...ir.moves.selection import best
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
from ...ir.vocab import END
from ...ir.vocab.builder import Builder
from .token_pass import ScoredTokens, by_token, in_image, shared


@dataclass(frozen=True, kw_only=True)
class FoPru(ScoredTokens):
    """Prune image tokens before the language model, by the attention that patches receive.

    FoPru (Jiang et al. 2024, arXiv 2411.14164): the score of a patch is the sum of what all queries
    of the layer that makes the features pay to it, the mean of the heads. ``strategy=rank`` keeps
    the best, ``row`` whole rows of the patch grid by the sum of their scores, so that what runs
    from left to right, as text does, stays whole; where an image comes as several pictures, each
    keeps as many, and newlines among them all stay. A token that is made of several patches
    (Qwen2-VL's squares) counts their mean. It needs no CLS token. No code of the authors
    is public: the layer, the queries and the sum over a row are our reading.

    The layer's whole map is made once, ``heads tokens²`` numbers a picture.
    """

    name: ClassVar[str] = "fopru"
    positions: ClassVar[Positions] = "renumbered"
    strategy: Literal["rank", "row"] = "rank"
    """By tokens, or by whole rows of them."""

    def check(self, images: ImageTokens) -> None:
        images.check_whole("its scores are of all patches")
        images.check_patches()
        images.check_members()
        if self.strategy == "row" and images.grid is None:
            raise Refusal("strategy=row needs a grid of patches, and none is seen: rank does not")

    def score(self, view: View, structure: Structure, images: ImageTokens) -> Value:
        scores = received(view, images.attention.node)
        if images.cls_token:
            b = Builder(view, view.after(view.maker(scores)))
            scores = b.slice(scores, 1, END, dim=1)
        return by_token(view, images, scores)

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        if self.strategy == "rank" or images.grid is None:
            return super().choose(view, structure, images, left)
        rows, columns = images.grid
        scores = self.score(view, structure, images)
        each = shared(images, left)
        if each % columns:
            step = columns * images.pictures
            whole = each // columns * step or step
            raise Refusal(
                f"keep={each * images.pictures} is not a number of whole rows of {columns} patches "
                f"in each of {images.pictures} pictures: {whole} or {whole + step} is"
            )
        b = Builder(view, view.after(view.maker(scores)))
        sums = b.sum(b.reshape(scores, -1, rows, columns), dims=(2,), keepdim=False)
        first = b.mul(b.unsqueeze(best(b, sums, each // columns), dims=(2,)), columns)
        places = b.add(first, b.arange(0, columns, 1, dtype=torch.int64))
        return in_image(view, b.reshape(places, -1, each), images, left)
