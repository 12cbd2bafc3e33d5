"""A graph in float32, and what it says of two runs in half types."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.artifacts import judging
from graphwright.backends.artifacts.judging import Judge
from graphwright.backends.artifacts.optimization import optimization_alone
from graphwright.ir.core.errors import BoundExceeded, NodeFailed
from graphwright.ir.core.view import View
from graphwright.ir.run.truth import Reference, Truth
from graphwright.ir.run.verify import difference, tolerance
from graphwright.ir.run.widened import sweep_widened


class Lossy(torch.nn.Module):
    """What float16 adds to a stream of large numbers is rounded as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 16)
        self.register_buffer("stream", torch.full((16,), 40.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = self.stream + self.project(x).float().to(x.dtype)
        return torch.nn.functional.gelu(stream - self.stream)


@pytest.fixture(scope="module")
def lossy() -> tuple[View, torch.Tensor, torch.Tensor]:
    """A graph in float16, an input, and what the module gives in float32 of the same numbers."""
    torch.manual_seed(0)
    module, x = Lossy().half(), torch.randn(2, 24, 8).half()
    graph = gw.trace(module, (x,))
    with torch.no_grad():
        return graph, x, deepcopy(module).float()(x.float())


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_nodes_give_what_the_module_gives_in_float32(
    kind: str, lossy: tuple[View, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    graph, x, expected = lossy
    graph = graph if kind == "fx" else gw.load(gw.export(graph, tmp_path / "out"))
    (outputs,) = sweep_widened(graph, [{"x": x}])
    (given,) = outputs.values()
    assert given.dtype == torch.float32
    # The file's own constants, such as those of GELU, are float16.
    assert difference(expected, given).rel_l2 < {"fx": 1e-6, "onnx": 5e-5}[kind]


def test_a_run_as_near_to_float32_as_the_graph_is_right(
    lossy: tuple[View, torch.Tensor, torch.Tensor],
) -> None:
    """The source rounds as the graph does, to the last bit: it cannot tell who is nearer."""
    graph, x, exact = lossy
    samples = [{"x": x}]
    judge = Judge(graph, samples, Reference(graph, samples, Truth()))
    ((name, half),) = judge.expected[0].items()
    moved = half.float() - exact
    other = exact - moved.flip(0)
    assert difference(half, other.half()).rel_l2 > 2 * tolerance(graph)
    judge.judge([{name: other.half()}], "a runtime", "")
    far = (exact + 2 * moved.flip(0)).half()
    with pytest.raises(BoundExceeded, match="its nodes give in float32, from which the graph is"):
        judge.judge([{name: far}], "a runtime", "")


class Overflowing(torch.nn.Module):
    """Of finite numbers beside infinite ones, which float32 does not have there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([(x.abs() + 1) * 60000 * 60000, x], -1)


def test_a_graph_that_is_far_from_float32_lets_nothing_pass() -> None:
    x = torch.ones(2, 4).half()
    graph = gw.trace(Overflowing(), (x,))
    judge = Judge(graph, [{"x": x}], Reference(graph, [{"x": x}], Truth()))
    ((name, given),) = judge.expected[0].items()
    assert given[:, :4].isinf().all()
    judge.judge([{name: given}], "a runtime", "")
    with pytest.raises(BoundExceeded, match="from which the graph is inf"):
        judge.judge([{name: torch.cat([given[:, :4], -given[:, 4:]], -1)}], "a runtime", "")


def test_a_graph_that_does_not_run_in_float32(
    lossy: tuple[View, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source alone decides then, as for one that chooses."""
    graph, x, exact = lossy
    judge = Judge(graph, [{"x": x}], Reference(graph, [{"x": x}], Truth()))
    given = [{"output": exact.half()}]

    def failing(*_: Any) -> None:
        raise NodeFailed("a native node takes float16 alone")

    with monkeypatch.context() as patch:
        patch.setattr(judging, "sweep_widened", failing)
        with pytest.raises(BoundExceeded, match="from which the graph is 0: the artifact is not"):
            judge.judge(given, "a runtime", "")
    with monkeypatch.context() as patch:
        patch.setattr(judging, "chooses", lambda _: True)
        with pytest.raises(BoundExceeded, match="from which the graph is 0: the artifact is not"):
            judge.judge(given, "a runtime", "")
    judge.judge(given, "a runtime", "")


def test_nodes_that_are_others_in_float32_are_no_rounding() -> None:
    run: Any = lambda **_: {"y": torch.ones(3)}  # noqa: E731
    given: Any = ([{}], lambda *_: run, "a runtime")
    assert optimization_alone(b"", *given, graph=[{"y": torch.ones(3)}]).rel_l2 == 0
    with pytest.raises(BoundExceeded, match="in float32 the output y is"):
        optimization_alone(b"", *given, graph=[{"y": torch.full((3,), 2.0)}])
