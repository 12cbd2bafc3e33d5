"""What a model's code asks of sizes and does to itself, beyond what the exporter settles."""

from __future__ import annotations

from pathlib import Path

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.tracing.trace import trace
from torch.export import Dim


class Asking(torch.nn.Module):
    """Compares a product of sizes, which no bound of one settles for the exporter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[1] // 10
        return x * 2 if (count - 1) * (count - 1) >= 2 else x * 3


class Changing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.div_(2)
        return x * self.weight


def test_a_comparison_that_is_not_decided_is_told() -> None:
    shapes = {"x": {1: Dim("samples", min=20)}}
    view = trace(Asking(), (torch.ones(2, 200),), dynamic_shapes=shapes, narrow=True)
    assert len(view.source.notes) == 1
    assert "compares sizes of samples in ways that are not decided" in view.source.notes[0]
    (x,) = view.inputs()
    assert view.type(x).shape == (2, "samples")
    with pytest.raises(BadInput, match="tracing failed: Not all values of samples"):
        trace(Asking(), (torch.ones(2, 200),), dynamic_shapes=shapes)


def test_a_forward_that_changes_its_parameters_is_refused() -> None:
    with pytest.raises(BadInput, match=r"changes its own parameter 'weight'.* before .*gw\.trace"):
        trace(Changing(), (torch.ones(2, 4),))


@pytest.mark.parametrize(("block", "noted"), [(16, True), (64, False)])
def test_the_size_up_to_which_an_undecided_graph_is_right_is_said_and_kept_to(
    block: int, noted: bool, tmp_path: Path
) -> None:
    """As of blocks of tokens; where it is right for all sizes, there is nothing to say."""

    class Blocks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, : min(block, x.shape[1])] + x

    shapes = {"x": {1: Dim("seq", max=64)}}
    view = trace(Blocks(), (torch.ones(2, 8),), dynamic_shapes=shapes, narrow=True)
    note = "the graph is for sizes of seq of at most 16"
    assert view.source.notes == ((note,) if noted else ())
    if not noted:
        return
    graphs = [view, gw.export(view, tmp_path / "out", samples=[{"x": torch.ones(2, 8)}])]
    for graph, backend in zip(graphs, ("eager", "onnxruntime"), strict=True):
        run = gw.compile(graph, backend=backend)
        x = torch.randn(2, 16)
        torch.testing.assert_close(run(x=x)["output"], Blocks()(x))
        with pytest.raises(BadInput, match=r"x: seq\w* is 17, and the graph is for .* at most 16"):
            run(x=torch.randn(2, 17))
