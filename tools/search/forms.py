"""How a linear may be stored, and the rank of the path beside it: what is chosen from at a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ...ir.vocab.targets import Target
from ...passes.base import Pass
from ...passes.linear_pass import StoringPass
from ...passes.weights.eora import EoRA
from ...passes.weights.factor_form import FactorForm
from ...passes.weights.gptq import GPTQ
from ...passes.weights.quantize import Quantize
from ...passes.weights.w8a8 import W8A8


@dataclass(frozen=True, order=True)
class Form:
    """A pass that stores weights in few bits, with the options that are searched over."""

    method: Literal["quantize", "gptq", "w8a8"]
    bits: int
    group: int
    mse: bool = False

    @property
    def options(self) -> dict[str, Any]:
        if self.method == "w8a8":
            return {}
        options: dict[str, Any] = {"bits": self.bits, "group": self.group}
        if self.mse:
            options["mse"] = True
        if self.method == "gptq":
            # One sweep serves all passes of a recipe, and errors are those that were forecast.
            options["propagate"] = "dense"
        return options

    @property
    def timed(self) -> str:
        """Equal for forms that take equally long: how a weight was rounded does not matter, and
        runtimes widen 3 bits when they load, whatever the group."""
        if self.method == "w8a8":
            return self.method
        return "3 bits" if self.bits == 3 else f"{self.bits}/{self.group}"

    def pass_(self, include: Sequence[str], target: Target) -> StoringPass:
        """The pass at some linears, as an artifact for ``target`` wants it."""
        by_method: dict[str, type[StoringPass]] = {
            "quantize": Quantize, "gptq": GPTQ, "w8a8": W8A8
        }  # fmt: skip
        by = by_method[self.method](include=tuple(include), **self.options).settled(target)
        assert isinstance(by, StoringPass)
        return by

    def stand_in(self) -> Form:
        """One that takes as long and is fitted to nothing."""
        return replace(self, method="quantize", mse=False) if self.method == "gptq" else self

    def __str__(self) -> str:
        if self.method == "w8a8":
            return self.method
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
    Form("gptq", 8, 32), Form("gptq", 4, 32), Form("gptq", 4, 64), Form("gptq", 4, 128),
    Form("gptq", 3, 32), Form("gptq", 3, 64), Form("gptq", 3, 128),
    Form("gptq", 2, 16, mse=True), Form("gptq", 2, 32, mse=True), Form("gptq", 2, 64, mse=True),
)  # fmt: skip
FAST = Form("w8a8", 8, 0)
"""What is tried where time is bounded: many tokens at once go through it fastest."""
PATHS = (
    *(Path(rank) for rank in (8, 16, 32)), *(Path(rank, 4) for rank in (16, 32, 64)),
)  # fmt: skip
