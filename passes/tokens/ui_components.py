"""``ui-components``: of neighbouring patches that are equal a few stand for all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens
from ...ir.vocab.builder import Builder
from .token_pass import ScoredTokens


@dataclass(frozen=True, kw_only=True)
class UiComponents(ScoredTokens):
    """Prune image tokens before the language model so that each area of one look keeps some.

    ShowUI (Lin et al. 2024, arXiv 2411.17465), for screenshots: patches above or beside each other
    whose pixels are equal, or ``within`` that L2 distance as the model sees them, belong to one
    component. ShowUI keeps a share of each by chance, so many tokens as the picture has components;
    a graph has a fixed number: every component keeps one token before any keeps a second one, in a
    fixed order by chance (``seed``). On photographs, where no two patches are equal, this is
    ``random-tokens``. It needs neither attention nor text; where an image comes as several
    pictures, each keeps the same number.

    The components come of ``log2(patches)`` squarings of the patches' links: ``patches³`` MACs
    each.
    """

    name: ClassVar[str] = "ui-components"
    positions: ClassVar[Positions] = "renumbered"
    within: float = 0.0
    """L2 distance of the pixels of equal patches."""
    seed: int = 0
    """Of the order in which patches are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.within >= 0:
            raise BadInput(f"ui-components: within={self.within:g} must be at least 0")

    def check(self, images: ImageTokens) -> None:
        if images.grid is None:
            raise Refusal("no convolution makes the patches, so their neighbours are not known")
        images.check_whole("components are of all patches")
        images.check_single()
        images.check_patches()

    def score(self, view: View, structure: Structure, images: ImageTokens) -> Value:
        assert images.grid is not None
        pixels = _pixels(view, images.grid)
        b = Builder(view, view.after(view.maker(images.features)))
        linked = _linked(b, _patches(b, pixels, images.grid), images.grid, self.within)
        for _ in range(math.ceil(math.log2(images.patches))):
            linked = b.cast(b.gt(b.matmul(linked, linked), 0.5), dtype=torch.float32)
        turn = torch.randperm(images.patches, generator=torch.Generator().manual_seed(self.seed))
        earlier = (turn[None] < turn[:, None]).float()
        table = view.add_weight("ui_components.earlier", MemoryWeight(earlier))
        place = b.sum(b.mul(linked, table), dims=(2,), keepdim=False)
        order = view.add_weight("ui_components.turn", MemoryWeight(turn.float()))
        return b.neg(b.add(b.mul(place, float(images.patches)), order))


def _pixels(view: View, grid: tuple[int, int]) -> Value:
    """What the convolution over pictures that makes the patches reads."""
    for node in view.nodes():
        if view.op(node) == "conv" and (view.type(view.result(node)).shape or ())[2:] == grid:
            return view.tensor(node)
    raise Refusal("no convolution makes the patches")


def _patches(b: Builder, pixels: Value, grid: tuple[int, int]) -> Value:
    """Pixels by patch, f32 ``[pictures, patches, numbers]``."""
    shape = b.view.type(pixels).shape or ()
    rows, columns = grid
    channels, high, wide = shape[1:]
    if not (isinstance(channels, int) and isinstance(high, int) and isinstance(wide, int)):
        raise Refusal("the size of a picture is not fixed")
    if high % rows or wide % columns:
        raise Refusal(f"{high} x {wide} pixels are not a whole number of patches of {grid}")
    apart = b.reshape(pixels, -1, channels, rows, high // rows, columns, wide // columns)
    turned = b.transpose(apart, perm=(0, 2, 4, 1, 3, 5))
    flat = b.reshape(turned, -1, rows * columns, channels * high * wide // (rows * columns))
    return b.cast(flat, dtype=torch.float32)


def _linked(b: Builder, patches: Value, grid: tuple[int, int], within: float) -> Value:
    """1 for each patch with itself and with an equal neighbour, f32 ``[pictures, n, n]``."""
    rows, columns = grid
    places = torch.arange(rows * columns).reshape(rows, columns)
    first = torch.cat([places[:, :-1].flatten(), places[:-1].flatten()])
    second = torch.cat([places[:, 1:].flatten(), places[1:].flatten()])
    ends = [b.view.add_weight(f"ui_components.{name}", MemoryWeight(index))
            for name, index in (("first", first), ("second", second))]  # fmt: skip
    apart = b.sub(*(b.index_select(patches, index, dim=1) for index in ends))
    distance = b.sum(b.mul(apart, apart), dims=(2,), keepdim=False)
    equal = b.cast(b.le(distance, within**2), dtype=torch.float32)
    # Behind the pairs of neighbours stand 0, for any other pair, and 1, for a patch with itself.
    zero = b.mul(b.slice(equal, 0, 1, dim=1), 0.0)
    entries = b.concat(equal, zero, b.add(zero, 1.0), dim=1)
    number = torch.full((rows * columns, rows * columns), len(first))
    number.fill_diagonal_(len(first) + 1)
    pairs = torch.arange(len(first))
    number[first, second], number[second, first] = pairs, pairs
    table = b.view.add_weight("ui_components.pairs", MemoryWeight(number.flatten()))
    flat = b.index_select(entries, table, dim=1)
    return b.reshape(flat, -1, rows * columns, rows * columns)
