"""``intp-video``: rotary positions of the language model for more frames than it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.moves.upstream import upstream
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import find_image_tokens
from ..base import Context, Pass, PassResult, Site


@dataclass(frozen=True, kw_only=True)
class INTPVideo(Pass):
    """Let the language model's rotary positions reach ``factor`` times as far.

    INTP-Video-LLM (Shang et al. 2024, arXiv 2409.12963): a video of more frames has more tokens
    than the model was trained on, and positions that it has never seen. ``scaling=ntk`` divides
    frequency ``i`` of ``m`` by ``factor^(i / (m - 1))``: near tokens keep their distances, and only
    the slowest waves are stretched by ``factor``; ``linear`` divides all of them by it, as
    interpolated positions do (arXiv 2306.15595). Words are stretched as well. The paper's order of
    frames for encoders of several at once is nothing to a tower that sees one at a time.

    The graph says how many frames it takes: of a LLaVA folder ``image_seq_length`` in
    ``config.json`` does, frames times patches. ``factor`` is that number by the trained one.
    """

    name: ClassVar[str] = "intp-video"
    exact: ClassVar[bool] = False
    factor: float
    """Frames here by frames trained on, as 2."""
    scaling: Literal["ntk", "linear"] = "ntk"
    """Which frequencies are stretched."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.factor <= 1000:
            raise BadInput(f"intp-video: factor={self.factor:g} must be from 1 to 1000")

    def run(self, context: Context) -> PassResult:
        frequencies, result = self._survey(context)
        if self.factor == 1:
            return result
        with context.view.made_by(self.name, context.step):
            for value in frequencies:
                self._stretch(context.view, value)
        context.edited()
        return result

    def plan(self, context: Context) -> PassResult:
        return self._survey(context)[1]

    def _survey(self, context: Context) -> tuple[list[Value], PassResult]:
        view = context.view
        try:
            frequencies = rotary_frequencies(view, context.structure)
        except Refusal as refusal:
            raise BadInput(f"intp-video: {refusal}") from None
        result = PassResult()
        for value in frequencies:
            count = view.type(value).numel or 0
            result.sites.append(
                Site(name=view.name(value), kind="frequencies", shape=(count,), bytes_before=0,
                     bytes_after=0)
            )  # fmt: skip
        result.notes.append(
            f"rotary positions reach {self.factor:g} times as far"
            if self.factor > 1
            else "factor=1: the graph stays as it is"
        )
        return frequencies, result

    def _stretch(self, view: View, value: Value) -> None:
        weight = view.weight(value)
        assert weight is not None
        old = weight.read()
        line = torch.arange(old.numel(), dtype=torch.float64) / max(1, old.numel() - 1)
        power = line if self.scaling == "ntk" else torch.ones_like(line)
        new = old.double() / (self.factor**power).reshape(old.shape)
        view.set_weight(value, MemoryWeight(new.to(old.dtype)))


def rotary_frequencies(view: View, structure: Structure) -> list[Value]:
    """The constants that positions of the language model are multiplied by before sine and cosine.

    Raises ``Refusal`` where the model has no images, and where there are none.
    """
    images = find_image_tokens(view, structure)
    of_images = upstream(view, images.features)
    chosen: dict[Value, None] = {}
    for node in view.nodes():
        if view.op(node) not in ("cos", "sin") or node in of_images:
            continue
        for maker in (node, *upstream(view, *view.arguments(node))):
            chosen.update((v, None) for v in view.arguments(maker) if _is_frequencies(view, v))
    if not chosen:
        raise Refusal(
            "no rotary positions are seen in the language model, whose frequencies are constants: "
            "there is nothing to rescale"
        )
    return list(chosen)


def _is_frequencies(view: View, value: Value) -> bool:
    """Whether a constant is a line of floats that fall from 1."""
    weight = view.weight(value)
    if weight is None or not weight.dtype.is_floating_point:
        return False
    if weight.numel < 2 or weight.numel != max(weight.shape):
        return False
    numbers = weight.read().flatten()
    return bool(numbers[0] > 0.5 and (numbers.diff() < 0).all() and (numbers > 0).all())
