"""Types of FX values whose sizes are values themselves, as a change of them is followed."""

from __future__ import annotations

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import InvalidGraph
from graphwright.ir.fx.dims import expanded, reshaped
from graphwright.ir.fx.read import FxReader
from torch import nn
from torch.export import Dim


class Resizing(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, seq, width = x.shape
        heads = x.view(batch, seq, 2, -1)
        known = heads.isnan() & (x[..., :1] > 0).view(batch, -1, 1, 1)
        more = heads.new_ones(1, 1, 2, 1).expand(batch, seq, -1, width)
        return heads.reshape(-1, width // 2), known, more, x.reshape(batch, -1)


def test_sizes_that_are_operands_are_worked_out_without_a_fake_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each node's type anew is what the exporter said, of whose words all but sizes are read."""
    view = gw.trace(Resizing(), torch.randn(2, 3, 8), dynamic_shapes=({0: Dim("b"), 1: Dim("s")},))
    asked = []
    computed = FxReader._computed

    def seen(self: FxReader, node: torch.fx.Node) -> object:
        asked.append(self.op(node))
        return computed(self, node)

    monkeypatch.setattr(FxReader, "_computed", seen)
    for node in [n for n in view.nodes() if view.op(n) != "size"]:
        assert not view.refresh_type(node), view.name(node)
    assert {"reshape", "expand", "logical_and"} <= {view.op(node) for node in view.nodes()}
    assert not {"reshape", "expand", "logical_and"} & set(asked)


def test_a_reshape_that_does_not_fit_is_refused() -> None:
    view = gw.trace(Resizing(), torch.randn(2, 3, 8), dynamic_shapes=({0: Dim("b"), 1: Dim("s")},))
    node = next(n for n in view.nodes() if view.op(n) == "reshape")
    with pytest.raises(InvalidGraph, match="does not fit its operands"):
        view.set_operand(node, 3, 3)


def test_negative_sizes_that_torch_refuses_are_left_to_it() -> None:
    assert expanded([3], [2, -1]) == [2, 3]
    assert expanded([3], [-1, 3]) is None
    assert reshaped([3, 4], [6, -1]) == [6, 2]
    assert reshaped([3, 4], [-1, -4]) is None
