"""What passes that prune visual tokens share: how many to keep, which, and the cuts themselves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.moves.selection import best, kept_positions
from ...ir.moves.shrink_dim import Positions, shrink
from ...ir.moves.upstream import redirect
from ...ir.structure.asides import has_asides
from ...ir.structure.cuts import note_cut
from ...ir.structure.layers import Block
from ...ir.structure.recognize import Attention, Structure
from ...ir.structure.vision import ImageTokens, find_image_tokens
from ...ir.vocab.builder import Builder
from ..base import TOKENS, Context, Pass, PassResult, Site
from .cut_places import check_shared_keys
from .raster import in_text_order, in_tower_order, tokens_of


@dataclass(frozen=True)
class Cut:
    """One place at which image tokens leave the text."""

    block: int
    """The block of the language model before which they do."""
    count: int
    """Image tokens that come there."""
    left: int
    """Those that go on."""


@dataclass(frozen=True, kw_only=True)
class TokenPass(Pass):
    """Base of the passes after which fewer image tokens of each prompt go on.

    The graph still takes prompts with all placeholders; behind a cut the sequence is shorter, and
    so are ``logits``: positions after the image move forward by the number of tokens dropped. Each
    row of a batch must hold one image. Prompts of unequal length are padded on the left.
    """

    exact: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = (TOKENS,)
    positions: ClassVar[Positions]
    remakes: ClassVar[bool] = False
    """Whether what goes on are other tokens than the patches'."""

    @abstractmethod
    def cuts(self, view: View, structure: Structure) -> Sequence[Cut]:
        """Where tokens leave, from the first block to the last. Raises ``Refusal``."""

    @abstractmethod
    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        """Which image tokens stay: i64 ``[rows, left]``, ascending."""

    def positions_at(self, block: int) -> Positions:
        """How tokens stand behind a cut before a block."""
        return self.positions

    def run(self, context: Context) -> PassResult:
        cuts, result = self._survey(context)
        for cut in cuts:
            if cut.left < cut.count:
                self._apply(context, cut)
                result.shortened = True
        return result

    def plan(self, context: Context) -> PassResult:
        return self._survey(context)[1]

    def _apply(self, context: Context, cut: Cut) -> None:
        view = context.view
        try:
            images = find_image_tokens(view, context.structure, cut.block)
            value = images.language[cut.block].entry
            with view.made_by(self.name, context.step):
                makers, chosen = [value], None
                if cut.left:
                    chosen = self.choose(view, context.structure, images, cut.left)
                    makers.append(chosen)
                b = behind(view, *makers)
                kept = kept_positions(b, images, marked(b, images), chosen, cut.left)
            shrink(view, value, kept, positions=self.positions_at(cut.block), rule=self.name,
                   step=context.step)  # fmt: skip
        except Refusal as refusal:
            raise BadInput(f"{self.name}: {refusal}") from None
        note_cut(view, kept, cut.left, self.name, remade=self.remakes)
        context.edited()

    def _survey(self, context: Context) -> tuple[Sequence[Cut], PassResult]:
        view, structure = context.view, context.structure
        try:
            images = find_image_tokens(view, structure)
        except Refusal as refusal:
            raise BadInput(
                f"{self.name}: {refusal}. Token passes need a vision-language model of which the "
                "vision tower, the projector and the language model are in one graph"
            ) from None
        try:
            cuts = self.cuts(view, structure)
            check_order(view, structure, cuts[0].block)
            for cut in cuts:
                check_shared_keys(structure, images.language, cut.block)
        except Refusal as refusal:
            raise BadInput(f"{self.name}: {refusal}") from None
        result = PassResult()
        for cut in cuts:
            result.sites.append(
                Site(name=f"image tokens before block {cut.block}", kind="tokens",
                     shape=(cut.count, cut.left), bytes_before=0, bytes_after=0)
            )  # fmt: skip
            result.notes.append(
                f"{cut.left} of {cut.count} image tokens go on from block {cut.block}"
                if cut.left < cut.count
                else f"all {cut.left} image tokens are kept: the graph stays as it is"
            )
        return cuts, result


@dataclass(frozen=True, kw_only=True)
class KeepPass(TokenPass):
    """Base of the passes that cut once: ``keep`` is a count, or a share such as ``25%``.

    Of patches, where newlines stand among them (LLaVA-NeXT): these all stay besides.
    """

    of_patches: ClassVar[bool] = True
    """Whether patches are what it chooses among, and no tokens that came on from them."""
    keep: str
    """Image tokens to keep, as 64 or 25%."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parsed(self.name, self.keep)

    @property
    def block(self) -> int:
        """The block of the language model before which tokens leave."""
        return 0

    def check(self, images: ImageTokens) -> None:
        """Raise ``Refusal`` where the model lacks what the score is made of."""

    def cuts(self, view: View, structure: Structure) -> Sequence[Cut]:
        images = find_image_tokens(view, structure, self.block)
        self.check(images)
        newlines = images.newlines if self.of_patches else 0
        left = newlines + counted(self.name, self.keep, images.count - newlines)
        return [Cut(self.block, images.count, left)]


@dataclass(frozen=True, kw_only=True)
class ScoredTokens(KeepPass):
    """Base of the token passes that are one function: from the graph to a score of each token."""

    @abstractmethod
    def score(self, view: View, structure: Structure, images: ImageTokens) -> Value:
        """How much each token counts: float ``[rows, tokens]``.

        Or one row for each picture, where an image comes as several (thumbnail and crops): of each
        picture the same number of tokens is then kept.
        """

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        scores = self.score(view, structure, images)
        b = Builder(view, view.after(view.maker(scores)))
        by_token = (view.type(scores).shape or ())[1:2] != (images.patches,)
        if by_token or not self.of_patches:
            return best(b, scores, left)
        return in_image(view, best(b, scores, shared(images, left)), images, left)


def shared(images: ImageTokens, left: int) -> int:
    """How many patches each picture keeps where ``left`` tokens of an image do. Raises ``Refusal``
    where they cannot be shared out."""
    left, pictures = left - images.newlines, images.pictures
    if left % pictures:
        near = left - left % pictures
        raise Refusal(
            f"keep={left} is not divisible among the {pictures} pictures of an image: "
            f"{near or pictures} is"
        )
    return left // pictures


def in_image(view: View, chosen: Value, images: ImageTokens, left: int) -> Value:
    """Places in each picture ``[rows x pictures, patches]`` as places in the image, ascending, with
    those of newlines: ``left`` of them."""
    b = Builder(view, view.after(view.maker(chosen)))
    if images.pictures == 1:
        return tokens_of(b, images, chosen, left)
    count = left - images.newlines
    apart = b.reshape(chosen, -1, images.pictures, count // images.pictures)
    total = images.pictures * images.patches
    first = b.arange(0, total, images.patches, dtype=torch.int64)
    patches = b.reshape(b.add(apart, b.unsqueeze(first, dims=(0, 2))), -1, count)
    return tokens_of(b, images, patches, left)


def by_token(view: View, images: ImageTokens, scores: Value) -> Value:
    """Scores of the tower's patches ``[pictures, patches]`` as those of tokens: the mean of what a
    token is made of."""
    if not images.members:
        return scores
    b = Builder(view, view.after(view.maker(scores)))
    each = len(images.members[0])
    table = MemoryWeight(torch.tensor(images.members).flatten())
    apart = b.index_select(scores, view.add_weight("token_pass.members", table), dim=1)
    sums = b.sum(b.reshape(apart, -1, len(images.members), each), dims=(2,), keepdim=False)
    return b.mul(sums, 1 / each)


def by_picture(view: View, images: ImageTokens) -> Value:
    """The projected features, a row for each picture: ``[pictures, patches, width]``."""
    shape = view.type(images.features).shape or ()
    if shape[1:2] == (images.patches,):
        return images.features
    b = Builder(view, view.after(view.maker(images.features)))
    return b.reshape(in_tower_order(b, images), -1, images.patches, shape[2])


def put_back(view: View, images: ImageTokens, merged: Value, home: Value) -> None:
    """Let the text read, at each image token's place, the row of ``merged`` that it went into.

    ``merged`` is ``[pictures, fewer, width]`` and ``home`` i64 ``[pictures, patches]``. Raises
    ``Refusal`` where the text reads more of an image than these.
    """
    if has_asides(view):
        raise Refusal(
            "early layers of the text add features of their own at the image tokens (DeepStack), "
            "which are not merged: leave tokens out instead"
        )
    b = behind(view, merged, home)
    whole = b.token_select(merged, home)
    shape = view.type(images.features).shape or ()
    if shape[1:2] != (images.patches,):
        whole = b.reshape(whole, -1, images.pictures * images.patches, shape[2])
        whole = in_text_order(b, images, whole)
    redirect(view, images.features, whole)


def block_attention(structure: Structure, block: Block) -> Attention:
    """The attention of a block; ``Refusal`` where it has none."""
    if not block.attentions:
        raise Refusal(f"block {block.index} has no attention to score tokens by")
    return structure.attentions[block.attentions[-1]]


def marked(b: Builder, images: ImageTokens) -> Value:
    """Which positions are image tokens where a pass cuts: bool ``[rows, tokens]``."""
    marks = images.placeholders
    for positions in images.kept:
        marks = b.token_select(marks, positions)
    return marks


def behind(view: View, *values: Value) -> Builder:
    """A builder right behind the last of the nodes that make the values."""
    makers = {view.producer(value) for value in values}
    return Builder(view, view.after([node for node in view.nodes() if node in makers][-1]))


def same_for_all(view: View, images: ImageTokens, places: list[int], name: str) -> Value:
    """The same places in every row: i64 ``[rows, len(places)]``."""
    b = Builder(view, view.after(view.maker(images.merged)))
    table = view.add_weight(name, MemoryWeight(torch.tensor([places])))
    # Zeros of one column, as many as there are rows.
    rows = b.cast(b.slice(images.placeholders, 0, 1, dim=1), dtype=torch.int64)
    return b.add(b.mul(rows, 0), table)


def parsed(name: str, keep: str, option: str = "keep") -> tuple[float, bool]:
    """The number of an option such as ``keep``, and whether it is a share in percent."""
    text = keep.strip()
    share = text.endswith("%")
    try:
        number = float(text[:-1]) if share else int(text)
    except ValueError:
        raise BadInput(
            f"{name}: {option}={keep} is neither a count, as 144, nor a share, as 25%"
        ) from None
    if not number > 0 or (share and number > 100):
        raise BadInput(
            f"{name}: {option}={keep} must be "
            + ("above 0 % and at most 100 %" if share else "at least 1")
        )
    return number, share


def counted(name: str, keep: str, total: int, option: str = "keep") -> int:
    """How many of ``total`` an option such as ``keep`` means."""
    number, share = parsed(name, keep, option)
    left = round(total * number / 100) if share else int(number)
    if not 0 < left <= total:
        raise BadInput(
            f"{name}: {option}={keep} of {total} image tokens is {left}; between 1 and "
            f"{total} can be kept"
        )
    return left


def check_order(view: View, structure: Structure, block: int) -> None:
    """Raise ``Refusal`` where tokens leave behind ``block`` already: what chose them counted the
    tokens that came there."""
    here = find_image_tokens(view, structure, block)
    later = find_image_tokens(view, structure, len(here.language) - 1)
    if len(later.kept) > len(here.kept):
        raise Refusal(
            f"tokens leave behind block {block} already: put the cut that comes first in the model "
            "first in the recipe"
        )
