"""What passes over the frames of a video share: the text reads what is made of all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.core.errors import Refusal
from ...ir.core.view import Value, View
from ...ir.moves.mixed_rows import mixed_rows
from ...ir.moves.shrink_dim import Positions
from ...ir.moves.upstream import redirect
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens, find_image_tokens
from ...ir.vocab import END
from ...ir.vocab.builder import Builder
from .token_pass import Cut, TokenPass, same_for_all


@dataclass(frozen=True, kw_only=True)
class FramePass(TokenPass):
    """Base of the passes after which the text reads fewer tokens, made of those of all frames.

    The pictures of an image are its frames, in their order. The graph still takes prompts with a
    placeholder for every token of every frame; the new tokens stand in the first of these.
    """

    positions: ClassVar[Positions] = "renumbered"
    remakes: ClassVar[bool] = True

    @abstractmethod
    def count(self, images: ImageTokens) -> int:
        """The tokens that a video becomes; all of its own where nothing is to be done. Raises
        ``Refusal`` for options that the frames do not fit."""

    @abstractmethod
    def remade(self, view: View, images: ImageTokens) -> Value:
        """These tokens, ``[videos, count, width]``."""

    def cuts(self, view: View, structure: Structure) -> Sequence[Cut]:
        images = find_image_tokens(view, structure)
        images.check_whole(f"put {self.name} first")
        if images.layout and images.pictures > 1:
            raise Refusal(
                "the pictures of an image enter the text as one raster with newlines, as thumbnail "
                "and crops do, and not one after another, as frames of a video: globalcom2, quota, "
                "fastervlm, diverse and others choose among their patches"
            )
        images.check_apart()
        if images.pictures < 2:
            raise Refusal(
                "an image is one picture here, and no video: fastervlm, diverse and others prune "
                "the tokens of one"
            )
        return [Cut(0, images.count, self.count(images))]

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        remade = self.remade(view, images)
        width = (view.type(images.features).shape or ())[-1]
        b = Builder(view, view.after(view.maker(remade)))
        # As many rows as there are placeholders; nobody reads those behind the last token.
        others = b.slice(b.reshape(images.features, -1, images.count, width), left, END, dim=1)
        whole = b.concat(remade, others, dim=1)
        shape = view.type(images.features).shape or ()
        if shape[1:2] != (images.count,):
            whole = b.reshape(whole, -1, *shape[1:])
        redirect(view, images.features, whole)
        return same_for_all(view, images, list(range(left)), f"{self.name}.first")


def by_video(view: View, images: ImageTokens) -> Value:
    """The projected features of each frame, ``[videos, frames, patches, width]``."""
    width = (view.type(images.features).shape or ())[-1]
    b = Builder(view, view.after(view.maker(images.features)))
    return b.reshape(images.features, -1, images.pictures, images.patches, width)


def even(total: int, count: int) -> list[int]:
    """``count`` of ``total`` places at even distances, the first and the last among them."""
    return torch.linspace(0, total - 1, count, dtype=torch.float64).round().long().tolist()


def checked_fewer(images: ImageTokens, count: int, advice: str) -> int:
    """``count``; ``Refusal`` where it is none, or as many as a video has."""
    if not 0 < count < images.count:
        raise Refusal(
            f"{count} tokens would come of a video's {images.count}, and at least 1 and fewer are "
            f"to: {advice}"
        )
    return count


def pooling(size: int, left: int) -> torch.Tensor:
    """Adaptive average pooling of a line, ``[left, size]``."""
    return torch.nn.functional.adaptive_avg_pool1d(torch.eye(size)[None], left)[0].T.contiguous()


def pooled_grid(
    b: Builder, x: Value, grid: tuple[int, int], left: tuple[int, int], name: str
) -> Value:
    """Patches ``[.., patches, width]`` averaged to another grid of them."""
    if grid == left:
        return x
    table = torch.kron(pooling(grid[0], left[0]), pooling(grid[1], left[1]))
    return mixed_rows(b, x, table, name)
