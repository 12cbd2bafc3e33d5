"""Types of linears, products and norms while tracing are those of what torch computes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import graphwright as gw
import pytest
import torch
import torch._prims_common as prims
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.tracing.lean_export import lean_export
from graphwright.ir.load.tracing.short_types import short_types
from torch import nn

aten = torch.ops.aten
RULED = (aten.linear.default, aten.matmul.default, aten.layer_norm.default)


class Ruled(nn.Module):
    """Each op on operands side by side in memory, on views, of one dimension and broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.plain = nn.Linear(4, 6), nn.Linear(4, 5, bias=False)
        self.norm, self.bare = nn.LayerNorm(4), nn.LayerNorm((3, 4), elementwise_affine=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Iterator[torch.Tensor]:
        turned = y.transpose(1, 2)  # [batch, 4, seq]
        yield self.linear(x)
        yield self.plain(turned.transpose(1, 2))
        yield self.linear(x[0, 0])
        yield self.norm(turned.transpose(1, 2))
        yield self.norm(x[:, ::2])
        yield self.bare(x[:, :3])
        yield y @ turned
        yield x.transpose(1, 2) @ y
        yield x @ self.linear.weight.T
        yield self.linear.weight @ turned
        yield x[:, None] @ turned[:1]
        yield x[0] @ x[0, 0]


def test_types_are_those_of_what_torch_computes() -> None:
    module, shapes = Ruled().eval(), (2, 5, 4)
    inputs = (torch.randn(shapes), torch.randn(shapes))

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ruled = module

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
            return list(self.ruled(x, y))

    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq", min=4)
    dims = ({0: batch, 1: seq},) * 2
    with torch.no_grad(), lean_export(), short_types():
        program = torch.export.export(Listed(), inputs, dynamic_shapes=dims, strict=False)
    nodes = {n.name: n for n in program.graph.nodes if n.target in RULED}
    assert {n.target for n in nodes.values()} == set(RULED)
    assert any(isinstance(d, torch.SymInt) for n in nodes.values() for d in n.meta["val"].shape)
    computed: dict[str, torch.Tensor] = {}

    class Watched(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> object:
            result = super().run_node(node)
            if node.name in nodes:
                computed[node.name] = result
            return result

    Watched(program.module(check_guards=False)).run(*inputs)
    assert computed.keys() == nodes.keys()
    for name, node in nodes.items():
        known, real = node.meta["val"], computed[name]
        sizes = [[getattr(getattr(d, "node", None), "hint", d) for d in of]
                 for of in (known.shape, known.stride())]  # fmt: skip
        assert sizes == [list(real.shape), list(real.stride())], name
        assert known.dtype == real.dtype


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: nn.functional.linear(x, torch.ones(3, 5)), "same reduction dim"),
        (lambda x: x @ torch.ones(2, 5, 3), "size"),
        (lambda x: nn.functional.layer_norm(x, (5,)), r"normalized_shape"),
    ],
)
def test_what_does_not_fit_is_said_in_torch_s_words(function: object, words: str) -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert callable(function)
            made: torch.Tensor = function(x)
            return made

    with pytest.raises(BadInput, match=words):
        gw.trace(Wrong(), torch.randn(2, 4))


def test_a_rule_says_nothing_where_gradients_are_asked_for() -> None:
    """What it makes anew has none: the graph of a force was a constant."""

    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            force: torch.Tensor = torch.func.grad(lambda at: self.energy(at).sum())(x)
            return force

    with pytest.raises(BadInput, match="functorch"):
        gw.trace(Force(), torch.randn(2, 4))


def test_threads_trace_one_by_one_and_leave_torch_as_it_was() -> None:
    before = (torch.no_grad.__enter__, prims.is_contiguous, logging.root.manager.disable)
    traced: list[gw.Graph] = []

    def trace() -> None:
        traced.append(gw.trace(nn.Linear(4, 4), torch.randn(2, 4)))

    threads = [threading.Thread(target=trace) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(traced) == len(threads)
    assert before == (torch.no_grad.__enter__, prims.is_contiguous, logging.root.manager.disable)


def test_what_another_thread_entered_before_an_export_it_leaves_during_it() -> None:
    outside = torch.no_grad()
    outside.__enter__()
    with lean_export():
        outside.__exit__(None, None, None)
    assert torch.is_grad_enabled()


def test_the_ops_are_as_they_were_afterwards() -> None:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    before = [op.py_kernels.get(key) for op in RULED]
    with pytest.raises(ZeroDivisionError), short_types():
        assert [op.py_kernels.get(key) for op in RULED] != before
        raise ZeroDivisionError
    assert [op.py_kernels.get(key) for op in RULED] == before
