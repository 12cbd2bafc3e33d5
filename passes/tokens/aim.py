"""``aim``: merge image tokens before the language model, and prune them layer by layer in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.moves.attention_scores import ranked_by_links
from ...ir.moves.matching import match
from ...ir.moves.selection import ascending, best, image_scores
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens, find_image_tokens
from ...ir.vocab.builder import Builder
from .cut_places import check_attention
from .token_pass import (
    Cut,
    TokenPass,
    behind,
    block_attention,
    by_picture,
    counted,
    in_image,
    marked,
    parsed,
    put_back,
    shared,
)

STEPS, TEMPERATURE = 5, 0.1
"""Of the authors' code."""
FROM, TO = 13 / 32, 21 / 32
"""How far in the paper prunes Vicuna-7B."""


@dataclass(frozen=True, kw_only=True)
class AIM(TokenPass):
    """Merge image tokens to ``merge``, then prune the rest linearly between two blocks.

    AIM (Zhong et al. 2024, arXiv 2412.03248). Before the language model, in each picture, even
    tokens go into the odd one that is most like them (cosine of the projected features), at most
    half of them at a time, until ``merge`` are left; a group is the unweighted mean of what was
    merged each time. Block l then starts with ``(prune_to - l) / (prune_to - prune_from)`` of
    these, rounded down: those with the highest PageRank over the attention of the block before, 5
    steps at temperature .1 over all tokens, the root of the mean square of the heads. From
    ``prune_to`` on there is none. What is left of merging is counted anew, as the language model is
    given no more than that; tokens that are left of pruning keep these positions. Newlines among
    patches (LLaVA-NeXT) are not merged, and are pruned with the rest.

    ``prune_from`` and ``prune_to`` at 0 are the paper's, 13 and 21 of 32 blocks, of the model's
    number. Each pruned block makes one whole attention map, ``heads tokens²`` numbers. The released
    code only masks what it prunes; here it leaves.
    """

    name: ClassVar[str] = "aim"
    positions: ClassVar[Positions] = "kept"
    merge: str = "25%"
    """Tokens left by merging: a number or a share."""
    prune_from: int = 0
    """The block before which pruning starts."""
    prune_to: int = 0
    """The block from which no image token is left."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parsed(self.name, self.merge, "merge")
        if self.prune_from < 0 or (self.prune_to and self.prune_to <= self.prune_from):
            raise BadInput(
                f"aim: prune_from={self.prune_from} and prune_to={self.prune_to}: the second must "
                "be a block behind the first, or 0"
            )

    def cuts(self, view: View, structure: Structure) -> Sequence[Cut]:
        images = find_image_tokens(view, structure)
        images.check_whole("put aim first in the recipe")
        images.check_patches()
        newlines = images.newlines
        merged = counted(self.name, self.merge, images.count - newlines, "merge")
        if merged % images.pictures:
            near = merged - merged % images.pictures or images.pictures
            raise Refusal(
                f"merge={merged} is not divisible among the {images.pictures} pictures of an "
                f"image: {near} is"
            )
        blocks = len(images.language)
        first = self.prune_from or max(1, round(FROM * blocks))
        last = self.prune_to or max(first + 1, round(TO * blocks))
        if last >= blocks or first >= last:
            raise Refusal(
                f"prune_from={first} and prune_to={last}: the language model has the blocks 0 to "
                f"{blocks - 1}, and the first block has no attention before it"
            )
        whole = count = newlines + merged
        cuts = [Cut(0, images.count, whole)]
        for block in range(first + 1, last + 1):
            left = int(whole * (last - block) / (last - first))
            cuts.append(Cut(block, count, left))
            count = left
        cuts = [cut for cut in cuts if cut.left < cut.count or not cut.block]
        check_attention(images, [cut.block - 1 for cut in cuts if cut.block and cut.left])
        return cuts

    def positions_at(self, block: int) -> Positions:
        # A cache is as long as what is left: the next word stands behind that.
        return self.positions if block else "renumbered"

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        if not images.block:
            return self._merge(view, images, left)
        site = block_attention(structure, images.language[images.block - 1])
        row = ranked_by_links(view, site.node, steps=STEPS, temperature=TEMPERATURE)
        b = behind(view, row, images.language[images.block].entry)
        return best(b, image_scores(b, row, marked(b, images), images.count), left)

    def _merge(self, view: View, images: ImageTokens, left: int) -> Value:
        x, each = by_picture(view, images), shared(images, left)
        b = Builder(view, view.after(view.maker(x)))
        count, home, places = images.patches, None, None
        while count > each:
            matching = match(b, x, min(count // 2, count - each), first=False)
            x, count = b.token_merge(x, matching.home, count=matching.left), matching.left
            home = matching.home if home is None else b.token_select(matching.home, home)
            places = matching.kept if places is None else b.token_select(places, matching.kept)
        if home is None or places is None:
            raise Refusal("nothing is merged")
        put_back(view, images, x, home)
        return in_image(view, ascending(b, places, each), images, left)
