"""Sign descent on how weights are rounded, through a whole block at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...ir.core.view import Value
from ...ir.ops.pack import pack, unpack_zeros
from ...ir.run.blocks import BlockGraph
from ..stored import relative_error
from .quantized import Quantized
from .quantizers import storable

JUDGES = 4
"""Batches on which roundings are compared."""
LEAST_RANGE = 0.5
"""How far a group's scale may shrink."""


@dataclass
class Rounding:
    """One weight, what moves before it is rounded, and how far its scales shrink."""

    weight: Tensor
    """f32 [N, K]."""
    start: Quantized
    moves: Tensor
    """f32 [N, K] within -0.5 and 0.5, in steps of the code."""
    shrinks: Tensor
    """f32 [N, groups] within ``LEAST_RANGE`` and 1."""

    @classmethod
    def of(cls, weight: Tensor, start: Quantized) -> Rounding:
        """As ``start``, which rounds to nearest."""
        moves = torch.zeros(weight.shape, requires_grad=True)
        shrinks = torch.ones(start.scales.shape, requires_grad=True)
        return cls(weight.float(), start, moves, shrinks)

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.moves, self.shrinks

    def step(self, rate: float) -> None:
        """One step against the sign of the gradients, within bounds; the gradients are gone."""
        bounds = ((-0.5, 0.5), (LEAST_RANGE, 1.0))
        with torch.no_grad():
            for parameter, (low, high) in zip(self.parameters, bounds, strict=True):
                assert parameter.grad is not None
                parameter.sub_(rate * parameter.grad.sign()).clamp_(low, high)
                parameter.grad = None

    def rounded(self) -> Tensor:
        """The weight as it will be stored, f32; to gradients, rounding is the identity."""
        codes, scales, zeros = self._codes()
        return (codes - zeros) * scales

    def quantized(self) -> Quantized:
        """The stored form."""
        with torch.no_grad():
            codes, _, _ = self._codes()
            scales = self._scales().to(self.start.scales.dtype)
        packed = pack(codes.to(torch.uint8), self.start.bits, self.start.group)
        quantized = replace(self.start, codes=packed, scales=scales)
        return replace(quantized, rel_l2=relative_error(self.weight, quantized.dequantized()))

    def _scales(self) -> Tensor:
        dtype = self.start.scales.dtype
        exact = self.start.scales.float() * self.shrinks
        return exact + (storable(exact, dtype) - exact).detach()

    def _codes(self) -> tuple[Tensor, Tensor, Tensor | float]:
        scales = self._wide(self._scales())
        zeros = self._zeros()
        exact = self.weight / scales + self.moves + zeros
        codes = exact + (exact.round() - exact).detach()
        return codes.clamp(0, (1 << self.start.bits) - 1), scales, zeros

    def _zeros(self) -> Tensor | float:
        start = self.start
        if start.zeros is None:
            return float(1 << (start.bits - 1))
        return self._wide(unpack_zeros(start.zeros, start.bits, start.scales.shape[1]).float())

    def _wide(self, of_groups: Tensor) -> Tensor:
        """A number for each weight, from one for each group."""
        if not self.start.group:
            return of_groups
        return of_groups.repeat_interleave(self.start.group, 1)[:, : self.weight.shape[1]]


def descend(
    block: BlockGraph, roundings: Mapping[Value, Rounding], inputs: Sequence[Tensor],
    outside: Sequence[Mapping[Value, Any]], targets: Sequence[Tensor], *, steps: int, seed: int,
) -> float:  # fmt: skip
    """Move ``roundings`` (by weight) so that the block's output on ``inputs`` comes near to
    ``targets``, a batch a step; the share of the first loss that is left.

    Each step is ``rate sign(gradient)``, the rate falling from ``1 / steps`` to 0. Of the start and
    eight points on the way the roundings with the least loss on ``JUDGES`` batches stay.
    """
    constants = block.constants()
    generator = torch.Generator().manual_seed(seed)

    def loss(index: int) -> Tensor:
        weights = {v: r.rounded().to(constants[v].dtype) for v, r in roundings.items()}
        output = block.run(inputs[index], outside[index], {**constants, **weights})
        return (output.float() - targets[index].float()).square().mean()

    def whole() -> float:
        with torch.no_grad():
            return sum(float(loss(i)) for i in range(min(len(inputs), JUDGES)))

    first = least = whole()
    best = _copies(roundings)
    looks = {round(steps * i / 8) for i in range(1, 9)}
    for step in range(steps):
        index = int(torch.randint(len(inputs), (1,), generator=generator))
        with torch.enable_grad():
            torch.autograd.backward([loss(index)])
        for rounding in roundings.values():
            rounding.step((1 - step / steps) / steps)
        if step + 1 in looks and (total := whole()) < least:
            least, best = total, _copies(roundings)
    with torch.no_grad():
        for value, rounding in roundings.items():
            for parameter, copy in zip(rounding.parameters, best[value], strict=True):
                parameter.copy_(copy)
    return least / max(first, 1e-30)


def _copies(roundings: Mapping[Value, Rounding]) -> dict[Value, list[Tensor]]:
    return {v: [p.detach().clone() for p in r.parameters] for v, r in roundings.items()}
