"""Rotary positions as an artifact for the CPU has them: one node, as torch computes it."""

from __future__ import annotations

from collections import Counter

import onnx_ir
import pytest
import torch
from graphwright.backends.onnx.lowering import lowered
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.onnx.view import OnnxView

from ...held_to_torch import TOLERANCE, run

HEADS, WIDTH = 3, 8


class Turned(torch.nn.Module):
    """Heads that are turned by angles of positions, as transformers turns them."""

    def __init__(self, *, one_table: bool = True, shared: bool = False) -> None:
        super().__init__()
        self.one_table, self.shared = one_table, shared
        self.register_buffer("frequencies", 1.0 / 100.0 ** (torch.arange(0, WIDTH, 2) / WIDTH))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.shared:
            positions = positions[:1]
        angles = positions[:, :, None].float() * self.frequencies
        other = angles if self.one_table else angles + 1.0
        wide = torch.cat((angles, other), -1)
        cos, sin = (1.5 * table[:, None] for table in (wide.cos(), wide.sin()))
        half = WIDTH // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos + turned * sin


def spelled(module: torch.nn.Module) -> tuple[onnx_ir.Model, dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, HEADS, 5, WIDTH, generator=rng)
    positions = torch.tensor([[0, 0, 0, 1, 2], [7, 8, 9, 10, 11]])
    dim = torch.export.Dim
    sizes = {0: dim("batch"), 2: dim("tokens")}, {0: dim("batch"), 1: dim("tokens")}
    view = trace(module, (x, positions), dynamic_shapes=sizes)
    canonicalize(view)
    names = view.input_names()
    return lowered(view).model, dict(zip(names, (x, positions), strict=True))


def kinds(model: onnx_ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("shared", [False, True])
def test_one_node_turns_heads_and_is_read_back(shared: bool) -> None:
    module = Turned(shared=shared)
    model, inputs = spelled(module)
    counts = kinds(model)
    assert (counts["RotaryEmbedding"], counts["Neg"]) == (1, 0)
    expected = module(*inputs.values())
    for optimize in (True, False):
        got = run(model, inputs, optimize=optimize)["output"]
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    view = OnnxView(model.clone())
    canonicalize(view)
    assert [view.op(node) for node in view.nodes()].count("rope") == 1
    assert kinds(lowered(view).model) == counts


def test_tables_of_two_halves_stay_as_they_are() -> None:
    module = Turned(one_table=False)
    model, inputs = spelled(module)
    assert (kinds(model)["RotaryEmbedding"], kinds(model)["Neg"]) == (0, 1)
    got = run(model, inputs)["output"]
    torch.testing.assert_close(got, module(*inputs.values()), rtol=TOLERANCE, atol=TOLERANCE)
