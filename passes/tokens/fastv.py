"""``fastv``: after a few layers, keep the image tokens that the last prompt token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.moves.attention_scores import attention_row
from ...ir.moves.selection import image_scores
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
from ...ir.vocab import END
from .cut_places import check_attention
from .token_pass import ScoredTokens, behind, block_attention, marked


@dataclass(frozen=True, kw_only=True)
class FastV(ScoredTokens):
    """Prune image tokens inside the language model, before its block ``layer`` (arXiv 2403.06764).

    The score is the attention that the last token of the prompt pays in block ``layer - 1``, the
    mean of the heads, over all keys. Tokens keep their positions. The first ``layer`` blocks run on
    all tokens; the paper's ``layer`` is 2 with half of the tokens kept, its demonstration's 3 with
    a quarter. It has no score at ``layer=0``: that is refused.
    """

    name: ClassVar[str] = "fastv"
    positions: ClassVar[Positions] = "kept"
    of_patches: ClassVar[bool] = False
    keep: str = "50%"
    """Image tokens to keep: a number, or a share, as 25%."""
    layer: int = 2
    """The block of the language model before which tokens leave."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise BadInput(
                f"fastv: layer={self.layer} must be at least 1: the score comes from the layer "
                "before. To prune before the language model, use fastervlm"
            )

    @property
    def block(self) -> int:
        return self.layer

    def check(self, images: ImageTokens) -> None:
        if self.layer >= len(images.language):
            raise Refusal(
                f"layer={self.layer}: the language model has the blocks 0 to "
                f"{len(images.language) - 1}"
            )
        check_attention(images, [self.layer - 1])

    def score(self, view: View, structure: Structure, images: ImageTokens) -> Value:
        site = block_attention(structure, images.language[self.layer - 1])
        row = attention_row(view, site.node, "last")
        b = behind(view, row, images.language[self.layer].entry)
        if site.cache is not None:
            row = b.slice(row, b.size(site.cache.past[0], dim=2), END, dim=1)
        return image_scores(b, row, marked(b, images), images.count)
