"""Constants that are built into an ONNX graph: shared while they are there, and only then."""

from __future__ import annotations

import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.onnx.view import OnnxView


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


def numbers(view: OnnxView) -> dict[str, float]:
    """The constants that the graph's file would hold."""
    return {name: float(weight.read()) for name, weight in view.weights().items()}


def test_a_constant_that_left_is_not_taken_for_one_that_has_its_name() -> None:
    view = translated(trace(Doubled(), torch.ones(2, 3)))
    output = view.outputs()[0]
    node = view.maker(output)
    first = view.build("add", [view.inputs()[0], 1.5], before=node)
    view.erase_dead(view.maker(first))
    view.drop_unused_weights()
    assert numbers(view) == {}
    second = view.build("add", [view.inputs()[0], 2.5], before=node)
    third = view.build("add", [second, 1.5], before=node)
    fourth = view.build("add", [third, 2.5], before=node)
    view.set_operand(node, 0, fourth)
    assert sorted(numbers(view).values()) == [1.5, 2.5]
    held = [view.weight(view.arguments(view.maker(v))[1]) for v in (second, third, fourth)]
    assert [float(w.read()) for w in held if w is not None] == [2.5, 1.5, 2.5]
