"""``aqlm``: weights as sums of codebooks' vectors, eight inputs at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.weights import Weight
from ...ir.ops.linear_aqlm import ENTRIES, TABLE, operand_types
from ...ir.run.statistics import Gram, Stat, Statistics
from ...ir.structure.recognize import Linear
from ..base import Needs, PassResult
from ..foreseen import Foreseen
from ..linear_pass import StoringPass
from ..stored import Stored, relative_error
from .additive import DAMPING, fitted
from .expected import energies_after_feedback
from .feedback import Feedback
from .quantizers import SMALLEST_SCALE, not_finite

MOST_BITS, MOST_BEAM = 4, 16
BOOKS_SHARE = 1 / 8
"""Bits a weight that codebooks of 256 vectors may take, where their size is not given."""


@dataclass(frozen=True, kw_only=True)
class AQLM(StoringPass, Foreseen):
    """Swap linears for ``linear_aqlm``: sums of vectors, a byte for each eight weights and bit.

    AQLM (Egiazarian et al. 2024, arXiv 2401.06118) without its fine-tuning: rows are scaled, and
    each group of eight inputs is a sum of codebooks' vectors. K-means of what the codebooks before
    leave begins; ``rounds`` of a beam search for codes and of least squares for codebooks and
    scales (the paper takes Adam) then lower the error of the outputs, ``tr(D S D^T)``. ``bits`` is
    how many bytes eight weights take. A byte picks from 256 ``vectors``, or is two numbers that
    pick from 16 each; unless given, the former where they take at most an eighth of a bit a weight.

    Measured on tiny-llama (``bench.aqlm quality``; source 34.68): perplexity 46.1 at 2.21 bits a
    weight, where ``gptq`` gives 48.4 at 2.33 and rounding to nearest 173 at 2 bits in groups of 64.
    It is small in the file alone: ONNX Runtime multiplies by the dense matrix, which it makes as it
    loads, so that neither memory nor time is saved there. Needs calibration data; with fewer tokens
    than a linear has inputs the site says so. Weights that are not finite are refused.
    """

    name: ClassVar[str] = "aqlm"
    needs: ClassVar[Needs] = Needs(stats=(Stat("gram", at="linear"),))
    bits: int = 2
    """Bytes of a group of eight weights: 1 to 4."""
    vectors: int | None = None
    """Of a codebook: 256, or 16 in twice as many."""
    beam: int = 4
    """Choices of codes that are followed."""
    rounds: int = 8
    """Rounds of codes, codebooks and scales, at most."""
    propagate: Literal["sequential", "dense"] = "sequential"
    """The graph whose inputs it is fitted to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= MOST_BITS:
            raise BadInput(f"aqlm: bits={self.bits} must be 1 to {MOST_BITS}")
        if self.vectors not in (None, *ENTRIES):
            raise BadInput(f"aqlm: vectors={self.vectors} must be {' or '.join(map(str, ENTRIES))}")
        if not 1 <= self.beam <= MOST_BEAM:
            raise BadInput(f"aqlm: beam={self.beam} must be 1 to {MOST_BEAM}")
        if self.rounds < 0:
            raise BadInput(f"aqlm: rounds={self.rounds} must not be negative")

    def requires(self) -> Needs:
        return replace(self.needs, propagate=self.propagate)

    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        if not bool(torch.isfinite(weight).all()):
            raise not_finite(weight, name)
        rows, columns = weight.shape
        gram, entries = statistics[Gram], self._entries(rows, columns)
        books = self.bits if entries == TABLE else 2 * self.bits
        form = fitted(
            weight, gram.matrix, books=books, entries=entries, beam=self.beam, rounds=self.rounds
        )
        codes = form.codes.to(torch.uint8)
        if entries != TABLE:
            codes = codes[0::2] * entries + codes[1::2]
        scales = _narrow(form.scales)
        dense = form.unscaled()[:, :columns] * scales.float().unsqueeze(1)
        few = gram.count < columns
        return Stored(
            "linear_aqlm", {"codes": codes, "codebooks": form.books.half(), "scales": scales},
            relative_error(weight, dense), {"in_features": columns, "out_features": rows},
            note=f"{gram.count} calibration tokens for {columns} inputs" if few else "",
        )  # fmt: skip

    def _entries(self, rows: int, columns: int) -> int:
        if self.vectors is not None:
            return self.vectors
        types = operand_types(columns, rows, planes=self.bits, entries=TABLE)
        return TABLE if 16 * (types[1].numel or 0) <= BOOKS_SHARE * rows * columns else ENTRIES[0]

    def expected_loss(self, linear: Linear, weight: Tensor, statistics: Statistics) -> float:
        """As if each weight were Gaussian noise in so many bits, ``rms^2 4^-bits``, whose errors
        the others make up for."""
        by = Feedback.at(statistics[Gram], DAMPING, act_order=True)
        variance = float(weight.double().square().mean(1).sum()) * 4.0**-self.bits
        return variance * float(energies_after_feedback(by).sum())

    def predicted_bytes(self, linear: Linear, weight: Weight) -> int:
        rows, columns = linear.out_features, linear.in_features
        types = operand_types(columns, rows, planes=self.bits, entries=self._entries(rows, columns))
        return sum((t.numel or 0) * t.dtype.itemsize for t in types if t.dtype is not None)

    def seconds(self, planned: PassResult) -> float:
        """Products with the Gram matrix, and vectors tried for each group and choice."""
        turns = self.rounds + 1
        total = 0.0
        for rows, columns in (site.shape for site in planned.sites):
            products = turns * _PRODUCTS * rows * columns**2 / _MACS
            tried = self.bits * self.beam * self._entries(rows, columns) / 8
            total += products + turns * tried * rows * columns / _TRIALS
        return total

    def peak_bytes(self, planned: PassResult) -> int:
        sizes = [site.shape for site in planned.sites]
        return max((4 * (8 * m * n + 3 * n * n) for m, n in sizes), default=0)


_PRODUCTS, _MACS, _TRIALS = 17, 4e10, 1.5e8
"""Products of the size of ``W S`` in a round; multiply-adds, and vectors tried for one group, in a
second on one core of the reference CPU."""


def _narrow(scales: Tensor) -> Tensor:
    """In float16, unless its range would harm them."""
    size = scales.abs()
    fits = (size == 0) | ((size >= SMALLEST_SCALE[torch.float16]) & (size < 6e4))
    return scales.half() if bool(fits.all()) else scales
