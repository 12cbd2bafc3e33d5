"""What passes that prune visual tokens share: how many to keep, which, and the cut itself."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.moves.selection import best, kept_positions
from ...ir.moves.shrink_dim import Positions, shrink
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens, find_image_tokens, note_count
from ...ir.vocab.builder import Builder
from ..base import TOKENS, Context, Pass, PassResult, Site


@dataclass(frozen=True, kw_only=True)
class TokenPass(Pass):
    """Keep ``keep`` of the image tokens of each prompt: a count, or a share such as ``25%``.

    The graph still takes prompts with all placeholders; behind the cut the sequence is shorter, and
    so are ``logits``: positions after the image move forward by the number of tokens dropped. Each
    row of a batch must hold one image. Prompts of unequal length are padded on the left.
    """

    exact: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = (TOKENS,)
    keep: str
    """Image tokens to keep: a number, or a share, as 25%."""
    positions: ClassVar[Positions]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._count(None)

    @property
    def block(self) -> int:
        """The block of the language model before which tokens leave."""
        return 0

    @abstractmethod
    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        """Which image tokens stay: i64 ``[rows, left]``, ascending."""

    def check(self, images: ImageTokens) -> None:
        """Raise ``Refusal`` where the model lacks what the score is made of."""

    def run(self, context: Context) -> PassResult:
        view = context.view
        images, left, result = self._survey(context)
        if left == images.count:
            result.notes.append(f"all {left} image tokens are kept: the graph stays as it is")
            return result
        value = images.language[self.block].entry
        try:
            with view.made_by(self.name, context.step):
                chosen = self.choose(view, context.structure, images, left)
                kept = self._kept(view, images, chosen, left)
            shrink(view, value, kept, positions=self.positions, rule=self.name, step=context.step)
        except Refusal as refusal:
            raise BadInput(f"{self.name}: {refusal}") from None
        note_count(view, kept, left)
        result.shortened = True
        context.edited()
        return result

    def plan(self, context: Context) -> PassResult:
        return self._survey(context)[2]

    def _survey(self, context: Context) -> tuple[ImageTokens, int, PassResult]:
        try:
            images = find_image_tokens(context.view, context.structure, self.block)
            self.check(images)
        except Refusal as refusal:
            raise BadInput(
                f"{self.name}: {refusal}. Token passes need a vision-language model of which the "
                "vision tower, the projector and the language model are in one graph"
            ) from None
        left = self._count(images.count)
        result = PassResult()
        result.sites.append(
            Site(name=f"image tokens before block {self.block}", kind="tokens",
                 shape=(images.count, left), bytes_before=0, bytes_after=0)
        )
        result.notes.append(f"{left} of {images.count} image tokens go on from there")
        return images, left, result

    def _kept(self, view: View, images: ImageTokens, chosen: Value, left: int) -> Value:
        b = self.behind(view, images.language[self.block].entry, chosen)
        return kept_positions(b, images, self.marked(b, images), chosen, left)

    def marked(self, b: Builder, images: ImageTokens) -> Value:
        """Which positions are image tokens where this pass cuts: bool ``[rows, tokens]``."""
        marked = images.placeholders
        for kept in images.kept:
            marked = b.token_select(marked, kept)
        return marked

    def behind(self, view: View, *values: Value) -> Builder:
        """A builder right behind the last of the nodes that make the values."""
        makers = {view.producer(value) for value in values}
        return Builder(view, view.after([node for node in view.nodes() if node in makers][-1]))

    def _count(self, total: int | None) -> int:
        """How many of ``total`` are kept; with ``None`` the option alone is checked."""
        text = self.keep.strip()
        share = text.endswith("%")
        try:
            number = float(text[:-1]) if share else int(text)
        except ValueError:
            raise BadInput(
                f"{self.name}: keep={self.keep} is neither a count, as 144, nor a share, as 25%"
            ) from None
        if not number > 0 or (share and number > 100):
            raise BadInput(
                f"{self.name}: keep={self.keep} must be "
                + ("above 0 % and at most 100 %" if share else "at least 1")
            )
        if total is None:
            return 0
        left = round(total * number / 100) if share else int(number)
        if not 0 < left <= total:
            raise BadInput(
                f"{self.name}: keep={self.keep} of {total} image tokens is {left}; between 1 and "
                f"{total} can be kept"
            )
        return left


@dataclass(frozen=True, kw_only=True)
class ScoredTokens(TokenPass):
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
        of_a_picture = (view.type(scores).shape or ())[1:] == (images.patches,)
        pictures = images.pictures if of_a_picture else 1
        if left % pictures:
            near = left - left % pictures
            raise Refusal(
                f"keep={left} is not divisible among the {pictures} pictures of an image: "
                f"{near or pictures} is"
            )
        b = Builder(view, view.after(view.maker(scores)))
        chosen = best(b, scores, left // pictures)
        return chosen if pictures == 1 else _joined(view, chosen, images, left)


def _joined(view: View, chosen: Value, images: ImageTokens, left: int) -> Value:
    """Places in each picture ``[rows x pictures, left / pictures]`` as places in the image."""
    b = Builder(view, view.after(view.maker(chosen)))
    each = left // images.pictures
    apart = b.reshape(chosen, -1, images.pictures, each)
    total = images.pictures * images.patches
    first = b.arange(0, total, images.patches, dtype=torch.int64)
    return b.reshape(b.add(apart, b.unsqueeze(first, dims=(0, 2))), -1, left)


def same_for_all(view: View, images: ImageTokens, places: list[int], name: str) -> Value:
    """The same places in every row: i64 ``[rows, len(places)]``."""
    b = Builder(view, view.after(view.maker(images.merged)))
    table = view.add_weight(name, MemoryWeight(torch.tensor([places])))
    # Zeros of one column, as many as there are rows.
    rows = b.cast(b.slice(images.placeholders, 0, 1, dim=1), dtype=torch.int64)
    return b.add(b.mul(rows, 0), table)
