"""``w8a8``: weights and activations of linears in 8 bits, products in integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...ir.core.weights import Weight
from ...ir.ops.linear_w8a8 import operand_types
from ...ir.run.statistics import Statistics
from ...ir.structure.recognize import Linear
from ..linear_pass import StoringPass
from ..stored import Stored, relative_error
from .quantizers import SMALLEST_SCALE, not_finite


@dataclass(frozen=True, kw_only=True)
class W8A8(StoringPass):
    """Round weights to 8 bits a row, and activations to 8 bits a token when the model runs.

    ``w ≈ code * scale``, ``scale = max |w| / 127`` of each output row; activations likewise, by
    ``max |x| / 127`` of each token (the dynamic form of SmoothQuant, arXiv 2211.10438, and of
    LLM.int8(), arXiv 2208.07339, without its outliers). Needs no data. Features with outliers leave
    the others few codes: put ``smooth`` in front, which moves them into the weights. For many
    tokens at once, as encoders have, it is the fastest form on a CPU with int8 instructions; for
    few tokens ``quantize{bits=4}`` reads half the bytes. Weights that are not finite are refused.
    """

    name: ClassVar[str] = "w8a8"
    weights_per_second: ClassVar[float] = 2e8

    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        wide = weight.float()
        most = wide.abs().amax(1)
        if not bool(torch.isfinite(most).all()):
            raise not_finite(weight, name)
        scales = (most / 127).clamp_min(SMALLEST_SCALE[torch.float32])
        codes = (wide / scales.unsqueeze(1)).round().clamp(-127, 127)
        error = relative_error(weight, codes * scales.unsqueeze(1))
        rows, columns = weight.shape
        return Stored(
            "linear_w8a8", {"codes": codes.to(torch.int8), "scales": scales}, error,
            {"in_features": columns, "out_features": rows},
        )  # fmt: skip

    def predicted_bytes(self, linear: Linear, weight: Weight) -> int:
        types = operand_types(linear.in_features, linear.out_features)
        return sum((t.numel or 0) * t.dtype.itemsize for t in types if t.dtype is not None)
