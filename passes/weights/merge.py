"""``merge``: what fine-tuning changed in other checkpoints, added to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...ir.core.errors import BadInput
from .delta_pass import DeltaPass, check_share, dropped


@dataclass(frozen=True, kw_only=True)
class Merge(DeltaPass):
    """Task arithmetic over checkpoints of one architecture.

    ``W + scale sum_t (W_t - W_base)`` (Ilharco et al. 2022, arXiv 2212.04089); ``deltas`` are the
    fine-tuned checkpoints, ``base`` the one that they came from: the model itself unless it is
    given. A negative ``scale`` takes a task away. ``drop`` is DARE's p for each of them (Yu et al.
    2023, arXiv 2311.03099), by ``seed``. Vocabularies must agree: a table of another size is
    refused as any other weight.
    """

    name: ClassVar[str] = "merge"
    deltas: tuple[str, ...]
    """Checkpoints whose differences are added."""
    base: str | None = None
    """What they were fine-tuned from; else the model."""
    scale: float = 1.0
    """Times each difference."""
    drop: float = 0.0
    """Share of each that is dropped, as dare does."""
    seed: int = 0
    """Of what is dropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.deltas:
            raise BadInput("merge: deltas= names no checkpoint")
        check_share(self.name, "drop", self.drop)

    def places(self) -> Mapping[str, str]:
        named = {f"deltas[{i}]": path for i, path in enumerate(self.deltas)}
        return named if self.base is None else {**named, "base": self.base}

    def combined(self, weight: Tensor, others: Sequence[Tensor], name: str) -> Tensor:
        tuned = others[: len(self.deltas)]
        base = weight if self.base is None else others[-1]
        total = weight
        for i, other in enumerate(tuned):
            total = total + self.scale * dropped(other - base, self.drop, self.seed + i, name)
        return total
