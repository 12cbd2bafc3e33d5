"""``vispruner``: the patches that CLS looks at, and of the others those that differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput
from ...ir.core.view import Value, View
from ...ir.moves.matching import directions
from ...ir.moves.selection import ascending, top_places
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
from ...ir.vocab import END
from ...ir.vocab.builder import Builder
from .fastervlm import check_cls, cls_row
from .token_pass import KeepPass, behind, in_image, shared

AT_ONCE = 8
"""Patches that leave in one step, of the authors' code."""


@dataclass(frozen=True, kw_only=True)
class VisPruner(KeepPass):
    """Prune image tokens before the language model: half by CLS attention, half by difference.

    FasterVLM's successor, by its authors (Zhang et al. 2024, arXiv 2412.01818, from its second
    version on). A share ``important`` of the kept tokens are those that ``fastervlm`` keeps. The
    others begin in the order of their CLS scores; then, eight at a time, of every second one those
    leave that are most like one of the rest (cosine of the tower's features), what stays of them
    stands by falling likeness before the rest, and so on until as many are left as are to be kept.
    ``important=1`` is ``fastervlm``. Where an image comes as several pictures, each keeps the same
    number. A tower without a CLS token is refused.
    """

    name: ClassVar[str] = "vispruner"
    positions: ClassVar[Positions] = "renumbered"
    important: float = 0.5
    """Of the kept tokens the share chosen by CLS."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise BadInput(f"vispruner: important={self.important:g} must be from 0 to 1")

    def check(self, images: ImageTokens) -> None:
        check_cls(images)
        images.check_single()

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        scores, features = cls_row(view, images.attention), images.tower[-1].exit
        each, b = shared(images, left), behind(view, scores, features)
        ranked = b.topk(scores, k=images.patches, dim=1, largest=True, sorted=True)
        order, important = top_places(b, ranked), int(each * self.important)
        chosen = b.slice(order, 0, each, dim=1)
        if important < each:
            unit = directions(b, b.slice(features, 1, END, dim=1))
            others = b.slice(order, important, END, dim=1)
            others = _thinned(b, unit, others, images.patches - important, each - important)
            chosen = others
            if important:
                chosen = b.concat(b.slice(order, 0, important, dim=1), others, dim=1)
        return in_image(view, ascending(b, chosen, each), images, left)


def _thinned(b: Builder, unit: Value, places: Value, count: int, left: int) -> Value:
    """Of ``count`` places i64 ``[rows, count]`` the ``left`` that stay; ``unit`` are directions of
    all patches, ``[rows, patches, width]``."""
    while count > left:
        even = count - count // 2
        gone = min(AT_ONCE, count - left, even)
        vectors = b.token_select(unit, places)
        sources = b.slice(vectors, 0, END, dim=1, step=2)
        targets = b.slice(vectors, 1, END, dim=1, step=2)
        alike = b.matmul(sources, b.transpose(targets, perm=(0, 2, 1)))
        closest = b.amax(alike, dims=(2,), keepdim=False)
        ranked = top_places(b, b.topk(closest, k=even, dim=1, largest=True, sorted=True))
        evens = b.slice(places, 0, END, dim=1, step=2)
        odds = b.slice(places, 1, END, dim=1, step=2)
        staying = b.token_select(evens, b.slice(ranked, gone, END, dim=1))
        places, count = b.concat(staying, odds, dim=1), count - gone
    return places
