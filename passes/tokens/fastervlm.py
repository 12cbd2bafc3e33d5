"""``fastervlm``: keep the patches that the vision tower's CLS token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import Refusal
from ...ir.core.view import Value, View
from ...ir.moves.selection import attention_row
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Attention, Structure
from ...ir.structure.vision import ImageTokens
from ...ir.vocab import END
from ...ir.vocab.builder import Builder
from .token_pass import ScoredTokens


@dataclass(frozen=True, kw_only=True)
class ClsScoredTokens(ScoredTokens):
    """Base of the scores that are made of what the vision tower's CLS token looks at."""

    positions: ClassVar[Positions] = "renumbered"

    def check(self, images: ImageTokens) -> None:
        if not images.cls_token:
            raise Refusal(
                "the vision tower has no CLS token to score patches by; `fastv` and "
                "`uniform-tokens` need none"
            )
        if images.kept:
            raise Refusal("image tokens were pruned before already: CLS scores are of all patches")


def cls_row(view: View, site: Attention) -> Value:
    """What the CLS query pays to each patch, the mean of the heads: ``[pictures, patches]``."""
    row = attention_row(view, site.node, "first")
    return Builder(view, view.after(view.maker(row))).slice(row, 1, END, dim=1)


@dataclass(frozen=True, kw_only=True)
class FasterVLM(ClsScoredTokens):
    """Prune image tokens before the language model, by CLS attention (arXiv 2412.01818).

    The score of a patch is what the CLS query pays to it in the layer that makes the features, the
    mean of the heads, with the softmax over all keys. The kept tokens stay in raster order and get
    the positions that they would have if there had been no others. Where an image comes as several
    pictures (thumbnail and crops), each keeps the same number. A tower without a CLS token is
    refused.
    """

    name: ClassVar[str] = "fastervlm"

    def score(self, view: View, structure: Structure, images: ImageTokens) -> Value:
        return cls_row(view, images.attention)
