"""Whose a norm between two layers is: its names say it, where the graph does not."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.run.sweep import sweep
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 16, 2, 3


class Layer(nn.Module):
    """``first``: its norms stand ahead of its branches, and the stream around them is the norm's
    result (MiniMax); else they stand behind the sums (BERT)."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        for norm in (self.norm, self.norm2):
            nn.init.normal_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) if self.first else x
        split = (n(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        x = self.norm2(x) if self.first else self.norm(x)
        x = x + self.down(x.relu())
        return x if self.first else self.norm2(x)


class Model(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer(first) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x) if self.layers[0].first else x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("first", [True, False])
def test_a_path_is_the_models_own_without_a_layer(first: bool) -> None:
    torch.manual_seed(0)
    model = Model(first).eval()
    ids = torch.randint(0, 11, (2, 7))
    traced: Any = gw.trace(model, ids)
    graphs = [traced, translated(traced)]
    for left in (0, LAYERS - 1):
        kept = [i for i in range(LAYERS) if i != left]
        layers, model.layers = model.layers, nn.ModuleList(model.layers[i] for i in kept)
        want = model(ids)
        model.layers = layers
        recipe = f"path{{blocks={','.join(map(str, kept))}}}"
        for graph in graphs:
            done = gw.optimize(graph, recipe, samples=[{"ids": ids}]).graph
            (got,) = sweep(done, {"ids": ids}).values()
            torch.testing.assert_close(got, want)


class Before(Layer):
    """Norms in its branches."""

    def forward(self, x: Tensor) -> Tensor:
        split = (
            n(self.norm(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for n in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        return x + self.down(self.norm2(x).relu())  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Layers, and a norm behind all of them (PVT v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, WIDTH), nn.LayerNorm(WIDTH)
        nn.init.normal_(self.norm.weight)
        self.layers = nn.ModuleList(Before(first=True) for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)  # type: ignore[no-any-return]


def test_a_norm_behind_a_stage_stays_where_its_last_layer_leaves() -> None:
    torch.manual_seed(0)
    stages = nn.ModuleList([Stage().eval()])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = stages

        def forward(self, ids: Tensor) -> Tensor:
            return stages[0](ids)  # type: ignore[no-any-return]

    ids = torch.randint(0, 11, (2, 7))
    traced: Any = gw.trace(Model().eval(), ids)
    done = gw.optimize(traced, "path{blocks=0,1}", samples=[{"ids": ids}]).graph
    stages[0].layers = nn.ModuleList(stages[0].layers[i] for i in (0, 1))
    (got,) = sweep(done, {"ids": ids}).values()
    torch.testing.assert_close(got, stages[0](ids))
