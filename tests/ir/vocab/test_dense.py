"""What matrix a linear multiplies by, whatever form its weight has."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.core.errors import Refusal
from graphwright.ir.core.view import View
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.ops import OWN_OPS, OwnOp, Sample
from graphwright.ir.vocab import dense_weight


class Linears(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 7).half())
        self.bias = torch.nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        return linear(x, w).relu() + linear(x, self.weight.float(), self.bias)


@pytest.fixture(scope="module")
def view() -> View:
    return trace(Linears(), (torch.randn(3, 7), torch.randn(5, 7)), dynamic_shapes={})


def test_a_weight_behind_a_cast(view: View) -> None:
    node = [n for n in view.nodes() if view.op(n) == "linear"][1]
    handle = view.weights()["weight"]
    assert torch.equal(dense_weight(view, node), handle.read().float())


def test_what_is_no_linear_or_no_constant_is_refused(view: View) -> None:
    nodes = {view.op(n): n for n in reversed(list(view.nodes()))}
    with pytest.raises(Refusal, match=r"relu \(aten.relu.default\) is not a linear"):
        dense_weight(view, nodes["relu"])
    with pytest.raises(Refusal, match="w, an operand of linear, is not a constant"):
        dense_weight(view, nodes["linear"])


class Own(torch.nn.Module):
    """One op of ours with its sample's constants as buffers."""

    def __init__(self, op: OwnOp, sample: Sample) -> None:
        super().__init__()
        self.op, self.attrs, self.count = op.overload, dict(sample.attrs), len(sample.operands)
        for i, operand in enumerate(sample.operands[1:], 1):
            self.register_buffer(f"o{i}", operand)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = [getattr(self, f"o{i}") for i in range(1, self.count)]
        result: torch.Tensor = self.op(x, *rest, **self.attrs)
        return result


@pytest.mark.parametrize("name", ["linear_nbit", "linear_bitstack", "sparse_linear"])
def test_a_stored_linear(name: str) -> None:
    op = OWN_OPS[name]
    sample = op.samples()[1]  # with a bias, where the op has one
    x = sample.operands[0]
    assert x is not None
    view = trace(Own(op, sample), (x,), dynamic_shapes={})
    (node,) = view.nodes()
    free = [None if i == op.bias else o for i, o in enumerate(sample.operands)]
    expected = op.reference(torch.eye(x.shape[-1]), *free[1:], **sample.attrs).T
    assert torch.equal(dense_weight(view, node), expected)
