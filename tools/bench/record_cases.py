"""What a record is made of: models, the graphs that they start as, and recipes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ... import Recipe, load
from ...ir.core.view import View
from ...passes.recipe import recipe_names
from ..data.calibration import read as read_calibration
from . import record_graphs

FX, FX_CACHE, ONNX, ONNX_CACHE = "fx", "fx+cache", "onnx", "onnx+cache"
STARTS = {
    "tiny-llama": (FX, FX_CACHE, ONNX, ONNX_CACHE),
    "tiny-llava": (FX, FX_CACHE, ONNX, ONNX_CACHE),
    "tiny-llava-next": (FX, ONNX_CACHE),
    "tiny-vit": (FX, ONNX),
    "minilm": (FX, ONNX),
}
ROWS = 2
"""Samples that every case is run on."""
CALIBRATION_ROWS, CALIBRATION_TOKENS = 16, 64
"""Of text: 1024 tokens, more than the widest linear of the tiny models has inputs."""
COUNTED = 64
"""Numbers from which on a weight is the model's own: smaller ones are constants of shapes."""

EVERYWHERE = (
    "quantize{bits=4 group=32}",
    "drop-blocks",
    "path{blocks=0-2,2,4-5}",
    "fastervlm{keep=50%}",
    "fastv{keep=25%}",
    "random-tokens{keep=50%}",
    "uniform-tokens{keep=25%}",
)
WITHOUT_CACHE = (
    "quantize{bits=2 group=32}",
    "quantize{bits=3 group=32}",
    "quantize{bits=8 group=32}",
    "hqq{bits=3 group=64}",
    "easyquant{bits=4}",
    "quantize{bits=3 group=32},eora{rank=8}",
    "quantize{bits=3 group=32},svd-compensate{rank=8}",
    "bitstack{blocks=4 scaling=none}",
)
"""What these do to a linear has nothing to do with a cache: beside one, the recipes say enough."""
FX_ALONE = (
    "clean{optional=true},fold-constants{optional=true}",
    "quantize{bits=4 group=0 symmetric=false scales=float32}",
    "quantize{bits=3 group=128 mse=true}",
    "quantize{bits=4 accuracy_level=4 exclude=[*.2.*]}",
    "hqq{bits=4 round_zero=true kinds=[q k v]}",
    "easyquant{bits=3 group=64 per_row=true}",
    "hqq{bits=2 group=32},eora{budget=.5}",
    "quantize{bits=2 group=32},eora{rank=8 propagate=dense factors=float32}",
    "drop-blocks{count=2 score=angular}",
    "drop-blocks{count=2 score=random seed=1},quantize{bits=4}",
    "uniform-tokens{keep=50%},fastv{keep=25% layer=3}",
)
"""Options: what they do is decided before the graph's kind matters."""


@dataclass(frozen=True)
class Case:
    """A recipe on a zoo model that starts as one kind of graph."""

    model: str
    start: str
    recipe: str

    @property
    def row(self) -> str:
        return f"{self.start}/{self.recipe}"

    def __str__(self) -> str:
        return f"{self.model}/{self.row}"

    def passes(self) -> Recipe:
        """The recipe: a shipped one by its name, or text."""
        shipped = self.recipe in recipe_names()
        return Recipe.load(self.recipe) if shipped else Recipe.parse(self.recipe)


def all_cases() -> Iterator[Case]:
    """Every case, those of one graph in a row."""
    for model, starts in STARTS.items():
        for start in starts:
            for recipe in _recipes(model, start):
                yield Case(model, start, recipe)


def _recipes(model: str, start: str) -> tuple[str, ...]:
    shipped = tuple(recipe_names())
    if model == "minilm":  # the others say the same of models a fifth of its size
        return ("w4", "w8", "quantize{bits=4 group=32}")
    if model == "tiny-llava-next" or start in (FX_CACHE, ONNX_CACHE):
        return shipped + EVERYWHERE  # of the former the linears are those of tiny-llava
    alone = FX_ALONE if start == FX else ()
    return shipped + EVERYWHERE + WITHOUT_CACHE + alone


class Subject:
    """A zoo model: its graphs, and the data that all of its cases share. Loaded when asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._graphs: dict[str, View] = {}

    def graph(self, start: str) -> View:
        """The graph that cases start from; an ONNX graph is the one kept in ``folder``."""
        if start not in self._graphs:
            cache = start in (FX_CACHE, ONNX_CACHE)
            plain = FX_CACHE if cache else FX
            self._graphs[start] = (
                load(f"zoo:{self.name}", cache=cache)
                if start == plain
                else record_graphs.open_graph(self._file(cache), self.graph(FX))
            )
        return self._graphs[start]

    def keep_graph(self, start: str) -> None:
        """Write the ONNX graph that is lacking in ``folder``."""
        cache = start == ONNX_CACHE
        if start in (ONNX, ONNX_CACHE) and not self._file(cache).is_file():
            record_graphs.keep_graph(self._file(cache), self.graph(FX_CACHE if cache else FX))

    def _file(self, cache: bool) -> Path:
        return self.folder / f"{self.name}{'-cache' if cache else ''}.onnx.gz"

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The first rows of the model's own samples."""
        first = self.graph(FX).source.samples[0]
        return {name: tensor[:ROWS] for name, tensor in first.items()}

    @cached_property
    def calibration(self) -> list[dict[str, torch.Tensor]]:
        graph = self.graph(FX)
        length = None if "pixel_values" in graph.input_names() else CALIBRATION_TOKENS
        spec = f"zoo:{self.name}"
        return read_calibration(spec, graph, samples=CALIBRATION_ROWS, length=length).batches
