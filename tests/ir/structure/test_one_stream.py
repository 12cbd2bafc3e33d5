"""Blocks are claimed where one stream runs around each of them, and nowhere else."""

from __future__ import annotations

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from torch import Tensor, nn
from torch.nn import functional

ROWS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
NO_STREAM = "no block is recognised in this model: there is no one residual stream"


class Attend(nn.Module):
    """What attention adds to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        joined: Tensor = self.out(functional.scaled_dot_product_attention(q, k, v))
        return joined


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start, self.end = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(Attend() for _ in range(count))


class Skipping(Layers):
    """Each layer of the way up reads what its partner on the way down read, as in a UNet."""

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        x = self.start(x)
        for layer in self.layers[:2]:
            skips.append(x)
            x = x + layer(x)
        for layer in self.layers[2:]:
            x = self.end(x) * skips.pop()
            x = x + layer(x)
        return x


class Joint(Layers):
    """Text and image are streams of their own, which attention looks at as one (SD3)."""

    def forward(self, x: Tensor) -> Tensor:
        text, image = self.start(x), x
        for layer in self.layers:
            both = layer(torch.cat((text, image), 1))
            text, image = text + both[:, : text.shape[1]], image + both[:, text.shape[1] :]
        return image


class Pictures(Layers):
    """Attention among convolutions, then a latent that its branches do not run around."""

    def __init__(self) -> None:
        super().__init__(2)
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.latent = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
            x = x + self.convolutions[i](x)
            if not i:
                x = self.latent(x)
                x = x + self.convolutions[2](x)
        return x


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(Skipping(4), ROWS), (Joint(2), ROWS), (Pictures(), torch.randn(1, 8, 4, 4))],
)
def test_no_block_where_no_one_stream_runs_around_it(model: nn.Module, inputs: Tensor) -> None:
    view = trace(model.eval(), (inputs,))
    with pytest.raises(BadInput, match=NO_STREAM):
        gw.optimize(view, "drop-blocks{score=random}")
    canonicalize(view)
    structure = recognize(view)
    assert (structure.blocks, len(structure.attentions)) == ((), len(model.layers))  # type: ignore[arg-type]
    assert {linear.block for linear in structure.linears} == {None}


class Rejoined(Layers):
    """Between layers the stream is taken apart, and put together again as it was (Flux)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for layer in self.layers:
            x = x + layer(x)
            x = torch.cat((x[:, :2], x[:, 2:]), 1)
        return x


def test_a_stream_that_is_put_together_as_it_was_goes_on() -> None:
    model = Rejoined(3).eval()
    rerouted = gw.optimize(trace(model, (ROWS,)), "path{blocks=0,2}").graph
    del model.layers[1]
    with torch.no_grad():
        expected = model(ROWS)
    (actual,) = sweep(rerouted, {"x": ROWS}).values()
    torch.testing.assert_close(actual, expected)
