"""Sums before layer norms as the CPU's artifact has them: the same numbers, read back as sums."""

from __future__ import annotations

from collections import Counter

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import lowered
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.vocab.targets import PORTABLE

from ...held_to_torch import TOLERANCE, run


class Normed(torch.nn.Module):
    """Norms of a sum, of a product, and of a sum with a number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.norm(self.norm(x + y) * y) - self.norm(y + 1.0)


@pytest.mark.parametrize(("dtype", "sums"), [(torch.float32, 2), (torch.float16, 0)])
def test_a_sum_of_two_is_kept_apart(dtype: torch.dtype, sums: int) -> None:
    torch.manual_seed(0)
    module, args = Normed().to(dtype), tuple(torch.randn(2, 3, 8, dtype=dtype) for _ in "xy")
    view = gw.trace(module, args)
    canonicalize(view)
    model = lowered(view).model
    assert Counter(node.op_type for node in model.graph)["Sum"] == sums
    assert not any(node.op_type == "Sum" for node in lowered(view, PORTABLE).model.graph)
    inputs = dict(zip(view.input_names(), args, strict=True))
    tolerance = TOLERANCE if sums else 4e-3
    got = run(model, inputs)["output"]
    torch.testing.assert_close(got, module(*args), rtol=tolerance, atol=tolerance)
    again = OnnxView(model.clone())
    canonicalize(again)
    assert Counter(map(again.op, again.nodes())) == Counter(map(view.op, view.nodes()))
