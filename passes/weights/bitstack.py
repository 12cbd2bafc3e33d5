"""``bitstack``: weights as stacks of blocks, of which any number of leading ones can be loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.joined_weights import StackedWeight
from ...ir.core.view import View
from ...ir.core.weights import Weight
from ...ir.moves import swap
from ...ir.ops.bitstack_blocks import block_name
from ...ir.run.statistics import Square, Stat, Statistics
from ...ir.structure.recognize import Linear
from ..base import CHANGED, STORED, Context, Needs, PassResult, Site
from ..linear_pass import LinearPass, linear_site, weight_of
from ..stored import reason_against_storing
from .bitstack_decomposition import (
    block_bytes,
    decompose,
    default_rank,
    highest_rank,
    input_scale,
)
from .bitstack_order import Order, Stacked, by_levels, by_perplexity, check_predicts

PARTS = ("signs", "factors")
MOST_BLOCKS = 64


@dataclass
class _Stack:
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
class BitStack(LinearPass):
    """Swap linears for ``linear_bitstack``: residual blocks of one bit a weight and small factors.

    BitStack (Wang et al. 2024, arXiv 2410.23918): columns are scaled by the root mean square of
    their input (``scaling=activations``, from calibration data; ``scaling=none`` needs none), and
    each of ``blocks`` residuals is stored as its signs and a rank-``rank`` factorisation of its
    magnitudes. ``rank`` is chosen for each matrix unless given, such that the factors take about an
    eighth of a bit for each weight (16 for 4096 x 4096). The blocks of all sites are put into one
    order, and an artifact holds them in it: ``gw.load(OUT, max_bytes=N)`` reads as many as fit. The
    order goes level by level; within a level by the energy that is left over (``order=levels``), or
    by measured perplexity as in the paper (``order=perplexity``: ``blocks - 1`` sweeps a site).
    ``include``, ``exclude``, ``kinds`` and ``min_size`` choose sites. A rank whose factors outgrow
    the matrix is refused.
    """

    name: ClassVar[str] = "bitstack"
    needs: ClassVar[Needs] = Needs(stats=(Stat("square", at="linear"),))
    provides: ClassVar[tuple[str, ...]] = (STORED, CHANGED)
    excludes: ClassVar[tuple[str, ...]] = (STORED,)
    blocks: int = 8
    """Most blocks of one bit a weight at a site."""
    rank: int | None = None
    """Of a block's magnitudes; by the matrix's size."""
    scaling: Literal["activations", "none"] = "activations"
    """Scale columns by their inputs, which takes data."""
    order: Literal["levels", "perplexity"] = "levels"
    """Which blocks come first where fewer are loaded."""
    weights_per_second: ClassVar[float] = 2e7
    """Matrix entries put into one block a second on one core of the reference CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.blocks <= MOST_BLOCKS:
            raise BadInput(f"{self.name}: blocks={self.blocks} must be 1 to {MOST_BLOCKS}")
        if self.rank is not None and self.rank < 1:
            raise BadInput(f"{self.name}: rank={self.rank} must be 1 or more")

    def requires(self) -> Needs:
        if self.scaling == "activations":
            return self.needs
        return Needs(calibration=True) if self.order == "perplexity" else Needs()

    def plan(self, context: Context) -> PassResult:
        self._check(context.view)
        return super().plan(context)

    def run(self, context: Context) -> PassResult:
        self._check(context.view)
        result = PassResult()
        chosen = self.choose(context, result)

        def fit(linear: Linear, statistics: Statistics) -> _Stack:
            return self._stack(context, linear, statistics)

        by_linear = self.fit_all(context, chosen, fit)
        stacks = list({stack.site: stack for stack in by_linear.values()}.values())
        stacked = _in_order(stacks, self._order(context, stacks, chosen, by_linear))
        for linear in chosen:
            stack = by_linear[linear.name]
            self._replace(context, linear, stack, stacked[stack.site], result)
        result.notes += _notes(stacks, self.blocks)
        context.edited()
        return result

    def _check(self, view: View) -> None:
        if self.order == "perplexity":
            check_predicts(view)

    def planned_site(self, context: Context, linear: Linear) -> Site:
        size = self.blocks * block_bytes(*_shape(linear), self._rank(linear))
        return linear_site(linear, weight_of(context.view, linear).stored_bytes, size)

    def reason_against(self, context: Context, linear: Linear) -> str | None:
        reason = reason_against_storing(context.view, linear)
        if reason is None:
            self._rank(linear)  # one that is too high is an error
        return reason

    def seconds(self, planned: PassResult) -> float:
        entries = sum(s.shape[0] * s.shape[1] for s in planned.sites)
        return self.blocks * entries / self.weights_per_second

    def peak_bytes(self, planned: PassResult) -> int:
        return max((s.shape[0] * s.shape[1] for s in planned.sites), default=0) * 4 * 8

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

    def _stack(self, context: Context, linear: Linear, statistics: Statistics) -> _Stack:
        rank = self._rank(linear)

        def stack() -> dict[str, Any]:
            scale = torch.ones(linear.in_features, dtype=torch.float64)
            if self.scaling == "activations":
                square = statistics[Square]
                scale = input_scale(square.total, square.count)
            weight = weight_of(context.view, linear).read()
            return vars(decompose(weight, scale, blocks=self.blocks, rank=rank, name=linear.name))

        fields = context.once(f"site {linear.name}", stack)
        parts = {p: [context.spool.store(t) for t in fields[p]] for p in PARTS}
        return _Stack(
            linear.name, _shape(linear), rank, fields["energies"], fields["rel_l2"], parts
        )

    def _order(
        self, context: Context, stacks: Sequence[_Stack], linears: Sequence[Linear],
        by_linear: Mapping[str, _Stack],
    ) -> Order:  # fmt: skip
        if self.order == "levels":
            sizes = {stack.site: stack.block_bytes for stack in stacks}
            return by_levels({stack.site: stack.energies for stack in stacks}, sizes)

        def places() -> list[Any]:
            members = {
                stack.site: Stacked(
                    stack.parts["signs"], stack.parts["factors"],
                    [x for x in linears if by_linear[x.name].site == stack.site],
                )
                for stack in stacks
            }  # fmt: skip
            return [list(place) for place in by_perplexity(context, members, self.blocks)]

        return [(site, block) for site, block in context.once("order", places)]

    def _replace(
        self, context: Context, linear: Linear, stack: _Stack,
        stacked: dict[str, StackedWeight], result: PassResult,
    ) -> None:  # fmt: skip
        before = weight_of(context.view, linear).stored_bytes
        # A linear that feeds this one directly may have been swapped since the sites were chosen.
        current = replace(linear, x=context.view.tensor(linear.node))
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
        size = self.blocks * stack.block_bytes
        result.sites.append(linear_site(linear, before, size, stack.rel_l2))


def _in_order(stacks: Sequence[_Stack], order: Order) -> dict[str, dict[str, StackedWeight]]:
    """The stacked operands of each site, their blocks named by their places in the order."""
    places: dict[str, list[int]] = {k.site: [] for k in stacks}
    for place, (site, _) in enumerate(order):
        places[site].append(place)
    return {
        k.site: {
            part: StackedWeight(
                handles, [block_name(place, part) for place in places[k.site]]
            )
            for part, handles in k.parts.items()
        }
        for k in stacks
    }


def _notes(stacks: Sequence[_Stack], blocks: int) -> list[str]:
    least = sum(k.block_bytes for k in stacks)
    return [f"stacked weights of any size from {least} to {least * blocks} bytes"] if stacks else []


def _shape(linear: Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features
