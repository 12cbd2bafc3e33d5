"""A small model for passes, as an FX graph and as an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import Weight
from graphwright.ir.load.tracing.trace import trace

WIDTH, INNER, VOCAB = 32, 40, 17


class Toy(torch.nn.Module):
    """ids ``[batch, seq]`` to logits ``[batch, seq, 17]``: two gated layers between two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.gate = torch.nn.Linear(WIDTH, INNER)
        self.up = torch.nn.Linear(WIDTH, INNER, bias=False)
        self.down = torch.nn.Linear(INNER, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(x)


def toy(change: Callable[[Toy], object] | None = None) -> Toy:
    """The toy with weights from one seed; ``change`` edits it before it is traced."""
    torch.manual_seed(0)
    module = Toy().eval()
    if change is not None:
        with torch.no_grad():
            change(module)
    return module


def ids() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {"ids": torch.randint(0, VOCAB, (3, 5), generator=rng)}


@pytest.fixture(scope="session")
def toy_inputs() -> dict[str, torch.Tensor]:
    return ids()


@pytest.fixture(scope="session")
def toy_graph() -> Callable[..., View]:
    """``toy_graph(kind, change=None)``: the toy's graph of that kind."""
    plain = trace(toy(), (), ids())

    def make(kind: str, change: Callable[[Toy], object] | None = None) -> View:
        traced = plain.copy() if change is None else trace(toy(change), (), ids())
        return traced if kind == "fx" else translated(traced)

    return make


@pytest.fixture
def graph(toy_graph: Callable[..., View]) -> View:
    return toy_graph("fx")


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """``with no_reads():`` within it, reading a weight of more than one number fails."""

    @contextmanager
    def guard() -> Iterator[None]:
        with monkeypatch.context() as patch:
            for kind in _subclasses(Weight):
                if "read" in vars(kind):
                    patch.setattr(kind, "read", _refusing(vars(kind)["read"]))
            yield

    return guard


def _subclasses(kind: type) -> list[type]:
    return [subclass for sub in kind.__subclasses__() for subclass in (sub, *_subclasses(sub))]


def _refusing(read: Callable[[Weight], torch.Tensor]) -> Callable[[Weight], torch.Tensor]:
    def refuse(self: Weight) -> torch.Tensor:
        assert self.numel <= 1, f"a {list(self.shape)} weight was read"
        return read(self)

    return refuse
