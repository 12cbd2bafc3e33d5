"""``fastervlm``: keep the patches that the vision tower's CLS token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.core.errors import Refusal
from ...ir.core.view import Value, View
from ...ir.moves.selection import attention_row, best
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
from ...ir.vocab import END
from .token_pass import TokenPass


@dataclass(frozen=True, kw_only=True)
class FasterVLM(TokenPass):
    """Prune image tokens before the language model, by CLS attention (arXiv 2412.01818).

    The score of a patch is what the CLS query pays to it in the layer that makes the features, the
    mean of the heads, with the softmax over all keys. The kept tokens stay in raster order and get
    the positions that they would have if there had been no others. Where an image comes as several
    pictures (thumbnail and crops), each keeps the same number. A tower without a CLS token is
    refused.
    """

    name: ClassVar[str] = "fastervlm"
    positions: ClassVar[Positions] = "renumbered"

    def check(self, images: ImageTokens) -> None:
        if not images.cls_token:
            raise Refusal(
                "the vision tower has no CLS token to score patches by; `fastv` and "
                "`uniform-tokens` need none"
            )
        if images.kept:
            raise Refusal("image tokens were pruned before already: CLS scores are of all patches")

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        row = attention_row(view, images.attention.node, "first")
        place = view.after(view.producer(row))
        scores = view.build("slice", [row, 1, END], {"dim": 1}, before=place)
        pictures = images.pictures
        if left % pictures:
            near = left - left % pictures
            raise Refusal(
                f"keep={left} is not divisible among the {pictures} pictures of an image: "
                f"{near or pictures} is"
            )
        chosen = best(view, scores, left // pictures, place)
        if pictures == 1:
            return chosen
        return _joined(view, chosen, images, left)


def _joined(view: View, chosen: Value, images: ImageTokens, left: int) -> Value:
    """Places in each picture ``[rows x pictures, left / pictures]`` as places in the image."""
    place = view.after(view.producer(chosen))
    each = left // images.pictures
    apart = view.build("reshape", [chosen, -1, images.pictures, each], before=place)
    first = view.build(
        "arange", [0, images.pictures * images.patches, images.patches],
        {"dtype": torch.int64}, before=place,
    )  # fmt: skip
    first = view.build("unsqueeze", [first], {"dims": (0, 2)}, before=place)
    moved = view.build("add", [apart, first], before=place)
    return view.build("reshape", [moved, -1, left], before=place)
