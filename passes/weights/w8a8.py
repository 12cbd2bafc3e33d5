"""``w8a8``: weights and activations of linears in 8 bits, products in integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.weights import Weight
from ...ir.ops.linear_w8a8 import operand_types
from ...ir.ops.linear_w8a8_static import MOST
from ...ir.run.statistics import Gram, Range, Stat, Statistics, Tokens
from ...ir.structure.recognize import Linear
from ..base import Needs
from ..linear_pass import StoringPass
from ..stored import Stored, relative_error
from .feedback import Feedback, rounded_with_feedback
from .quantized import Quantized
from .quantizers import SMALLEST_SCALE, not_finite

SHRUNK = tuple(1 - i / 40 for i in range(36))
"""Shares of a range that are tried: 1, 0.975, ... 0.125."""
DAMPING = 0.01
"""As a share of the mean of a Gram matrix's diagonal, as in ``gptq``."""
LEAST_STEP = 1e-30
"""Below it activations count as 0: their step would be no normal number."""


@dataclass(frozen=True, kw_only=True)
class W8A8(StoringPass):
    """Round weights to 8 bits a row, and activations to 8 bits, when the model runs.

    ``w ≈ code * scale``, ``scale = max |w| / 127`` of each output row. ``activations=dynamic``:
    likewise, by ``max |x| / 127`` of each token (the dynamic form of SmoothQuant, arXiv 2211.10438,
    and of LLM.int8(), arXiv 2208.07339, without its outliers); needs no data.
    Unless ``symmetric``, by the least and the greatest number of each token and a zero point
    between them: twice as many codes for what is nearly of one sign, as behind a gelu.
    ``activations=static``: by one step and zero point for all tokens, from calibration data: of
    the range that they span, the share that rounds a sample of tokens with the least squared error.
    Nothing is looked for as the model runs, and the ONNX form is QDQ in standard ops; but a token
    that is larger than those of the data is cut off, and one that is smaller has few codes.
    Measured (``bench.w8a8 quality``): MiniLM's cosine .9974 by token and .9847 in fixed ranges,
    tiny-llama's perplexity 34.73 and 34.91 (source 34.68).

    Weights are rounded to nearest, or with ``feedback`` as by ``gptq``, which needs data.

    Features with outliers leave the others few codes: put ``smooth`` in front, which moves them
    into the weights. For many tokens at once, as encoders have, it is the fastest form on a CPU
    with int8 instructions; for few tokens ``quantize{bits=4}`` reads half the bytes. Tables stay
    whole: with ``quantize{bits=8 group=128 embeddings=8 min_size=1000000}`` before it, which takes
    tables alone, MiniLM is 23.2 MB instead of 58.7. For rows of 128 tokens, one / 32 at once, it is
    then 2.1 / 2.0 times as fast as float32 at a cosine of .9976; with ``smooth{kinds=[q k v fc1]
    divide=true}`` before, ``o`` static, ``q``, ``k``, ``v`` and ``fc2`` not symmetric, and
    ``feedback``, 2.1 / 2.0 at .9995; static 2.5 / 2.4 at .9916; 8-bit weights alone 1.2 / 1.1 at
    .9997 (``bench.encoder_int8``, ONNX Runtime 1.31, one AVX-512 core).
    Weights that are not finite are refused.
    """

    name: ClassVar[str] = "w8a8"
    weights_per_second: ClassVar[float] = 2e8
    activations: Literal["dynamic", "static"] = "dynamic"
    """A range for each token, or one from data for all."""
    symmetric: bool = True
    """Let a token's own range lie around 0."""
    feedback: bool = False
    """Round weights as gptq does, from data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations == "static" and not self.symmetric:
            raise BadInput(
                "w8a8: symmetric=false is for activations=dynamic: a fixed range has a zero point"
            )

    def requires(self) -> Needs:
        names = [*(("range", "tokens") if self.activations == "static" else ())]
        names += ["gram"] if self.feedback else []
        return Needs(stats=tuple(Stat(name, at="linear") for name in names))

    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        wide = weight.float()
        most = wide.abs().amax(1)
        if not bool(torch.isfinite(most).all()):
            raise not_finite(weight, name)
        scales = (most / 127).clamp_min(SMALLEST_SCALE[torch.float32])
        if self.feedback:
            codes = _codes_with_feedback(wide, scales, statistics[Gram])
        else:
            codes = (wide / scales.unsqueeze(1)).round().clamp(-127, 127)
        error = relative_error(weight, codes * scales.unsqueeze(1))
        rows, columns = weight.shape
        attrs: dict[str, Any] = {"in_features": columns, "out_features": rows}
        op = "linear_w8a8"
        if self.activations == "static":
            op = "linear_w8a8_static"
            attrs["step"], attrs["zero"] = fixed_range(statistics[Range], statistics[Tokens].rows)
        else:
            attrs["symmetric"] = self.symmetric
        return Stored(op, {"codes": codes.to(torch.int8), "scales": scales}, error, attrs)

    def predicted_bytes(self, linear: Linear, weight: Weight) -> int:
        types = operand_types(linear.in_features, linear.out_features)
        return sum((t.numel or 0) * t.dtype.itemsize for t in types if t.dtype is not None)


def _codes_with_feedback(weight: Tensor, scales: Tensor, gram: Gram) -> Tensor:
    """Codes ``[N, K]``, of which later ones make up for what earlier ones do to the outputs: see
    ``feedback``."""
    empty = torch.empty(0, dtype=torch.uint8)
    form = Quantized(empty, scales.unsqueeze(1), None, None, 8, 0, weight.shape[1], 0.0)
    by = Feedback.at(gram, DAMPING, act_order=True)
    rounded = rounded_with_feedback(weight, form, by).dequantized()
    return (rounded / form.scales).round()


def fixed_range(span: Range, sample: Tensor) -> tuple[float, int]:
    """The step, a number of float32, and the zero point of codes 0 to 255 that round a sample
    [tokens, K] best, of those whose range is a share of the span that all tokens have."""
    x = sample.float()
    best, least = (1.0, 0), float("inf")
    for share in SHRUNK:
        low, high = share * span.low, share * span.high
        step = float(torch.tensor(max((high - low) / MOST, LEAST_STEP)))
        zero = min(max(round(-low / step), 0), MOST)
        rounded = (x / step).round().add_(zero).clamp_(0, MOST).sub_(zero)
        error = float((rounded * step - x).square().sum())
        if error < least:
            best, least = (step, zero), error
    return best
