"""What ships goes together: the zoo's models, the built-in recipes and the quantizers, from a
module and from an ONNX file, with a cache and without. A run ends well, or it says why it cannot.

The command is run whole but for loading, which all recipes of a source share, and on two short
rows. ``CHOSEN`` covers each source and each recipe; ``EVERY`` is all that there is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from graphwright.backends import export
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.load.zoo import ZOO
from graphwright.passes.recipe import Recipe, recipe_names
from graphwright.tools.run import pipeline

WRITING = ("tiny-llama", "tiny-llava", "tiny-llava-next")
SHOWN = ("tiny-llava", "tiny-llava-next")
TEXT = ("input_ids", "attention_mask")
QUANTIZERS = (
    "quantize{bits=2 group=32}",
    "quantize{bits=3 group=64 symmetric=false}",
    "quantize{bits=4 group=0}",
    "quantize{bits=8 group=64}",
    "quantize{bits=4 accuracy_level=4}",
    "easyquant{bits=4}",
    "hqq{bits=2 group=16}",
    "magnitude{pattern=2:4}",
    "sparsegpt,dsnot",
    "quantize{bits=3 group=32},svd-compensate{rank=8}",
    "quantize{bits=2 group=32},eora{rank=8}",
    "bitstack{blocks=3}",
)
NO_TOWER = "fastervlm: the model has no vision tower: it takes no images"
NO_TEXT = "fastervlm: the model has no language model"


@dataclass(frozen=True)
class Source:
    model: str
    kind: str
    cache: bool

    def __str__(self) -> str:
        return f"{self.model}/{self.kind}" + ("+cache" if self.cache else "")


@dataclass(frozen=True)
class Case:
    source: Source
    recipe: str

    def __str__(self) -> str:
        return f"{self.source}/{self.recipe}"

    @property
    def refusal(self) -> str:
        """What the run says where it cannot be done; else empty."""
        if not self.recipe.startswith("vlm-") or self.source.model in SHOWN:
            return ""
        return NO_TEXT if self.source.model == "tiny-vit" else NO_TOWER


SOURCES = [
    Source(model, kind, cache)
    for model in ZOO
    for kind in ("fx", "onnx")
    for cache in ((False, True) if model in WRITING else (False,))
]
RECIPES = (*recipe_names(), *QUANTIZERS)
EVERY = [Case(source, recipe) for source in SOURCES for recipe in RECIPES]
TRIED = {
    "tiny-vit/fx": ("any-size", "w4", "sparsegpt,dsnot", "vlm-small"),
    "tiny-vit/onnx": ("magnitude{pattern=2:4}", "quantize{bits=4 accuracy_level=4}"),
    "tiny-llama/fx": ("hqq{bits=2 group=16}", "quantize{bits=2 group=32}", "vlm-fast"),
    "tiny-llama/onnx": ("quantize{bits=3 group=32},svd-compensate{rank=8}",),
    "tiny-llama/fx+cache": ("w4-eora", "easyquant{bits=4}"),
    "tiny-llama/onnx+cache": ("bitstack{blocks=3}",),
    "tiny-llava/fx": ("vlm-small",),
    "tiny-llava/onnx": ("vlm-fast",),
    "tiny-llava/fx+cache": ("w8",),
    "tiny-llava/onnx+cache": ("w8",),
    "tiny-llava-next/fx": ("quantize{bits=4 group=0}",),
    "tiny-llava-next/onnx": ("quantize{bits=3 group=64 symmetric=false}",),
    "tiny-llava-next/fx+cache": ("quantize{bits=2 group=32},eora{rank=8}",),
    "tiny-llava-next/onnx+cache": ("quantize{bits=8 group=64}",),
    "minilm/fx": ("w8",),
    "minilm/onnx": ("w8",),
}
CHOSEN = [case for case in EVERY if case.recipe in TRIED.get(str(case.source), ())]
"""Each recipe once and each source, the slow recipes on small sources; what once ended in an error;
a recipe for images on a source without a tower and on one without a text."""


class Sources(dict[Source, View]):
    """Their graphs, opened once, with two rows to be judged on."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, source: Source) -> View:
        self[source] = self._shown(source) if source.kind == "fx" else self._written(source)
        return self[source]

    def _shown(self, source: Source) -> View:
        view = load(f"zoo:{source.model}", cache=source.cache if source.model in WRITING else None)
        # A prompt with an image is as long as its features; of text alone the beginning will do.
        cut = slice(None) if source.model in SHOWN else slice(48)
        rows = view.source.samples[0].items()
        view.source.samples = [{n: t[:2, cut] if n in TEXT else t[:2] for n, t in rows}]
        return view

    def _written(self, source: Source) -> View:
        module = self[replace(source, kind="fx")]
        folder = export(module, self._folder / f"{source.model}-{source.cache}")
        view = load(folder / "model.onnx")
        view.source.samples = module.source.samples
        return view


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_what_ships_goes_together(
    case: Case, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: sources[case.source].copy())
    shipped = case.recipe in recipe_names()
    recipe = Recipe.load(case.recipe) if shipped else Recipe.parse(case.recipe)
    data = {"calibration": f"zoo:{case.source.model}", "calibration_samples": 4}
    learns = any(pass_.requires().data for pass_ in recipe.passes)
    request = pipeline.Request(
        f"zoo:{case.source.model}", recipe, tmp_path / "out", **(data if learns else {})
    )
    if case.refusal:
        with pytest.raises(BadInput, match=case.refusal):
            pipeline.run(request, lambda *_: None)
        return
    done = pipeline.run(request, lambda *_: None)
    assert any(step.sites for step in done.passes)
    assert {output.rel_l2 is not None for output in done.verification.outputs} == {True}


def test_the_cases_cover_what_ships() -> None:
    assert {case.source for case in CHOSEN} == set(SOURCES)
    assert {case.recipe for case in CHOSEN} == set(RECIPES)
    assert {(c.source.kind, c.recipe) for c in CHOSEN if c.source.cache} >= {("fx", "w8")}
