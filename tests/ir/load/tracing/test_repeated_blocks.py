"""Blocks that are copied in the graph: which are, and that the graph is the one of all traced."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.fx.view import FxView
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing import repeated_blocks
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep
from torch import Tensor, nn

from .... import models as small_models

LAYERS = 6


@contextlib.contextmanager
def counted(block: type[nn.Module]) -> Iterator[Counter[str]]:
    """How often the forward of a class is run."""
    calls: Counter[str] = Counter()
    forward = block.forward

    @functools.wraps(forward)
    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls["forward"] += 1
        return forward(self, *args, **kwargs)

    block.forward = counting  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        block.forward = forward  # type: ignore[method-assign]


def nodes(view: FxView) -> list[Any]:
    """The graph without the names of its nodes."""
    names: dict[Any, int] = {}
    lines = []
    for node in view.graph.nodes:
        names[node] = len(names)
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{names[n]}")
        value = node.meta.get("val")
        kind = (value.dtype, str(value.shape)) if isinstance(value, Tensor) else str(value)
        path = [where for where, _ in node.meta.get("nn_module_stack", {}).values()]
        target = node.name if node.op == "placeholder" else node.target
        lines.append((target, str(args), kind, path))
    return lines


@pytest.mark.parametrize(
    ("family", "cache", "traced"), [("llama", True, 3 + LAYERS), ("gemma2", False, 5)]
)
def test_the_graph_is_the_one_of_all_blocks_traced(
    family: str, cache: bool, traced: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Gemma 2 every other block has a window: two kinds, each traced twice. With a cache each
    block is asked once what it keeps."""
    model = getattr(small_models, family)(layers=LAYERS).module.model
    model.save_pretrained(tmp_path)
    with counted(type(model.model.layers[0])) as calls:
        copied = load(tmp_path, cache=cache)
    assert calls["forward"] == traced
    monkeypatch.setattr(repeated_blocks, "LEAST", 100)
    whole = load(tmp_path, cache=cache)
    assert isinstance(copied, FxView) and isinstance(whole, FxView)
    assert nodes(copied) == nodes(whole)


class Block(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Scaled(Block):
    """By a constant of its layer, which two blocks already differ in."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) / (1 + int(self.layer_idx))


class Late(Block):
    """The first blocks do the same, and a later one does not."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) if self.layer_idx < 3 else x - self.linear(x)


class Wide(Block):
    """One setting, which one block in the middle has another value of."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__(layer_idx)
        self.factor = 2.0 if layer_idx == 3 else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) * self.factor


class Twice(Block):
    """What it returns lies in a tuple, beside what it was called with."""

    def forward(self, x: Tensor) -> Any:
        return x, self.linear(x)


class Stack(nn.Module):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block(index) for index in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            x = y if isinstance(y, Tensor) else y[0] + y[1]
        return x


@pytest.mark.parametrize(
    ("block", "traced"), [(Block, 3), (Twice, 3), (Wide, 4), (Scaled, LAYERS), (Late, LAYERS)]
)
def test_only_blocks_that_are_alike_are_copied(block: type[Block], traced: int) -> None:
    torch.manual_seed(0)
    module, x = Stack(block).eval(), torch.randn(2, 4)
    with counted(block) as calls:
        view = trace(module, x)
    assert calls["forward"] == traced
    other = torch.randn(5, 4)
    outputs = sweep(view, {"x": other})
    torch.testing.assert_close(next(iter(outputs.values())), module(other))
    assert all("forward" not in vars(layer) for layer in module.layers)


def test_a_block_in_two_places_is_traced_in_both() -> None:
    module = Stack(Block).eval()
    module.layers[4] = module.layers[1]
    with counted(Block) as calls:
        trace(module, torch.randn(2, 4))
    assert calls["forward"] == LAYERS


class Adding(Block):
    """Writes to what it is called with."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.linear(x))


class Watching(Stack):
    """Calls all blocks with one tensor, and keeps a view of what one returned that is copied."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        rows = [layer(x)[:1] if index == 3 else layer(x) for index, layer in enumerate(self.layers)]
        return x + rows[3]


def test_a_view_of_what_a_copied_block_wrote_sees_the_next_write() -> None:
    torch.manual_seed(0)
    module, x = Watching(Adding).eval(), torch.randn(5, 4)
    with counted(Adding) as calls:
        view = trace(module, torch.randn(2, 4))
    assert calls["forward"] == 3
    torch.testing.assert_close(next(iter(sweep(view, {"x": x}).values())), module(x))
