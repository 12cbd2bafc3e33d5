"""Experts run on the rows that picked them; what only looks like an expert runs on all."""

from __future__ import annotations

import pytest
import torch
from graphwright.backends.onnx.lowering import lowered
from graphwright.backends.registry import compile as compile_model
from graphwright.ir.load.tracing.trace import trace

WIDTH, EXPERTS = 8, 3


class Experts(torch.nn.Module):
    def __init__(self, empty: float = 0.0, mixes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 12) for _ in range(EXPERTS))
        self.down = torch.nn.ModuleList(torch.nn.Linear(12, WIDTH) for _ in range(EXPERTS))
        self.empty, self.mixes = empty, mixes

    def forward(
        self, x: torch.Tensor, picked: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        empty = torch.full_like(x[:, :EXPERTS], self.empty)
        shares = empty.scatter(1, picked, weights)
        out = torch.zeros_like(x)
        for index, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            inner = torch.nn.functional.silu(up(x))
            if self.mixes:
                inner = inner.softmax(0)
            out = out + down(inner) * shares[:, index, None]
        return out


@pytest.mark.parametrize(
    ("model", "routed"),
    [(Experts(), EXPERTS), (Experts(empty=0.5), 0), (Experts(mixes=True), EXPERTS)],
    ids=["experts", "all-have-a-share", "behind-what-mixes-rows"],
)
def test_an_expert_runs_on_the_rows_that_picked_it(model: Experts, routed: int) -> None:
    x, weights = torch.randn(4, WIDTH), torch.rand(4, 2)
    picked = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0]])
    inputs = {"x": x, "picked": picked, "weights": weights}
    rows = torch.export.Dim("rows")
    shapes = {name: {0: rows} for name in inputs}
    view = lowered(trace(model.eval(), kwargs=inputs, dynamic_shapes=shapes))
    assert sum(node.op_type == "NonZero" for node in view.model.graph) == routed
    run = compile_model(view)
    for count in (4, 1):
        batch = {name: value[:count] for name, value in inputs.items()}
        (output,) = run(**batch).values()
        with torch.no_grad():
            torch.testing.assert_close(output, model(**batch), rtol=1e-5, atol=1e-6)


def test_experts_in_half_floats_run_on_a_cpu() -> None:
    """Whose provider adds no float16 in the places that rows came from."""
    x, weights = torch.randn(4, WIDTH).half(), torch.rand(4, 2).half()
    inputs = {"x": x, "picked": torch.tensor([[0, 2], [2, 0], [0, 1], [2, 0]]), "weights": weights}
    model = Experts().eval().half()
    view = lowered(trace(model, kwargs=inputs))
    assert sum(node.op_type == "ScatterND" for node in view.model.graph) == EXPERTS
    (output,) = compile_model(view)(**inputs).values()
    with torch.no_grad():
        torch.testing.assert_close(output, model(**inputs), rtol=2e-3, atol=2e-3)
