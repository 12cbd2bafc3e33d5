"""Graphs without the rounding of activations."""

from __future__ import annotations

from pathlib import Path

import graphwright as gw
import onnx
import torch
from graphwright.backends.runtimes.unrounded import unrounded_file
from graphwright.ir.core.view import View
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.unrounded import unrounded

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def made(level: int) -> View:
    torch.manual_seed(0)
    graph = gw.trace(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU()), (X,))
    return gw.optimize(graph, f"quantize{{bits=4 group=32 accuracy_level={level}}}").graph


def levels(path: Path) -> list[int]:
    nodes = onnx.load(path).graph.node
    return [a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"]


def test_both_forms_give_what_level_0_gives(tmp_path: Path) -> None:
    rounded, exact = made(4), made(0)
    assert unrounded(exact) is exact
    plain = unrounded(rounded)
    (name,) = rounded.input_names()
    (expected,) = sweep(exact, {name: X}).values()
    (actual,) = sweep(plain, {name: X}).values()
    (moved,) = sweep(rounded, {name: X}).values()
    assert torch.equal(actual, expected) and not torch.equal(moved, expected)
    path = gw.export(rounded, tmp_path / "out") / "model.onnx"
    (tmp_path / "plain.onnx").write_bytes(unrounded_file(path))
    assert (levels(path), levels(tmp_path / "plain.onnx")) == ([4], [0])
