"""What an export leaves out changes no number and nothing outside of it."""

from __future__ import annotations

import graphwright as gw
import torch
from graphwright.ir.load.tracing.lean_export import lean_export
from torch import nn


class Rotary(nn.Module):
    """A part whose code turns gradients off itself, as rotary embeddings of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            angles = torch.arange(x.shape[-1]) / 3
        return self.linear(x) * self.scale(angles)

    @torch.no_grad()
    def scale(self, angles: torch.Tensor) -> torch.Tensor:
        return angles.cos()


def test_no_grad_leaves_no_mark() -> None:
    module, x = Rotary().eval(), torch.randn(3, 4)
    graph = gw.trace(module, (x,))
    (output,) = gw.compile(graph, backend="eager")(x).values()
    assert torch.allclose(output, module(x))
    with torch.no_grad(), lean_export():
        program = torch.export.export(module, (x,), strict=False)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert {type(node.target) for node in calls} == {torch._ops.OpOverload}
    assert not any("stack_trace" in node.meta for node in calls)


def test_gradients_are_as_they_were_afterwards_and_inside() -> None:
    weight = torch.ones(2, requires_grad=True)
    with lean_export():
        assert (weight * 2).requires_grad
        with torch.no_grad():
            assert not (weight * 2).requires_grad
            with torch.no_grad(), torch.enable_grad():
                assert (weight * 2).requires_grad
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
    with torch.no_grad():
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
