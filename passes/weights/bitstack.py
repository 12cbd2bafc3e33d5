"""``bitstack``: weights as stacks of blocks, of which any number of leading ones can be loaded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Node
from ...ir.core.weights import StackedWeight, Weight
from ...ir.moves import swap
from ...ir.ops.bitstack_blocks import block_name
from ...ir.run.statistics import Moments, moments, token_masks
from ...ir.run.sweep import sweep_together
from ...ir.structure.recognize import Linear
from ..base import STORED, Context, Needs, Pass, PassResult, Site, select_linears
from .bitstack_decomposition import (
    block_bytes,
    decompose,
    default_rank,
    highest_rank,
    input_scale,
    universal_order,
)
from .nbit_pass import reason_against

PARTS = ("signs", "factors")
MOST_BLOCKS = 64


@dataclass
class _Kept:
    """The stack of one matrix, its tensors put away."""

    site: str
    shape: tuple[int, int]
    rank: int
    energies: Sequence[float]
    rel_l2: float
    parts: dict[str, list[Weight]]

    @property
    def block_bytes(self) -> int:
        return block_bytes(*self.shape, self.rank)


@dataclass(frozen=True, kw_only=True)
class BitStack(Pass):
    """Swap linears for ``linear_bitstack``: residual blocks of one bit a weight and small factors.

    BitStack (Wang et al. 2024, arXiv 2410.23918): columns are scaled by the root mean square of
    their input (``scaling=activations``, from calibration data; ``scaling=none`` needs none), and
    each of ``blocks`` residuals is stored as its signs and a rank-``rank`` factorisation of its
    magnitudes. ``rank`` is chosen for each matrix unless given, such that the factors take about an
    eighth of a bit for each weight (16 for 4096 x 4096). The blocks of all sites are put into one
    order, and an artifact holds them in it: ``gw.load(OUT, max_bytes=N)`` reads as many as fit.
    ``include``, ``exclude``, ``kinds`` and ``min_size`` choose sites. A rank whose factors outgrow
    the matrix is refused.
    """

    name: ClassVar[str] = "bitstack"
    exact: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(calibration=True)
    provides: ClassVar[tuple[str, ...]] = (STORED,)
    excludes: ClassVar[tuple[str, ...]] = (STORED,)
    blocks: int = 8
    rank: int | None = None
    scaling: Literal["activations", "none"] = "activations"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    min_size: int = 0
    weights_per_second: ClassVar[float] = 2e7
    """Matrix entries put into one block a second on one core of the reference CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.blocks <= MOST_BLOCKS:
            raise BadInput(f"{self.name}: blocks={self.blocks} must be 1 to {MOST_BLOCKS}")
        if self.rank is not None and self.rank < 1:
            raise BadInput(f"{self.name}: rank={self.rank} must be 1 or more")
        if self.min_size < 0:
            raise BadInput(f"{self.name}: min_size={self.min_size} must not be negative")

    def requires(self) -> Needs:
        return self.needs if self.scaling == "activations" else Needs()

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        chosen = self._choose(context, result)
        squares = self._squares(context, chosen)
        kept: dict[Hashable, _Kept] = {}
        for done, linear in enumerate(chosen):
            context.progress(f"{self.name}: {linear.name}", done, len(chosen))
            weight = _weight(context, linear)
            if weight.key not in kept:
                kept[weight.key] = self._stack(context, linear, weight, squares)
        stacked = _in_order(list(kept.values()))
        for linear in chosen:
            weight = _weight(context, linear)
            found = kept[weight.key]
            self._replace(context, linear, weight, found, stacked[found.site], result)
        result.notes += _notes(list(kept.values()), self.blocks)
        context.edited()
        return result

    def plan(self, context: Context) -> PassResult:
        result = PassResult()
        for linear in self._choose(context, result):
            size = self.blocks * block_bytes(*_shape(linear), self._rank(linear))
            result.sites.append(_site(linear, _weight(context, linear), size, None))
        return result

    def seconds(self, planned: PassResult) -> float:
        entries = sum(s.shape[0] * s.shape[1] for s in planned.sites)
        return self.blocks * entries / self.weights_per_second

    def peak_bytes(self, planned: PassResult) -> int:
        return max((s.shape[0] * s.shape[1] for s in planned.sites), default=0) * 4 * 8

    def _choose(self, context: Context, result: PassResult) -> list[Linear]:
        chosen = []
        for linear in select_linears(
            context.structure.linears,
            include=self.include, exclude=self.exclude, kinds=self.kinds, min_size=self.min_size,
        ):  # fmt: skip
            reason = reason_against(context.view, linear)
            if reason is None:
                self._rank(linear)
                chosen.append(linear)
            else:
                result.refused.append((linear.name, reason))
        return chosen

    def _rank(self, linear: Linear) -> int:
        if self.rank is None:
            return default_rank(*_shape(linear))
        most = highest_rank(*_shape(linear))
        if self.rank > most:
            m, n = _shape(linear)
            raise BadInput(
                f"{self.name}: rank={self.rank} is too high for {linear.name} ({m} x {n}): the "
                f"factors of one block would take more than the whole matrix; give {most} or less, "
                "or leave small matrices out with min_size="
            )
        return self.rank

    def _squares(self, context: Context, chosen: Sequence[Linear]) -> dict[Hashable, Moments]:
        """Sums of squares of the inputs that each weight multiplies, on the graph as it is."""
        if self.scaling == "none" or not chosen:
            return {}
        view, masks = context.view, token_masks(context.calibration)
        keys = {linear.node: _weight(context, linear).key for linear in chosen}
        found: dict[Hashable, Moments] = {}

        def visit(node: Node, given: list[list[Any]], results: list[tuple[Any, ...]]) -> None:
            context.progress(f"{self.name}: activations", len(found), len(chosen))
            index = view.arguments(node).index(view.operands(node)[0])
            seen = moments([row[index] for row in given], masks, ("square",))
            before = found.setdefault(keys[node], seen)
            if before is not seen:
                assert before.squares is not None and seen.squares is not None
                before.squares += seen.squares
                before.count += seen.count

        sweep_together(view, context.calibration, visit, frozenset(keys), outputs=False)
        return found

    def _stack(
        self, context: Context, linear: Linear, weight: Weight, squares: dict[Hashable, Moments]
    ) -> _Kept:
        rank = self._rank(linear)
        scale = torch.ones(linear.in_features, dtype=torch.float64)
        if weight.key in squares:
            known = squares[weight.key]
            assert known.squares is not None
            scale = input_scale(known.squares, known.count)

        def stack() -> dict[str, Any]:
            return vars(
                decompose(weight.read(), scale, blocks=self.blocks, rank=rank, name=linear.name)
            )

        made = context.once(f"site {linear.name}", stack)
        parts = {p: [context.spool.store(t) for t in made[p]] for p in PARTS}
        return _Kept(linear.name, _shape(linear), rank, made["energies"], made["rel_l2"], parts)

    def _replace(
        self, context: Context, linear: Linear, weight: Weight, found: _Kept,
        stacked: dict[str, StackedWeight], result: PassResult,
    ) -> None:  # fmt: skip
        # A linear that feeds this one directly may have been swapped since the sites were chosen.
        current = replace(linear, x=context.view.operands(linear.node)[0])
        attrs = {"in_features": linear.in_features, "out_features": linear.out_features}
        operands = [(part, stacked[part]) for part in PARTS]
        try:
            swap(
                context.view, current, "linear_bitstack", operands, attrs,
                rule=self.name, step=context.step,
            )  # fmt: skip
        except Refusal as refusal:
            result.refused.append((linear.name, str(refusal)))
            return
        size = self.blocks * found.block_bytes
        result.sites.append(_site(linear, weight, size, found.rel_l2))


def _in_order(kept: Sequence[_Kept]) -> dict[str, dict[str, StackedWeight]]:
    """The stacked operands of each site, their blocks named by their places in the order."""
    order = universal_order(
        {k.site: k.energies for k in kept}, {k.site: k.block_bytes for k in kept}
    )
    places: dict[str, list[int]] = {k.site: [] for k in kept}
    for place, (site, _) in enumerate(order):
        places[site].append(place)
    return {
        k.site: {
            part: StackedWeight(
                handles, [block_name(place, part) for place in places[k.site]]
            )
            for part, handles in k.parts.items()
        }
        for k in kept
    }


def _notes(kept: Sequence[_Kept], blocks: int) -> list[str]:
    least = sum(k.block_bytes for k in kept)
    return [f"stacked weights of any size from {least} to {least * blocks} bytes"] if kept else []


def _weight(context: Context, linear: Linear) -> Weight:
    weight = context.view.weight(linear.weight)
    assert weight is not None
    return weight


def _shape(linear: Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _site(linear: Linear, weight: Weight, size: int, error: float | None) -> Site:
    return Site(
        name=linear.name,
        kind=linear.role or "linear",
        shape=_shape(linear),
        bytes_before=weight.nbytes,
        bytes_after=size,
        bits_per_weight=8 * size / weight.numel,
        rel_l2=error,
    )
