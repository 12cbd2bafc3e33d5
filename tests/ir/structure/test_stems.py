"""Layers are counted as the library counts them: beside stems, necks and learned queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.units import in_halves
from torch.nn.functional import relu, scaled_dot_product_attention

WIDTH, TOKENS, LAYERS = 8, 6, 2


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.o, self.fc = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def attend(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        k, v = self.kv(memory)[:, None].chunk(2, -1)
        out: torch.Tensor = self.o(scaled_dot_product_attention(self.q(x)[:, None], k, v)[:, 0])
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(x, x)
        out: torch.Tensor = x + relu(self.fc(x))
        return out


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
        self.constant = torch.nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.conv = torch.nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 3) for _ in range(LAYERS))


class Stem(Stack):
    """Positions by convolution, as those of wav2vec2."""

    def forward(self, x: torch.Tensor) -> Any:
        x = x + relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x


class Between(Stack):
    """Positions added and scaled between layers, as those of YOLOS; MobileBERT's norms are such."""

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x) * self.constant[:, 0] + self.constant
        return x


class Neck(Stack):
    """The result of each layer leaves the stream, as DPT's."""

    def forward(self, x: torch.Tensor) -> Any:
        taken = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = layer(x)
            taken.append(relu(head(x)))
        return torch.stack(taken).sum(0)


class Queries(Stack):
    """A second stack that starts at learned queries and looks at the first, as DETR's."""

    def forward(self, x: torch.Tensor) -> Any:
        first, second = self.layers
        memory = first(x)
        queries = self.constant.expand(x.shape[0], -1, -1)
        queries = queries + second.attend(queries, queries)
        queries = queries + first.attend(queries, memory)
        return queries + relu(second.fc(queries))


class Detector(Stack):
    """As ``Queries``, which are read in two layers, each with positions that the memory is given
    anew; the decoder's later sums are on every way from the image to the output."""

    def forward(self, x: torch.Tensor) -> Any:
        first, second = self.layers
        memory, places = first(first(x)), self.constant[:, :1]
        queries = torch.zeros_like(self.constant).expand(x.shape[0], -1, -1)
        for _ in self.layers:
            queries = queries + second.attend(queries + self.constant, queries + self.constant)
            queries = queries + first.attend(queries + self.constant, memory + places)
            queries = queries + relu(second.fc(queries))
        return queries


class Mixing(Stack):
    """Tokens are joined without a linear and without attention, as FNet's."""

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = x + torch.cumsum(x, 1)
            x = x + relu(layer.fc(x))
        return x


class Single(torch.nn.Module):
    """A part of a layer alone."""

    def __init__(self, *, attends: bool) -> None:
        super().__init__()
        self.part, self.attends = Layer(), attends

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.part.attend(x, x) if self.attends else relu(self.part.fc(x)))


class Singles(Stack):
    """Attention and feed-forward are layers each, as Nemotron-H's (arXiv 2504.03624)."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (True, False, False, True, False)
        self.layers = torch.nn.ModuleList(Single(attends=kind) for kind in kinds)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Conformers(Stack):
    """A half of the feed-forward before the attention of each layer, and one more behind all."""

    def __init__(self) -> None:
        super().__init__()
        parts = ("before", False), ("attention", True), ("behind", False)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: Single(attends=kind) for name, kind in parts})
            for _ in range(LAYERS)
        )
        self.last = Single(attends=False)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            for name in ("before", "attention", "behind"):
                x = layer[name](x)  # type: ignore[index]
        return self.last(x)


class Numbered(Stack):
    """All linears in one list."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(5 * LAYERS))

    def forward(self, x: torch.Tensor) -> Any:
        for i in range(0, 5 * LAYERS, 5):
            q, k, v = (part(x)[:, None] for part in self.parts[i : i + 3])
            x = x + self.parts[i + 3](scaled_dot_product_attention(q, k, v)[:, 0])
            x = x + self.parts[i + 4](relu(x))
        return x


def test_names_that_count_linears_tell_no_layers() -> None:
    view = trace(Numbered().eval(), kwargs={"x": torch.randn(2, TOKENS, WIDTH)})
    canonicalize(view)
    blocks = recognize(view).blocks
    assert [[sub.attends for sub in block.sub_blocks] for block in blocks] == [[True, False]] * 2


def test_a_layer_begins_where_its_names_do() -> None:
    """As Seamless has its Conformer's (arXiv 2308.11596)."""
    view = trace(Conformers().eval(), kwargs={"x": torch.randn(2, TOKENS, WIDTH)})
    canonicalize(view)
    blocks = recognize(view).blocks
    attends = [[sub.attends for sub in block.sub_blocks] for block in blocks]
    assert attends == [[False, True, False], [False, True, False, False]]


def test_layers_of_one_part_are_told_by_the_names_of_their_weights() -> None:
    inputs = {"x": torch.randn(2, TOKENS, WIDTH)}
    view = trace(Singles().eval(), kwargs=inputs)
    canonicalize(view)
    blocks = recognize(view).blocks
    attends = [[sub.attends for sub in block.sub_blocks] for block in blocks]
    assert attends == [[True], [False], [False], [True], [False]]
    assert [unit.part for unit in in_halves(blocks)] == [""] * 5


@pytest.mark.parametrize(
    ("make", "towers"),
    [(Stem, [0, 0]), (Between, [0, 0]), (Neck, [0, 0]), (Queries, [0, 1]),
     (Detector, [0, 0, 1, 1]), (Mixing, [0, 0])],
)
def test_layers(make: type[Stack], towers: list[int]) -> None:
    torch.manual_seed(0)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    inputs = {"x": torch.randn(2, TOKENS, WIDTH)}
    view = trace(make().eval(), kwargs=inputs, dynamic_shapes=shapes)
    canonicalize(view)
    structure = recognize(view)
    assert [block.tower for block in structure.blocks] == towers
    inside = [len([s for s in block.sub_blocks if s.attends]) for block in structure.blocks]
    assert inside == [0 if make is Mixing else 1] * len(towers)
