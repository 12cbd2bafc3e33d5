"""What both ways to ONNX are held to: attention as torch computes it, and a run of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir
import onnxruntime
import torch

TOLERANCE = 2e-5
"""float32 sums in another order, on values of about 1."""


class SumOfDtypes(torch.nn.Module):
    """``x`` and its weights of four dtypes, ``b0`` to ``b3`` ``[2, 3]``, each as float32."""

    def __init__(self) -> None:
        super().__init__()
        numbers = torch.tensor([[1.5, -2.0, 0.0], [3.0, 0.25, -7.0]])
        for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.uint8, torch.bool)):
            self.register_buffer(f"b{i}", numbers.abs().to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for buffer in self.buffers():
            x = x + x.sum() * buffer.to(torch.float32)
        return x


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


MASKS = {
    "none": None, "causal": None, "bool": "pairs", "bool-keys-only": "keys", "float": "added",
}  # fmt: skip
"""Kinds of attention, and the input that masks each."""
GROUPED = ("causal", "bool-keys-only", "float")
"""Those whose heads share keys."""


class Attentions(torch.nn.Module):
    """An attention of each kind, in their order, of one ``q``, ``k`` and ``v``."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: torch.Tensor,
        keys: torch.Tensor, added: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        masks = {"pairs": pairs, "keys": keys, "added": added}

        def attend(kind: str, heads: int) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k[:, :heads], v[:, :heads], attn_mask=masks.get(MASKS[kind] or ""),
                is_causal=kind == "causal", enable_gqa=kind in GROUPED,
            )  # fmt: skip

        return tuple(attend(kind, 2 if kind in GROUPED else 4) for kind in MASKS)


def attentions() -> dict[str, torch.Tensor]:
    """Their inputs: 3 samples, 4 heads of which 2 may be shared, 5 queries, 7 keys, width 8. Of the
    first sample a query may see nothing."""
    rng = torch.Generator().manual_seed(3)
    q = torch.randn(3, 4, 5, 8, generator=rng)
    k, v = (torch.randn(3, 4, 7, 8, generator=rng) for _ in range(2))
    pairs = torch.rand(3, 1, 5, 7, generator=rng) > 0.4
    pairs[..., 0] = True
    pairs[0] = False
    lowest = torch.finfo(torch.float32).min
    added = torch.zeros(pairs.shape).masked_fill(~pairs, lowest)
    return {"q": q, "k": k, "v": v, "pairs": pairs, "keys": pairs[:, :, :1], "added": added}


def expected_attentions(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch makes of them, by kind: zeros where a query sees nothing."""
    results = dict(zip(MASKS, Attentions()(**inputs), strict=True))
    for kind in ("bool", "bool-keys-only"):
        assert torch.equal(results[kind][0], torch.zeros(4, 5, 8))
    return results
