"""What both ways to ONNX are held to: attention as torch computes it, and a run of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir
import onnxruntime
import pytest
import torch

TOLERANCE = 2e-5
"""float32 sums in another order, on values of about 1."""


def runner(
    model: onnx_ir.Model, *, optimize: bool = True
) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The model in a session of ONNX Runtime, by inputs."""
    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = onnx_ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]

    def call(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        arrays = session.run(names, {n: t.numpy() for n, t in inputs.items()})
        return {n: torch.from_numpy(a) for n, a in zip(names, arrays, strict=True)}

    return call


def run(
    model: onnx_ir.Model, inputs: Mapping[str, torch.Tensor], *, optimize: bool = True
) -> dict[str, torch.Tensor]:
    return runner(model, optimize=optimize)(inputs)


class Attention(torch.nn.Module):
    def __init__(self, causal: bool, grouped: bool) -> None:
        super().__init__()
        self.causal, self.grouped = causal, grouped

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal, enable_gqa=self.grouped
        )


ATTENTIONS = pytest.mark.parametrize(
    ("kind", "grouped"),
    [("none", False), ("causal", True), ("bool", False), ("bool-keys-only", True), ("float", True)],
)
"""Kinds of masks, and whether heads share keys; of the first sample a query may see nothing."""


def attention(kind: str, grouped: bool) -> tuple[Attention, tuple[torch.Tensor, ...]]:
    """The module and its arguments: 3 samples, 4 heads, 5 queries, 7 keys, width 8."""
    rng = torch.Generator().manual_seed(3)
    q = torch.randn(3, 4, 5, 8, generator=rng)
    k, v = (torch.randn(3, 2 if grouped else 4, 7, 8, generator=rng) for _ in range(2))
    args: tuple[torch.Tensor, ...] = (q, k, v)
    if kind not in ("none", "causal"):
        mask = torch.rand(3, 1, 1 if "keys" in kind else 5, 7, generator=rng) > 0.4
        mask[..., 0] = True
        mask[0] = False
        lowest = torch.finfo(torch.float32).min
        args += (mask if "bool" in kind else torch.zeros(mask.shape).masked_fill(~mask, lowest),)
    return Attention(kind == "causal", grouped), args
