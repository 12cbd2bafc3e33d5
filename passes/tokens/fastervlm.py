"""``fastervlm``: keep the patches that the vision tower's CLS token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.moves.attention_scores import attention_row
from ...ir.moves.selection import best
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Attention, Structure
from ...ir.structure.vision import ImageTokens
from ...ir.vocab import END
from ...ir.vocab.builder import Builder
from .token_pass import ScoredTokens, by_token, in_image, shared

OUTLIERS = 10 / 576
"""The share of patches that DAMRO takes for outliers: 10 of LLaVA-1.5's."""


def check_cls(images: ImageTokens) -> None:
    """Raise ``Refusal`` where there are no CLS scores of all patches."""
    if not images.cls_token:
        raise Refusal(
            "the vision tower has no CLS token to score patches by; `fopru` scores by what patches "
            "receive, and `diverse`, `fastv` and `uniform-tokens` need none either"
        )
    images.check_whole("CLS scores are of all patches")
    images.check_patches()
    images.check_members()


@dataclass(frozen=True, kw_only=True)
class ClsScoredTokens(ScoredTokens):
    """Base of the scores that are made of what the vision tower's CLS token looks at."""

    positions: ClassVar[Positions] = "renumbered"

    def check(self, images: ImageTokens) -> None:
        check_cls(images)


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
    pictures (thumbnail and crops), each keeps the same number; where their patches enter the text
    as one raster (LLaVA-NeXT), the newlines behind its rows all stay, as in the authors' code where
    it has them. A tower without a CLS token is refused.

    ``background=damro`` leaves out the patches that CLS looks at most, ``outliers`` of a picture
    (0: as many as 10 of 576): DAMRO (Gong et al. 2024, arXiv 2410.04514) found that large towers
    keep there what they know of the whole picture, often on background. As it corrects decoding by
    them and prunes nothing, this is its finding put to another use.
    """

    name: ClassVar[str] = "fastervlm"
    background: Literal["kept", "damro"] = "kept"
    """damro: outliers leave the score."""
    outliers: int = 0
    """Of a picture, with damro; 0: as 10 of 576."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outliers < 0 or (self.outliers and self.background == "kept"):
            raise BadInput(
                f"fastervlm: outliers={self.outliers} must be at least 0, and is an option of "
                "background=damro"
            )

    def score(self, view: View, structure: Structure, images: ImageTokens) -> Value:
        return by_token(view, images, cls_row(view, images.attention))

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        if self.background == "kept":
            return super().choose(view, structure, images, left)
        scores = self.score(view, structure, images)
        each = shared(images, left)
        skipped = self.outliers or max(1, round(OUTLIERS * images.patches))
        # Where nearly all are kept, some outliers are.
        skipped = min(skipped, images.patches - each)
        b = Builder(view, view.after(view.maker(scores)))
        return in_image(view, best(b, scores, each, skipped=skipped), images, left)
