"""``quota``: frames of a video get tokens by what a second model says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.moves.selection import best
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.cache_slots import RELEVANCE
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
from ...ir.vocab.builder import Builder
from .raster import tokens_of
from .token_pass import KeepPass, behind

PIXELS = "pixel_values"
LEAST = 1e-6
"""The weight, of the largest, of a frame that says nothing: it gets tokens when others have all."""
STEP = 1e-3
"""Of equal frames the first gets the next token: so much of a place lies between first and last."""


@dataclass(frozen=True, kw_only=True)
class Quota(KeepPass):
    """Share ``keep`` tokens among the frames of a video by their relevance to the question.

    QuoTA (Luo et al. 2025, arXiv 2503.08689). The graph takes one input more, ``frame_relevance``
    f32 ``[videos, frames]``: for each frame the probability that a second, small model answers a
    yes-or-no question about it with yes. That model runs on the host, before this one, and costs
    what it costs, one call for each frame: nothing of it is in the graph, and without the input all
    frames count alike. A frame's weight is ``w = p^power`` (the paper's 2), its share of the tokens
    w by the sum. The total is fixed, so that shapes are static: the token that is ``r``-th in its
    frame has the key ``(r + .5) / w``, and those with the least keys go on (Webster's divisors).
    No frame gets more than it has; what is left goes to the others. In a frame the first is in the
    middle and the next always the farthest from those before, so that any number of them is spread
    evenly. Tokens are picked, the paper's third way to compress a frame; it averages by default.
    Thumbnail and crops, where an image comes as these, are frames as well.
    """

    name: ClassVar[str] = "quota"
    positions: ClassVar[Positions] = "renumbered"
    power: float = 2.0
    """Of the probabilities: higher is more selective."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.power <= 16:
            raise BadInput(f"quota: power={self.power:g} must be from 0 to 16")

    def check(self, images: ImageTokens) -> None:
        images.check_patches()
        images.check_whole("put quota first")
        if images.pictures < 2:
            raise Refusal(
                "an image is one picture here, and no video whose frames could share tokens"
            )
        if images.grid is None:
            raise Refusal("no grid of patches is seen, over which tokens could be spread")

    def choose(self, view: View, structure: Structure, images: ImageTokens, left: int) -> Value:
        assert images.grid is not None
        relevance = _relevance(view, images.pictures)
        b = behind(view, images.features)
        # Against the largest, as probabilities are squared that may all be small.
        most = b.clamp(b.amax(relevance, dims=(1,), keepdim=True), min=1e-12)
        share = b.clamp(b.div(relevance, most), min=0.0)
        weights = b.clamp(b.pow(share, self.power), min=LEAST)
        order = spread(*images.grid).float() + 0.5
        later = torch.arange(images.pictures)[:, None] * (STEP / images.pictures)
        table = view.add_weight("quota.places", MemoryWeight(1 / (order + later)[None]))
        keys = b.mul(b.unsqueeze(weights, dims=(2,)), table)
        rows = b.reshape(keys, -1, images.pictures * images.patches)
        return tokens_of(b, images, best(b, rows, left - images.newlines), left)


def _relevance(view: View, frames: int) -> Value:
    """The new input of the graph."""
    named = dict(zip(view.input_names(), view.inputs(), strict=True))
    pixels = named.get(PIXELS)
    shape = () if pixels is None else view.type(pixels).shape or ()
    if pixels is None or len(shape) != 5 or shape[1] != frames:
        raise Refusal(f"videos come as {PIXELS} [videos, {frames}, 3, height, width] where frames "
                      "are to be told apart")  # fmt: skip
    b = Builder(view, next(iter(view.nodes())))
    like = b.mean(pixels, dims=(2, 3, 4), keepdim=False)
    view.type(like)
    value = view.add_input(RELEVANCE, like)
    view.erase_dead(view.maker(like))
    return value


def spread(rows: int, columns: int) -> torch.Tensor:
    """For each place of a grid when it is taken, i64 ``[rows * columns]``: the middle first, then
    always the one that is farthest from all before."""
    line = torch.arange(rows * columns)
    places = torch.stack([line // columns, line % columns], 1).double()
    middle = torch.tensor([(rows - 1) / 2, (columns - 1) / 2], dtype=torch.float64)
    at = int((places - middle).square().sum(1).argmin())
    order = torch.empty_like(line)
    nearest = torch.full((len(line),), torch.inf, dtype=torch.float64)
    for turn in range(len(line)):
        order[at] = turn
        nearest = torch.minimum(nearest, (places - places[at]).square().sum(1))
        nearest[at] = -1
        at = int(nearest.argmax())
    return order
