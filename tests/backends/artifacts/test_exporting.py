"""``export`` runs what it wrote before anyone can use it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import onnx_ir
import pytest
import torch
from graphwright.ir.core.errors import BadInput, BoundExceeded
from graphwright.ir.text.graph import parse_graph

exporting: Any = importlib.import_module("graphwright.backends.artifacts.exporting")


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(5, 123)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def graph() -> Any:
    return gw.trace(Linear(), (torch.randn(3, 5),))


def spoiling(spoil: Callable[[onnx_ir.Model], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is another graph than it should be."""
    right = exporting.write_model

    def write(model: onnx_ir.Model, folder: Path) -> None:
        spoil(model)
        right(model, folder)

    monkeypatch.setattr(exporting, "write_model", write)


def test_the_manifest_says_how_it_ran(tmp_path: Path) -> None:
    out = gw.export(graph(), tmp_path / "out")
    runtime = json.loads((out / "graphwright.json").read_text())["verification"]["runtime"]
    assert runtime["optimized"]["rel_l2"] < 1e-6 and runtime["unoptimized"]["rel_l2"] < 1e-6


def test_other_numbers_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = gw.export(graph(), tmp_path / "out")
    before = (out / "graphwright.json").read_bytes()

    def negate(model: onnx_ir.Model) -> None:
        bias = next(v for v in model.graph.initializers.values() if v.shape == onnx_ir.Shape([123]))
        bias.const_value = onnx_ir.tensor(-bias.const_value.numpy(), name=bias.name)

    spoiling(negate, monkeypatch)
    with pytest.raises(
        BoundExceeded, match=r"optimisation on\): the output output is .* 0 from|is not"
    ):
        gw.export(graph(), out)
    assert (out / "graphwright.json").read_bytes() == before


def test_what_the_runtime_rejects_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(model: onnx_ir.Model) -> None:
        next(iter(model.graph)).op_type = "Nonsense"

    spoiling(rename, monkeypatch)
    with pytest.raises(BadInput, match="ONNX Runtime does not load it"):
        gw.export(graph(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_whose_inputs_cannot_be_made_up_takes_samples(tmp_path: Path) -> None:
    lines = 'ir_version 10\nopset "" 20\ninput %x: f32[*]\n%y: f32[*] = neg(%x)\noutput y = %y\n'
    view = parse_graph("onnx graph\n" + lines)
    with pytest.raises(BadInput, match="input x has no type: give samples"):
        gw.export(view, tmp_path / "out")
    gw.export(graph(), tmp_path / "out", samples=[{"x": torch.randn(7, 5)}])
    with pytest.raises(BadInput, match="missing x"):
        gw.export(graph(), tmp_path / "other", samples=[{}])


class Squeezed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(1).relu()


class Joined(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros(0), x.exp(), x.new_zeros(0)], -1)


@pytest.mark.parametrize("module", [Squeezed(), Joined()])
def test_what_torch_passes_over_is_passed_over(module: torch.nn.Module, tmp_path: Path) -> None:
    """A dimension that is not 1 is not squeezed, a tensor of shape [0] joins nothing."""
    x = torch.randn(2, 3, 5)
    out = gw.export(gw.trace(module, (x,)), tmp_path / "out")
    (output,) = gw.compile(out)(x).values()
    assert torch.equal(output, module(x)) or torch.allclose(output, module(x), rtol=1e-6)
