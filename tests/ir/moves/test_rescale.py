"""The move *rescale*: exact on every family and both kinds, its reasons where it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight, Weight
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.moves import Inlet, find_inlets, rescale
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import compare
from graphwright.ir.structure.recognize import recognize
from torch import Tensor, nn

from ...models import BUILDERS, raised

MADE = {
    # Of the linears of one layer, those whose input can be rescaled; and reasons for others.
    "llama": ("q k v o gate up down head", {}),
    "qwen2": ("q k v o gate up down", {"lm_head": "lm_head is read by others too"}),
    "gemma2": ("q k v o gate up down", {"lm_head": "is read by others too"}),
    "gpt2": ("qkv o fc1", {"mlp.c_proj": "gelu) lies between its input and what makes it"}),
    "opt": ("q k v o fc1 fc2", {"lm_head": "is read by others too"}),
    "bert": ("o", {"0.intermediate.dense": "reads its input too", "0.output.dense": "gelu"}),
    "clip_vision": ("q k v o fc1", {"0.mlp.fc2": "sigmoid (sigmoid) lies between its input"}),
    "vit": ("q k v o fc1", {"0.mlp.fc2": "gelu (gelu) lies between its input"}),
    "t5_encoder": ("q k v o", {}),
}


def kept(weight: Weight, which: str, change: Callable[[Tensor], Tensor]) -> Weight:
    return MemoryWeight(change(weight.read()))


def rescaled(view: View, inlets: list[Inlet]) -> None:
    rng = torch.Generator().manual_seed(0)
    for inlet in inlets:
        factors = torch.rand(len(inlet.rows), generator=rng, dtype=torch.float64) * 3 + 0.3
        rescale(view, inlet, inlet.shared(factors), kept)


@pytest.mark.parametrize("family", MADE)
def test_outputs_stay(family: str) -> None:
    roles, reasons = MADE[family]
    small = BUILDERS[family](layers=1)
    for view in raised(small).values():
        before, structure = sweep(view, small.inputs), recognize(view)
        inlets, refused = find_inlets(view, structure)
        inlet_roles = [linear.role for inlet in inlets for linear in inlet.linears]
        assert set(roles.split()) <= set(inlet_roles)
        for name, reason in reasons.items():
            (why,) = (text for site, text in refused if site.endswith(name))
            assert reason in why
        assert len(inlet_roles) + len(refused) == len(structure.linears), "each is one or the other"
        rescaled(view, inlets)
        for result in compare(before, sweep(view, small.inputs)).values():
            assert 0 < result.rel_l2 < 2e-6


class Gated(nn.Module):
    """A joined gate and up, whose product goes through ``down``; ``leak`` reads one of them too."""

    def __init__(self, leak: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both, self.down, self.leak = nn.Linear(6, 16), nn.Linear(8, 6), leak

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        gate, up = self.both(x)[..., :8], self.both(x)[..., 8:]
        y = self.down(nn.functional.silu(gate) * up)
        return (y, up.mean()) if self.leak else (y,)


@pytest.mark.parametrize("leak", [False, True])
def test_rows_of_a_joined_linear(leak: bool) -> None:
    x = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(1))}
    view = trace(Gated(leak), (), x)
    canonicalize(view)
    inlets, refused = find_inlets(view, recognize(view))
    reasons = dict(refused)
    assert reasons["both"] == "its input comes from outside of the graph"
    if leak:
        assert "reads" in reasons["down"] and not inlets
        return
    (inlet,) = inlets
    assert inlet.names == ("down",) and inlet.rows.tolist() == list(range(8, 16))
    before = sweep(view, x)
    rescaled(view, inlets)
    for result in compare(before, sweep(view, x)).values():
        assert result.rel_l2 < 1e-6


def test_shared_heads_get_one_factor() -> None:
    small = BUILDERS["llama"](layers=1)
    view = raised(small)["fx"]
    inlets, _ = find_inlets(view, recognize(view))
    (inlet,) = (i for i in inlets if i.linears[0].role == "o")
    assert inlet.rows.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    factors = inlet.shared(torch.arange(1, 33).double())
    assert factors[0] == factors[8] == pytest.approx((1 * 9) ** 0.5)
    assert factors[31] == factors[23] == pytest.approx((24 * 32) ** 0.5)


def test_an_input_that_is_an_output() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x)
            return h, self.b(h)

    view = trace(Twice(), (), {"x": torch.zeros(2, 4)})
    canonicalize(view)
    reasons = dict(find_inlets(view, recognize(view))[1])
    assert reasons["b"].endswith("which it reads, is an output")
