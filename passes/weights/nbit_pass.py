"""What all passes that store weights in few bits share: formats, forecasts, the stored form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.types import Type
from ...ir.core.weights import Weight
from ...ir.ops.linear_nbit import operand_types
from ...ir.ops.pack import BITS, GROUPS, block_of
from ...ir.ops.sparse_linear import index_dtype
from ...ir.run.statistics import Gram, Statistics
from ...ir.structure.recognize import Linear
from ...ir.vocab.targets import Target
from ..base import Context, PassResult
from ..foreseen import Foreseen
from ..linear_pass import FormPass, StoringPass
from ..stored import Shelved, Stored
from .expected import energies, rounding_loss
from .quantized import Quantized

LEAST_BLOCK_OF_2_BITS = 32
"""ONNX Runtime 1.31 computes narrower ones in floats, whatever their level."""
ScaleName = Literal["float32", "float16"]
SCALE_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class CodedPass(FormPass):
    """Base of the passes that swap linears for ``linear_nbit``.

    ``bits`` is 2, 3, 4 or 8; ``group`` is 16 to 256 (a power of two) input features that share a
    scale, or 0 for one scale per output row. Where a group does not divide the input features, the
    last one is padded with codes that multiply nothing. ``scales`` is the dtype in which scales are
    stored; a matrix whose scales would suffer from float16's range keeps float32. ``include`` and
    ``exclude`` are globs on site names, ``kinds`` are roles (``q``, ``up``); ``min_size`` is
    the least number of weights of a matrix. ``accuracy_level=4`` rounds activations to 8 bits in
    each group and computes in integers, 0 computes in floats. Unless it is given, it is what the
    target likes (``vocab.targets``); without a target 8 bits take 4 (on the reference CPU 0 is
    slower than the dense matrix, 4 up to twice as fast) and fewer bits take 0.
    """

    widened: ClassVar[bool] = True
    bits: int = 4
    """Bits of a weight: 2, 3, 4 or 8."""
    group: int = 32
    """Inputs that share a scale: 16 to 256; 0: a row."""
    scales: ScaleName = "float16"
    """In what scales are stored."""
    accuracy_level: Literal[0, 4] | None = None
    """4: compute in 8 bits, 0: in floats; by the bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise BadInput(f"{self.name}: bits={self.bits} must be one of {_list(BITS)}")
        if self.group not in GROUPS:
            raise BadInput(
                f"{self.name}: group={self.group} must be one of {_list(GROUPS[1:])}, or 0 for one "
                "scale per row (ONNX Runtime stores blocks of these sizes)"
            )
        if self.accuracy_level == 4 and (self.bits == 3 or (self.bits, self.group) == (2, 16)):
            raise BadInput(
                f"{self.name}: accuracy_level=4 needs bits=4 or 8, or bits=2 in groups of 32 and "
                "more: the runtime multiplies no others as integers"
            )

    def settled(self, target: Target) -> CodedPass:
        """With the accuracy level that the target likes, where it is not the default: of these
        bits, or of the 8 that a table and its head may have."""
        block = self.group or GROUPS[-1]
        level: Literal[0, 4] = 4 if target.level(self.bits, block) == 4 else 0
        usual = level == self.level and target.level(8, block) == 4
        if self.accuracy_level is not None or usual:
            return self
        return replace(self, accuracy_level=level)

    @abstractmethod
    def zero_points(self) -> Literal["none", "integer", "real"]:
        """What kind of zero points the pass stores."""

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scales]

    @property
    def level(self) -> Literal[0, 4]:
        """The accuracy level that is stored."""
        if self.accuracy_level is None:
            return 4 if self.bits == 8 else 0
        return self.accuracy_level

    def _level(self, columns: int) -> int:
        """The same for one matrix: a row's one scale may be stored in narrow blocks."""
        fits = self.bits != 2 or block_of(self.group, columns) >= LEAST_BLOCK_OF_2_BITS
        return self.level if fits else 0

    def outlier_rate(self) -> float:
        """Share of weights that the pass keeps exactly, as a forecast."""
        return 0.0

    # --- the pass ----------------------------------------------------------------------------

    def put_all(
        self, context: Context, linears: Sequence[Linear], forms: Mapping[str, Shelved],
        result: PassResult,
    ) -> None:  # fmt: skip
        super().put_all(context, linears, forms, result)
        if self.level == 4 and result.sites:
            result.notes.append(
                "activations are rounded to 8 bits where these weights multiply them, which the "
                "error counts (accuracy_level=0 does not)"
            )

    def stored(self, quantized: Quantized, note: str = "") -> Stored:
        """The stored form of a quantized matrix."""
        fan_out, fan_in = len(quantized.codes), quantized.in_features
        outliers = quantized.outliers
        side = {} if outliers is None or not outliers.values.numel() else vars(outliers)
        return Stored(
            "linear_nbit",
            dict(zip(("codes", "scales", "zeros"), quantized.operands(), strict=True)),
            quantized.rel_l2,
            {"bits": self.bits, "group": self.group, "in_features": fan_in,
             "out_features": fan_out, "accuracy_level": self._level(fan_in)},
            side,
            note=note,
        )  # fmt: skip

    def predicted_bytes(self, linear: Linear, weight: Weight) -> int:
        """Bytes of codes, scales, zero points and the forecast outliers of one matrix."""
        fan_in, fan_out = linear.in_features, linear.out_features
        outliers = int(self.outlier_rate() * fan_in * fan_out)
        width = index_dtype(fan_in).itemsize + index_dtype(fan_out).itemsize
        return self.coded_bytes(fan_out, fan_in) + outliers * (width + 4)

    def coded_bytes(self, rows: int, columns: int) -> int:
        """Bytes of codes, scales and zero points of a matrix."""
        types = operand_types(
            columns, rows, bits=self.bits, group=self.group,
            zeros=self.zero_points(), scale_dtype=self.scale_dtype,
        )  # fmt: skip
        return sum(_bytes(t) for t in types if t is not None)


@dataclass(frozen=True, kw_only=True)
class NBitPass(CodedPass, StoringPass, Foreseen):
    """Base of the passes of that kind that look at the weight only."""

    @abstractmethod
    def quantize(self, weight: Tensor, name: str) -> Quantized:
        """Codes, scales and the rest of one matrix [out, in]; ``name`` is for errors."""

    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        return self.stored(self.quantize(weight, name))

    def expected_loss(self, linear: Linear, weight: Tensor, statistics: Statistics) -> float:
        by, costs = self.at(linear), energies(statistics[Gram])
        middle = by.zero_points() == "none"
        return rounding_loss(weight, costs, by.bits, by.group, middle=middle)


def _bytes(type_: Type) -> int:
    assert type_.dtype is not None
    return (type_.numel or 0) * type_.dtype.itemsize


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
