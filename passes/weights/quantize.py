"""``quantize``: round to nearest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from ...ir.structure.recognize import Linear
from .rounding import Rounding
from .table_pass import TablePass

HEAD = "head"


@dataclass(frozen=True, kw_only=True)
class Quantize(TablePass, Rounding):
    """Store the weights of linears in few bits by rounding to nearest, without data.

    ``w ≈ (code - zero) * scale`` in groups of ``group`` inputs. ``symmetric`` fixes the zero point
    at the middle code; otherwise it is an integer for each group. ``mse`` searches, for each group,
    the shrinkage of its range with the least ``sum |error|^2.4`` (the search of GPTQ's quantizer,
    arXiv 2210.17323). Weights that are not finite are refused.

    ``embeddings=4`` or ``8`` stores tables of embeddings in so many bits; a head that is tied to
    its table then reads the same bytes. ``auto`` stores those alone that a chosen head is tied to,
    in 8 bits, as llama.cpp does: such a head is read whole for each token, as an untied one is, and
    few bits hurt it most. ``keep`` leaves both as they are, since to quantize the head alone would
    save nothing; so it is where ``exclude`` names one of the two. ``head_bits`` are those of a head
    that is tied to no table, where it is to have others than the rest.
    """

    name: ClassVar[str] = "quantize"
    embeddings: Literal["auto", "keep", 4, 8] = "auto"
    """Bits of tables; auto: 8 where a head is tied."""
    head_bits: Literal[4, 8] | None = None
    """Bits of a head that is tied to no table."""

    def at(self, linear: Linear) -> Self:
        if linear.role != HEAD or self.head_bits in (None, self.bits):
            return self
        return replace(self, bits=self.head_bits)
