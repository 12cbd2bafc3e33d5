"""``pyramid-drop``: image tokens leave the language model in stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.moves.attention_scores import coming_row
from ...ir.moves.selection import best, image_scores
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens, find_image_tokens
from .cut_places import check_attention
from .token_pass import Cut, TokenPass, behind, block_attention, marked


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(TokenPass):
    """Drop image tokens at the boundaries of ``stages`` equal parts of the language model.

    PyramidDrop (Xing et al. 2024, arXiv 2410.17247): part s keeps ``int(V ratio^s)`` of the V
    tokens that there were at first; the score at a boundary is what the last prompt token pays in
    the block behind it, the mean of the heads, over all tokens that come there. Positions are
    counted anew. The paper's defaults, 4 stages and .5, leave 46.9 % of the work on image tokens.
    The score costs the queries and keys of that block once more for the tokens that come.
    """

    name: ClassVar[str] = "pyramid-drop"
    positions: ClassVar[Positions] = "renumbered"
    stages: int = 4
    """Into how many runs of blocks they are cut."""
    ratio: float = 0.5
    """Share that stays at each cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages < 2:
            raise BadInput(f"pyramid-drop: stages={self.stages} must be at least 2")
        if not 0 < self.ratio <= 1:
            raise BadInput(f"pyramid-drop: ratio={self.ratio:g} must be above 0 and at most 1")

    def cuts(self, view: View, structure: Structure) -> Sequence[Cut]:
        images = find_image_tokens(view, structure)
        blocks = len(images.language)
        if self.stages > blocks:
            raise Refusal(f"stages={self.stages}: the language model has {blocks} blocks")
        places = [blocks * s // self.stages for s in range(1, self.stages)]
        total = count = find_image_tokens(view, structure, places[0]).count
        cuts: list[Cut] = []
        for stage, block in enumerate(places, 1):
            left = int(total * self.ratio**stage)
            if not left:
                raise Refusal(
                    f"ratio={self.ratio:g} leaves none of {total} image tokens from block {block} "
                    "on: fewer stages or a larger ratio would, and visual-exit drops all of them"
                )
            cuts.append(Cut(block, count, left))
            count = left
        check_attention(images, [n for cut in cuts for n in (cut.block, cut.block - 1)])
        return cuts

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        before, block = images.language[images.block - 1 : images.block + 1]
        sites = [block_attention(structure, b).node for b in (block, before)]
        row = coming_row(view, sites[0], block.entry, sites[1])
        b = behind(view, row)
        return best(b, image_scores(b, row, marked(b, images), images.count), left)
