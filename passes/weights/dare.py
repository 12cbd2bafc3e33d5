"""``dare``: most of what fine-tuning changed is dropped, the rest made larger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .delta_pass import DeltaPass, check_share, dropped
from .mask_pass import highest_of_all


@dataclass(frozen=True, kw_only=True)
class Dare(DeltaPass):
    """Keep a share of the differences between the model and the checkpoint it came from.

    DARE (Yu et al. 2023, arXiv 2311.03099): ``W = W_base + b (W - W_base) / (1 - p)`` with ``b``
    from Bernoulli(1 - p), drawn from ``seed`` and the weight's name. In the mean outputs stay; an
    output's variance is ``p / (1 - p) sum_j d_j^2 x_j^2``. The paper drops 0.9 of fine-tuned models
    whose differences are below about 0.005, and finds that larger ones do not survive it. The
    result is dense: it is for merging. ``base`` is a safetensors file or a folder of such.

    ``keep=largest`` is the paper's baseline: the share of each weight's differences that is
    smallest is dropped, and what stays is not made larger, for it is no sample of the whole.
    """

    name: ClassVar[str] = "dare"
    base: str
    """The checkpoint that it was fine-tuned from."""
    p: float = 0.9
    """Share of the differences that is dropped."""
    keep: Literal["random", "largest"] = "random"
    """Which differences stay."""
    seed: int = 0
    """Of the choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "p", self.p)

    def places(self) -> Mapping[str, str]:
        return {"base": self.base}

    def combined(self, weight: Tensor, others: Sequence[Tensor], name: str) -> Tensor:
        (base,) = others
        if self.keep == "largest":
            delta = weight - base
            return torch.where(highest_of_all(delta.abs(), self.p), weight, base)
        return base + dropped(weight - base, self.p, self.seed, name)
