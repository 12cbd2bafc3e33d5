"""What all passes that set weights to zero share: how many, in which groups, and what is stored."""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.weights import Weight
from ...ir.run.statistics import Gram, Statistics
from ...ir.structure.recognize import Linear
from ..base import CHANGED, MASKED, STORED, Context, PassResult
from ..foreseen import Foreseen
from ..linear_pass import LinearPass, LinearStoringPass, StoringPass
from ..stored import Stored, numbers
from .expected import energies, mask_loss
from .quantizers import not_finite

ZEROS_ARE_STORED = (
    "zeros are stored like other numbers: no runtime of ours multiplies by a sparse matrix as fast "
    "as by a dense one, so a mask alone saves no bytes and no time; an archive of the file shrinks"
)


@dataclass(frozen=True)
class Ratio:
    """``N:M``: so many weights stay of each M inputs in a row."""

    stay: int
    group: int


@dataclass(frozen=True, kw_only=True)
class MaskingPass(LinearStoringPass):
    """Base of the passes that leave a dense weight with zeros in it.

    Zeros are stored like other numbers. The form for a few outliers (``sparse_linear``) takes 8
    bytes an entry, as many as two dense float32 weights, and at 0.5 % of the entries already the
    time of the whole dense product; ONNX Runtime has no kernel for 2:4.
    """

    provides: ClassVar[tuple[str, ...]] = (MASKED, CHANGED)
    excludes: ClassVar[tuple[str, ...]] = (MASKED, STORED)
    keeps_form: ClassVar[bool] = True

    def predicted_bytes(self, linear: Linear, weight: Weight) -> int:
        return weight.nbytes

    def run(self, context: Context) -> PassResult:
        return with_note(super().run(context))

    def plan(self, context: Context) -> PassResult:
        return with_note(super().plan(context))


@dataclass(frozen=True, kw_only=True)
class MaskOptions(LinearPass):
    """How many zeros. ``sparsity`` is a share of zeros, above 0 and below 1; ``pattern`` is
    ``N:M``: N weights stay of each M inputs in a row, which must divide the row. Give one of them;
    it is ``pattern=2:4`` unless one is given.
    """

    sparsity: float | None = None
    """Share of the weights that become 0."""
    pattern: str | None = None
    """N:M, of which N stay of M in a row; 2:4 by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is not None and self.pattern is not None:
            raise BadInput(f"{self.name}: give sparsity= or pattern=, not both")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise BadInput(f"{self.name}: sparsity={self.sparsity} must be above 0 and below 1")
        _ = self.ratio

    @property
    def ratio(self) -> Ratio | None:
        """What stays of each group; ``None`` where a share is given."""
        if self.sparsity is not None:
            return None
        pattern = "2:4" if self.pattern is None else self.pattern
        match = re.fullmatch(r"(\d+):(\d+)", pattern)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise BadInput(
                f"{self.name}: pattern={pattern} is not N:M with N below M, as 2:4; a share of "
                "zeros is sparsity=0.5"
            )
        return Ratio(int(match[1]), int(match[2]))

    def reason_against_groups(self, linear: Linear) -> str | None:
        """Why the pattern does not fit a linear; ``None`` where it does."""
        ratio = self.ratio
        if ratio is None or linear.in_features % ratio.group == 0:
            return None
        return f"its {linear.in_features} inputs are no multiple of {ratio.group}"


@dataclass(frozen=True, kw_only=True)
class ComparedMask(MaskOptions):
    """Among which weights the lowest scores are, where a share goes; a pattern has its groups.

    By rows, as Wanda and what follows it have it, each output loses equally many weights. Where
    rows differ in size that takes much of the large ones, and a share of the matrix takes less.
    """

    compare: Literal["row", "matrix"] = "row"
    """Whether a share is of each row or the matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare == "matrix" and self.ratio is not None:
            raise BadInput(
                f"{self.name}: compare=matrix is for a share, sparsity=0.5: a pattern compares "
                "within its groups"
            )

    def highest(self, scores: Tensor) -> Tensor:
        """Which weights ``[out, in]`` stay."""
        if self.compare == "matrix":
            return highest_of_all(scores, self.sparsity)
        return highest_of_rows(scores, self.ratio, self.sparsity)


@dataclass(frozen=True, kw_only=True)
class MaskPass(MaskOptions, MaskingPass, StoringPass, Foreseen):
    """Base of the passes that choose a mask by a weight and its statistics."""

    @abstractmethod
    def stays(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Which weights of a finite matrix [out, in] are not set to zero."""

    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        return masked(weight, self.stays(finite(weight, name), statistics))

    def expected_loss(self, linear: Linear, weight: Tensor, statistics: Statistics) -> float:
        return mask_loss(weight, self.stays(weight, statistics), energies(statistics[Gram]))

    def reason_against(self, context: Context, linear: Linear) -> str | None:
        return super().reason_against(context, linear) or self.reason_against_groups(linear)


def masked(weight: Tensor, stays: Tensor) -> Stored:
    """The weight with zeros where the mask does not let it stay."""
    return with_zeros(torch.where(stays, weight, 0.0), weight)


def with_zeros(sparse: Tensor, source: Tensor, note: str = "") -> Stored:
    """Numbers of which some are zero, and their share."""
    share = float((sparse == 0).float().mean())
    return numbers(sparse, source, sparsity=share, note=note)


def highest_of_rows(scores: Tensor, ratio: Ratio | None, sparsity: float | None) -> Tensor:
    """Where the highest scores of each row are: in its groups, or all but a share of it."""
    if ratio is not None:
        return highest_in_groups(scores, ratio)
    assert sparsity is not None
    return highest(scores, scores.shape[1] - round(sparsity * scores.shape[1]))


def highest_of_all(scores: Tensor, sparsity: float | None) -> Tensor:
    """Where the highest scores are, all but a share of them."""
    assert sparsity is not None
    count = scores.numel() - round(sparsity * scores.numel())
    return highest(scores.reshape(1, -1), count).reshape(scores.shape)


def highest(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` highest scores of each row are; of equal ones the first stay."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)


def highest_in_groups(scores: Tensor, ratio: Ratio) -> Tensor:
    """As ``highest``, in each group of a row."""
    groups = scores.reshape(-1, ratio.group)
    return highest(groups, ratio.stay).reshape(scores.shape)


def finite(weight: Tensor, name: str) -> Tensor:
    """The weight. Raises ``BadInput`` where it holds NaN or infinities."""
    if not torch.isfinite(weight).all():
        raise not_finite(weight, name)
    return weight


def with_note(result: PassResult) -> PassResult:
    """The result with what a reader of masks should know."""
    if result.sites:
        result.notes.append(ZEROS_ARE_STORED)
    return result
