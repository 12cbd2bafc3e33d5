"""How a linear may be stored, and the rank of the path beside it: what is chosen from at a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...ir.vocab.targets import Target
from ...passes.base import Pass
from ...passes.weights.eora import EoRA
from ...passes.weights.factor_form import FactorForm
from ...passes.weights.gptq import GPTQ
from ...passes.weights.nbit_pass import CodedPass
from ...passes.weights.quantize import Quantize


@dataclass(frozen=True, order=True)
class Form:
    """A pass that stores weights in few bits, with the options that are searched over."""

    method: Literal["quantize", "gptq"]
    bits: int
    group: int
    mse: bool = False

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"bits": self.bits, "group": self.group}
        if self.mse:
            options["mse"] = True
        if self.method == "gptq":
            # One sweep serves all passes of a recipe, and errors are those that were forecast.
            options["propagate"] = "dense"
        return options

    def pass_(self, include: Sequence[str], target: Target) -> CodedPass:
        """The pass at some linears, as an artifact for ``target`` wants it."""
        kind = Quantize if self.method == "quantize" else GPTQ
        return kind(include=tuple(include), **self.options).settled(target)

    def __str__(self) -> str:
        return f"{self.method} {self.bits}/{self.group}{' mse' if self.mse else ''}"


@dataclass(frozen=True, order=True)
class Path:
    """A low-rank path beside what was stored: rank 0 is none."""

    rank: int = 0
    bits: Literal[4] | None = None
    """Of its factors; ``None`` is float16."""

    def nbytes(self, rows: int, columns: int) -> int:
        """Stored bytes beside a matrix ``[rows, columns]``."""
        if not self.rank:
            return 0
        form = FactorForm(self.bits, torch.float16)
        return form.nbytes(self.rank, columns) + form.nbytes(rows, self.rank)

    def pass_(self, include: Sequence[str], target: Target) -> Pass:
        """The pass at some linears, as an artifact for ``target`` wants it."""
        return EoRA(
            include=tuple(include), rank=self.rank, propagate="dense", factor_bits=self.bits
        ).settled(target)

    def __str__(self) -> str:
        if not self.rank:
            return ""
        return f"rank {self.rank}" + ("" if self.bits is None else f" in {self.bits} bits")


NO_PATH = Path()
ROUNDED = (
    Form("quantize", 8, 64), Form("quantize", 4, 32), Form("quantize", 4, 128),
    Form("quantize", 3, 32), Form("quantize", 2, 32),
)  # fmt: skip
"""What needs no Gram matrix to be inverted: all that is tried where a model is large."""
FED_BACK = (
    Form("gptq", 4, 32), Form("gptq", 4, 64), Form("gptq", 4, 128), Form("gptq", 3, 32),
    Form("gptq", 3, 64), Form("gptq", 3, 128), Form("gptq", 2, 16, mse=True),
    Form("gptq", 2, 32, mse=True), Form("gptq", 2, 64, mse=True),
)  # fmt: skip
PATHS = (
    *(Path(rank) for rank in (8, 16, 32)), *(Path(rank, 4) for rank in (16, 32, 64)),
)  # fmt: skip
