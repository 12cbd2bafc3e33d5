"""``keep-entropy``: scale attention so that fewer tokens share it as many did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import View
from ...ir.structure.recognize import Attention, Structure
from ...ir.structure.vision import find_image_tokens
from ..base import TOKENS, Context, Pass, PassResult, Site


@dataclass(frozen=True, kw_only=True)
class KeepEntropy(Pass):
    """Scale the logits of attention in every block that sees fewer tokens than it was trained on.

    Jin et al. 2023 (arXiv 2306.08645), of images of other sizes: the entropy of attention grows
    with the logarithm of the number ``n`` of tokens, and keeps what it was at ``N`` tokens if
    logits are multiplied by ``sqrt(log n / log N)``. Here ``N`` counts an image's tokens and
    ``text`` more, ``n`` those of the image that come to the block and ``text``: one constant a
    block, below 1 behind a cut. Queries before the image see as many tokens as ever and are scaled
    too. A decoding step has the scale of its prompt.
    """

    name: ClassVar[str] = "keep-entropy"
    exact: ClassVar[bool] = False
    follows: ClassVar[tuple[str, ...]] = (TOKENS,)
    text: int = 16
    """Tokens of a prompt beside the image's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text < 2:
            raise BadInput(f"keep-entropy: text={self.text} must be at least 2")

    def run(self, context: Context) -> PassResult:
        scaled, result = self._survey(context)
        with context.view.made_by(self.name, context.step):
            for site, factor in scaled:
                _scale(context.view, site, factor)
        context.edited()
        return result

    def plan(self, context: Context) -> PassResult:
        return self._survey(context)[1]

    def _survey(self, context: Context) -> tuple[list[tuple[Attention, float]], PassResult]:
        view, structure = context.view, context.structure
        result, scaled = PassResult(), []
        try:
            counts = _counts(view, structure)
        except Refusal as refusal:
            raise BadInput(f"keep-entropy: {refusal}") from None
        whole = counts[0][1] + self.text
        for index, _, count in counts:
            factor = math.sqrt(math.log(count + self.text) / math.log(whole))
            sites = [site for site in structure.attentions if site.block == index]
            if count + self.text == whole or not sites:
                continue
            scaled += [(site, factor) for site in sites]
            result.sites.append(
                Site(name=f"attention of block {index}", kind="scale",
                     shape=(whole, count + self.text), bytes_before=0, bytes_after=0)
            )  # fmt: skip
            result.notes.append(f"logits of block {index} times {factor:.3f}")
        return scaled, result


def _counts(view: View, structure: Structure) -> list[tuple[int, int, int]]:
    """Of each block of the language model its index among all blocks, the image's tokens, and
    those that come there."""
    first = find_image_tokens(view, structure)
    return [
        (block.index, first.tokens, find_image_tokens(view, structure, number).count)
        for number, block in enumerate(first.language)
    ]


def _scale(view: View, site: Attention, factor: float) -> None:
    node, attrs = site.node, view.attrs(site.node)
    width = (view.type(view.tensor(node, 0)).shape or (None,))[-1]
    scale = attrs["scale"]
    if scale is None:
        assert isinstance(width, int)
        scale = 1 / math.sqrt(width)
    new = view.build(
        "sdpa", list(view.operands(node)), {**attrs, "scale": scale * factor}, before=node
    )
    view.replace(view.result(node), new)
    view.erase_dead(node)
