"""Passes that say they are exact, on a small model of every family that ``structure_table`` has.

``python -m graphwright.tools.bench.exact_passes [FAMILY ...]`` prints for ``rotate``, ``smooth``
and the folding of AWQ's factors, from FX and from ONNX, how many linears they reach and the
greatest relative L2 distance of any output from the source's; or why they do nothing. It ends with
1 where a distance is beyond the tolerance of float32.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.console import Console
from torch import Tensor

from ...ir.core.errors import BadInput, GraphwrightError
from ...ir.core.view import View
from ...ir.run.inputs import sample_inputs
from ...ir.run.verify import tolerance
from ...passes.manager import optimize
from ...passes.recipe import Recipe
from ...passes.weights.rotate import Rotate
from ...passes.weights.smooth import Smooth
from .showing import ended, growing
from .structure_table import FAMILIES, graphs_of, save
from .weight_table import chosen

COLUMNS = ("family", "graph", "pass", "linears", "rel. L2", "within tolerance")


@dataclass(frozen=True, kw_only=True)
class AWQFolding(Smooth):
    """The folding of ``awq`` without its rounding: the greatest factors that it tries."""

    name: ClassVar[str] = "awq-folding"

    def factors(self, inputs: Tensor, weights: Tensor) -> Tensor:
        alive = inputs[inputs > 0]
        scale = inputs.clamp_min(float(alive.min()) if len(alive) else 1.0)
        return scale / (scale.max() * scale.min()).sqrt()


PASSES = (Rotate(), Smooth(), AWQFolding())


def rows(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for name in names:
        with tempfile.TemporaryDirectory(prefix="graphwright-exact-") as folder:
            save(FAMILIES[name], folder)
            for kind, view in graphs_of(folder, cache=False):
                for pass_ in PASSES:
                    yield name, kind, pass_.name, *_judged(view, pass_)


def _judged(view: View, pass_: Rotate | Smooth) -> Sequence[str]:
    """Linears, distance and whether it is within the tolerance; or the first reason against."""
    batch = sample_inputs(view)
    try:
        done = optimize(view, Recipe.of(pass_), samples=[batch], calibration=[batch])
    except GraphwrightError as error:
        # Nothing to do is no fault; that a pass is not exact, the manager says by another error.
        nothing = isinstance(error, BadInput)
        return "0", str(error).partition("\n")[0], "yes" if nothing else "NO"
    (step,) = done.report.passes
    far = max((gap.rel_l2 for gap in step.errors.values()), default=0.0)
    within = far <= tolerance(view)
    return str(len(step.result.sites)), f"{far:.1e}", "yes" if within else "NO"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table; 1 where a pass is not exact."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    options = parser.parse_args(arguments)
    wrong: list[Sequence[str]] = []

    def judged() -> Iterator[Sequence[str]]:
        names = chosen(",".join(options.families), tuple(FAMILIES), "family")
        for row in rows(names):
            wrong.extend([row] if row[-1] == "NO" else [])
            yield row

    def show(console: Console) -> None:
        console.print(growing("exact passes", COLUMNS, judged()))

    return ended(show) or int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
