"""``python -m graphwright.tools.bench.shipped``: does what ships go together?

The zoo's models, the built-in recipes and the quantizers, from a module and from an ONNX file, with
a cache and without: 288 runs of the command, each whole but for loading, which all recipes of a
source share, and on two short rows. A run ends well, or it says why it cannot.
``--only 'tiny-vit/*'`` runs a part.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.table import Table

from ...backends import export
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.zoo import ZOO
from ...passes.recipe import Recipe, recipe_names
from ..report.manifest import Manifest
from ..run import pipeline
from .record import FOLDER
from .record_graphs import open_graph

MODELS = tuple(name for name in ZOO if name not in ("tiny-llava-details", "tiny-video"))
"""Of the zoo; the graphs of those are tiny-llava's and tiny-llava-next's."""
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
    """A model of the zoo as one kind of graph."""

    model: str
    kind: str
    cache: bool

    def __str__(self) -> str:
        return f"{self.model}/{self.kind}" + ("+cache" if self.cache else "")


@dataclass(frozen=True)
class Case:
    """A recipe on a source."""

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
    for model in MODELS
    for kind in ("fx", "onnx")
    for cache in ((False, True) if model in WRITING else (False,))
]
RECIPES = (*recipe_names(), *QUANTIZERS)
EVERY = [Case(source, recipe) for source in SOURCES for recipe in RECIPES]


class Sources(dict[Source, View]):
    """Their graphs, opened once, with two rows to be judged on. ONNX graphs are those that
    ``tests/record`` keeps, or exported where it keeps none."""

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
        path = FOLDER / f"{source.model}{'-cache' * source.cache}.onnx.gz"
        same = replace(source, kind="fx")
        if path.is_file():
            # Any of the model's graphs has the weights, and the samples.
            other = replace(same, cache=not source.cache)
            module = self[other if other in self else same]
            view = open_graph(path, module)
        else:
            module = self[same]
            folder = export(module, self._folder / f"{source.model}-{source.cache}")
            view = load(folder / "model.onnx")
        view.source.samples = module.source.samples
        view.source.folder = module.source.folder  # where its tokenizer lies
        return view


def run(case: Case, sources: Sources, out: Path) -> Manifest:
    """The manifest of a case; its artifact lies in ``out``. Raises as ``pipeline.run``."""
    shipped = case.recipe in recipe_names()
    recipe = Recipe.load(case.recipe) if shipped else Recipe.parse(case.recipe)
    model = f"zoo:{case.source.model}"
    learns = any(pass_.requires().data for pass_ in recipe.passes)
    request = pipeline.Request(model, recipe, out)
    if learns:
        request = replace(request, calibration=model, calibration_samples=4)
    view = sources[case.source]
    with mock.patch.object(pipeline, "load", lambda *_, **__: view.copy()):
        return pipeline.run(request, lambda *_: None)


def outcome(case: Case, sources: Sources) -> tuple[str, str]:
    """``done``, ``refused`` or ``failed``, and what was said."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = run(case, sources, Path(folder) / "out")
    except BadInput as error:
        as_it_should = case.refusal and case.refusal in str(error)
        return ("refused" if as_it_should else "failed"), str(error)
    except Exception:
        return "failed", traceback.format_exc(limit=-2)
    if case.refusal or not any(step.sites for step in done.passes):
        return "failed", "a refusal was due" if case.refusal else "nothing was done"
    return "done", ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; print what failed and a table."""
    parser = argparse.ArgumentParser(prog="shipped", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="*", metavar="GLOB", help="cases: MODEL/KIND/RECIPE")
    chosen = parser.parse_args(arguments).only
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        sources = Sources(Path(folder))
        for case in (case for case in EVERY if fnmatch.fnmatchcase(str(case), chosen)):
            start = time.process_time()
            what, message = outcome(case, sources)
            counts[str(case.source), what] += 1
            print(f"{what} {time.process_time() - start:.1f} s {case}: {message}", file=sys.stderr)
    table = Table()
    for name in ("source", "done", "refused in words", "failed"):
        table.add_column(name)
    names = ("done", "refused", "failed")
    for source in dict.fromkeys(source for source, _ in counts):
        table.add_row(source, *(str(counts[source, name]) for name in names))
    totals = [sum(n for (_, what), n in counts.items() if what == name) for name in names]
    table.add_row("all", *map(str, totals))
    Console().print(table)
    return 1 if totals[-1] else 0


if __name__ == "__main__":
    raise SystemExit(main())
