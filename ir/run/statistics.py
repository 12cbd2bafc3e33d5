"""What a weight pass learns of a linear's inputs: sums over all calibration tokens.

Inputs are ``[..., K]``; leading dimensions are tokens. Where the graph takes ``attention_mask``
``[batch, seq]`` and an input is ``[batch, seq, K]``, masked tokens are left out: their activations
mean nothing. Linears that share an input share its statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..core.errors import BadInput

Kind = Literal["gram", "mean", "square", "absmax"]
DOUBLE_UP_TO = 4096
"""Input features up to which a Gram matrix is summed in float64; above it, 8 bytes an entry would
take more than 128 MiB a site and float32 is used."""


@dataclass
class Moments:
    """Sums over the tokens of one input of ``K`` features."""

    features: int
    kinds: frozenset[Kind]
    count: int = 0
    """Tokens seen."""
    total: torch.Tensor | None = None
    """Sum of x, ``[K]`` f64."""
    squares: torch.Tensor | None = None
    """Sum of x^2, ``[K]`` f64."""
    absmax: torch.Tensor | None = None
    """Largest |x|, ``[K]`` f32."""
    gram: torch.Tensor | None = None
    """X^T X, ``[K, K]``, f64 up to ``DOUBLE_UP_TO`` features, else f32."""

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Take in ``x`` ``[..., K]``; ``mask`` ``[batch, seq]`` says which tokens count.

        Raises ``BadInput`` where a token that counts holds NaN or infinity.
        """
        rows = _tokens(x, mask)
        if not torch.isfinite(rows).all():
            raise BadInput(
                "the calibration data makes activations that are NaN or infinite; check the data, "
                "and the passes before"
            )
        self.count += len(rows)
        if "gram" in self.kinds:
            wide = torch.float64 if self.features <= DOUBLE_UP_TO else torch.float32
            self.gram = _plus(self.gram, rows.to(wide).T @ rows.to(wide))
        if "mean" in self.kinds:
            self.total = _plus(self.total, rows.sum(0, dtype=torch.float64))
        if "square" in self.kinds:
            self.squares = _plus(self.squares, rows.double().square().sum(0))
        if "absmax" in self.kinds and len(rows):
            most = rows.abs().amax(0).float()
            self.absmax = most if self.absmax is None else torch.maximum(self.absmax, most)

    @property
    def mean(self) -> torch.Tensor:
        """``[K]`` f64."""
        assert self.total is not None
        return self.total / max(1, self.count)


def moments(
    batches: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    kinds: Sequence[Kind],
) -> Moments:
    """Statistics of one input over all batches. Raises ``BadInput`` where no token counts."""
    found = Moments(int(batches[0].shape[-1]), frozenset(kinds))
    for x, mask in zip(batches, masks, strict=True):
        found.add(x, mask)
    if not found.count:
        raise BadInput("the calibration data holds no token: every one is masked out")
    return found


def token_masks(batches: Sequence[Mapping[str, torch.Tensor]]) -> list[torch.Tensor | None]:
    """``attention_mask`` of each batch as bool ``[batch, seq]``; ``None`` where there is none."""
    masks = (batch.get("attention_mask") for batch in batches)
    return [mask.bool() if mask is not None and mask.dim() == 2 else None for mask in masks]


def _tokens(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])


def _plus(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if total is None else total.add_(more)
