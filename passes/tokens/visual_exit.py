"""``visual-exit``: no image token goes on from a block of the language model; ``no-image``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens, find_image_tokens
from .token_pass import Cut, TokenPass


@dataclass(frozen=True, kw_only=True)
class AllLeave(TokenPass):
    """Base of the passes that keep no image token."""

    def leave(self, view: View, structure: Structure, block: int) -> Sequence[Cut]:
        images = find_image_tokens(view, structure, block)
        if block >= len(images.language):
            raise Refusal(
                f"layer={block}: the language model has the blocks 0 to {len(images.language) - 1}"
            )
        if not images.count:
            raise Refusal("all image tokens left before already")
        return [Cut(block, images.count, 0)]

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        raise Refusal("no image token is kept, so none is chosen")


@dataclass(frozen=True, kw_only=True)
class VisualExit(AllLeave):
    """Drop all image tokens before block ``layer``: by then the text has taken them in.

    The training-free form of DyVTE (Wu et al. 2024, arXiv 2411.19628), whose router, which chooses
    the layer for each prompt, is trained: here it is the same for all. Tokens that stay keep their
    positions; blocks from ``layer`` on hold no image in their cache. Which layer will do is a
    matter of the model: measure it (``optimize-model compare-tokens``).
    """

    name: ClassVar[str] = "visual-exit"
    positions: ClassVar[Positions] = "kept"
    layer: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise BadInput(
                f"visual-exit: layer={self.layer} must be at least 1: without any layer that sees "
                "the image the answer is blind, which is no-image"
            )

    def cuts(self, view: View, structure: Structure) -> Sequence[Cut]:
        return self.leave(view, structure, self.layer)


@dataclass(frozen=True, kw_only=True)
class NoImage(AllLeave):
    """Drop all image tokens before the language model: what it then answers, it answers blind.

    The baseline of every question about an image; what a model says without looking, it takes from
    the words (as studies of language bias in VQA find, e.g. arXiv 1612.00837).
    """

    name: ClassVar[str] = "no-image"
    positions: ClassVar[Positions] = "renumbered"

    def cuts(self, view: View, structure: Structure) -> Sequence[Cut]:
        return self.leave(view, structure, 0)
