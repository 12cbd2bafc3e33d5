"""``tome``: in every block of a vision tower, put the most similar tokens together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Node, Value, View, is_value
from ...ir.moves.matching import match
from ...ir.moves.selection import ascending, kept_positions
from ...ir.moves.shrink_dim import shrink
from ...ir.moves.shrink_pictures import hides_nothing, shrink_pictures
from ...ir.structure.cuts import note_cut
from ...ir.structure.layers import Block
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens, find_image_tokens, find_patches
from ...ir.vocab import END
from ...ir.vocab.builder import Builder
from ..base import TOKENS, Context, Pass, PassResult, Site
from .token_pass import behind, check_order, in_image


@dataclass(frozen=True)
class _Tower:
    blocks: tuple[Block, ...]
    tokens: int
    cls_token: bool
    images: ImageTokens | None


@dataclass(frozen=True, kw_only=True)
class ToMe(Pass):
    """Merge ``r`` pairs of similar tokens in each block of a vision tower (arXiv 2210.09461).

    Bolya et al. 2023, restated: between attention and feed-forward each even token finds the odd
    one whose key, the mean of the heads, is most like its own; the ``r`` pairs that are most alike
    become one token each, the mean weighted by how many patches each stands for. Attention adds the
    logarithm of that number to the logits of a key (proportional attention). A CLS token stays. In
    the last blocks fewer pairs are merged where no more are left.

    What reads the CLS token alone, as classifiers do, reads it as it is; what reads patches gets
    for each the token that it is a part of. In a vision-language model one position a token goes on
    to the language model, that of the patch that it was merged into. Works in towers of ViT, CLIP
    and SigLIP; one with windows, or that hides tokens from each other, is refused.
    """

    name: ClassVar[str] = "tome"
    exact: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = (TOKENS,)
    r: int = 8
    """Pairs of tokens that become one, in each block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 0:
            raise BadInput(f"tome: r={self.r} must be at least 0")

    def run(self, context: Context) -> PassResult:
        tower, counts, result = self._survey(context)
        if not self.r:
            result.notes.append("r=0: the graph stays as it is")
            return result
        try:
            places = self._merge(context, tower, counts)
            if tower.images is not None:
                self._cut_text(context, tower.images, places, counts[-1])
        except Refusal as refusal:
            raise BadInput(f"tome: {refusal}") from None
        context.edited()
        result.shortened = tower.images is not None
        return result

    def plan(self, context: Context) -> PassResult:
        return self._survey(context)[2]

    def _survey(self, context: Context) -> tuple[_Tower, list[int], PassResult]:
        try:
            tower = _find_tower(context.view, context.structure)
        except Refusal as refusal:
            raise BadInput(
                f"tome: {refusal}. It needs a vision tower, of a classifier or of a "
                "vision-language model, and a fixed number of patches"
            ) from None
        counts: list[int] = []
        result = PassResult()
        for block in tower.blocks:
            before = counts[-1] if counts else tower.tokens
            counts.append(before - min(self.r, (before - tower.cls_token) // 2))
            result.sites.append(
                Site(name=f"tokens of block {block.index}", kind="tokens",
                     shape=(before, counts[-1]), bytes_before=0, bytes_after=0)
            )  # fmt: skip
        result.notes.append(f"{counts[-1]} of {tower.tokens} tokens of a picture are left")
        return tower, counts, result

    def _merge(self, context: Context, tower: _Tower, counts: list[int]) -> Value:
        """Which tokens go on at the tower's end: i64 ``[pictures, tokens]``, in the rows' order."""
        view = context.view
        size: Value | None = None
        places: Value | None = None
        before = tower.tokens
        for block, after in zip(tower.blocks, counts, strict=True):
            with view.made_by(self.name, context.step):
                site = _attention(view, block)
                if size is not None:
                    site = _attend_by_size(view, site, size)
                if after == before:
                    continue
                x = block.sub_blocks[0].exit
                b = Builder(view, view.after(view.maker(x)))
                matching = match(b, _keys(b, site), before - after, first=tower.cls_token)
                size = _ones(b, x) if size is None else size
                new = b.token_merge(x, matching.home, b.squeeze(size, dims=(2,)), count=after)
                size = b.token_merge(size, matching.home, count=after, mean=False)
                places = matching.kept if places is None else b.token_select(places, matching.kept)
            shrink_pictures(view, x, new, matching.home, first=tower.cls_token,
                            rule=self.name, step=context.step)  # fmt: skip
            before = after
        assert places is not None
        return places

    def _cut_text(self, context: Context, images: ImageTokens, places: Value, tokens: int) -> None:
        """Of the patches that are one token, one position goes on in the text."""
        view = context.view
        value = images.language[0].entry
        with view.made_by(self.name, context.step):
            b = behind(view, places)
            if images.cls_token:
                places = b.sub(b.slice(places, 1, END, dim=1), 1)
            count = tokens - images.cls_token
            chosen = ascending(b, places, count)
            count = count * images.pictures + images.newlines
            chosen = in_image(view, chosen, images, count)
            b = behind(view, value, chosen)
            positions = kept_positions(b, images, images.placeholders, chosen, count)
        shrink(view, value, positions, positions="renumbered", rule=self.name, step=context.step)
        note_cut(view, positions, count, self.name)


def _find_tower(view: View, structure: Structure) -> _Tower:
    """The tower whose tokens are merged. Raises ``Refusal``."""
    if not structure.blocks:
        raise Refusal("no block is recognised, so there is no stream of patches")
    if structure.blocks[-1].tower:
        images = find_image_tokens(view, structure)
        check_order(view, structure, 0)
        images.check_whole("put tome first in the recipe")
        images.check_single()
        images.check_patches()
        tower = _Tower(images.tower, images.patches + images.cls_token, images.cls_token, images)
    else:
        patches = find_patches(view, structure)
        tokens = patches.grid[0] * patches.grid[1] + patches.cls_token
        tower = _Tower(structure.blocks, tokens, patches.cls_token, None)
    for block in tower.blocks:
        _check_block(view, structure, block)
    return tower


def _check_block(view: View, structure: Structure, block: Block) -> None:
    if len(block.attentions) != 1 or len(block.sub_blocks) < 2:
        raise Refusal(f"block {block.index} is not attention and a feed-forward after it")
    site = structure.attentions[block.attentions[0]].node
    mask = [o for o in view.operands(site)[3:] if is_value(o)]
    if view.attrs(site)["causal"] or not all(hides_nothing(view, m) for m in mask):
        raise Refusal(f"attention in block {block.index} hides tokens from each other", site)


def _attention(view: View, block: Block) -> Node:
    """The block's ``sdpa`` as it is now: the structure knows it as it was before the first cut."""
    sites = (node for node in view.nodes() if view.op(node) == "sdpa")
    return next(itertools.islice(sites, block.attentions[0], None))


def _keys(b: Builder, site: Node) -> Value:
    """The mean of the heads' keys: ``[pictures, tokens, width]``."""
    return b.mean(b.view.tensor(site, 1), dims=(1,), keepdim=False)


def _ones(b: Builder, x: Value) -> Value:
    """1 for each token: ``[pictures, tokens, 1]``."""
    column = b.slice(x, 0, 1, dim=2)
    return b.cast(b.eq(column, column), dtype=b.view.type(x).dtype)


def _attend_by_size(view: View, site: Node, size: Value) -> Node:
    """Add ``log(size)`` of each key to its logits; the ``sdpa`` that does."""
    b, attrs = Builder(view, site), view.attrs(site)
    bias = b.unsqueeze(b.transpose(b.log(size), perm=(0, 2, 1)), dims=(1,))
    q, k, v = view.operands(site)[:3]
    new = b.sdpa(q, k, v, bias, scale=attrs["scale"], softcap=attrs["softcap"], gqa=attrs["gqa"])
    view.replace(view.results(site)[0], new)
    view.erase_dead(site)
    return view.maker(new)
