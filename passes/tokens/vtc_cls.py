"""``vtc-cls``: keep the patches that the CLS token looks at over several late layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
from .fastervlm import ClsScoredTokens, cls_row
from .token_pass import behind, by_token


@dataclass(frozen=True, kw_only=True)
class VTCCLS(ClsScoredTokens):
    """Prune image tokens before the language model, by CLS attention over the tower's last layers.

    VTC-CLS (Wang et al. 2024, arXiv 2412.05819): the score of a patch is the sum of what the CLS
    query pays to it in each of the ``layers`` layers up to the one that makes the features, so that
    no single layer's noise decides. Otherwise as ``fastervlm``, which is ``layers=1``.
    """

    name: ClassVar[str] = "vtc-cls"
    layers: int = 7
    """The last layers of the tower whose attention is summed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise BadInput(f"vtc-cls: layers={self.layers} must be at least 1")

    def check(self, images: ImageTokens) -> None:
        super().check(images)
        if self.layers > len(images.tower):
            raise Refusal(f"layers={self.layers}: the vision tower has {len(images.tower)} layers")

    def score(self, view: View, structure: Structure, images: ImageTokens) -> Value:
        late = images.tower[-self.layers :]
        rows = [cls_row(view, structure.attentions[block.attentions[-1]]) for block in late]
        total = rows[0]
        for row in rows[1:]:
            total = behind(view, total, row).add(total, row)
        return by_token(view, images, total)
