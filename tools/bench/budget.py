"""The search under a budget, judged: its forecasts, and its recipes beside others of that size.

``python -m graphwright.tools.bench.budget forecast zoo:tiny-llama --recipes 50`` draws recipes from
the menu at random, from nearly all small to nearly all large, runs each, and prints the rank
correlation of forecast and measured losses, and how many bytes came out as forecast.

``... budgets zoo:tiny-llama`` searches at five budgets of bytes and measures what it finds beside
uniform bits by two methods, these with EoRA, the built-in recipes, and bits alone by the same
solver: on data of the test split, which no search and no fit has seen. Each of the others is the
better one of the two largest of its kind that fit in the budget.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.zoo import scenes
from ...ir.load.zoo.text import read_tokenizer, shipped_text
from ...ir.structure.costs import weight_bytes
from ...ir.structure.recognize import recognize
from ...ir.vocab.targets import find_target
from ...passes.forecast import plan
from ...passes.manager import optimize
from ...passes.recipe import Recipe
from ..data import calibration
from ..run.outliers import rank_correlation
from ..search.budget import Budget
from ..search.data import parts, unfitted
from ..search.judge import Judge, Loss
from ..search.menu import Menu
from ..search.recipe_of import HeldTables
from ..search.search import KNOBS, ROUNDS, Rounds
from ..search.solve import KEPT, Choice, Option, Problem
from ..search.tables import Tables

Batch = Mapping[str, torch.Tensor]
SHARES = {
    "zoo:minilm": (0.25, 0.2, 0.16, 0.3, 0.4), "zoo:tiny-vit": (0.15, 0.2, 0.25, 0.13, 0.3),
}  # fmt: skip
"""Budgets of a model in shares of its weights."""
USUAL_SHARES = (0.15, 0.2, 0.125, 0.25, 0.1)
TABLE = ",quantize{bits=8 group=64 embeddings=8 min_size=1000000000 optional=true}"
GROUPS = (32, 64, 128)
OTHERS = {
    "quantize": [f"quantize{{bits={b} group={g}}}{t}" for b in (2, 3, 4, 8) for g in GROUPS
                 for t in ("", TABLE)],
    "gptq": [f"gptq{{bits={b} group={g}}}{TABLE}" for b in (2, 3, 4, 8) for g in GROUPS],
    "quantize, eora": [f"quantize{{bits={b} group=32}}{TABLE},eora{{rank={r}}}"
                       for b in (2, 3, 4) for r in (8, 16, 32)],
    "gptq, eora": [f"gptq{{bits={b} group=64}}{TABLE},eora{{rank={r}}}"
                   for b in (2, 3, 4) for r in (8, 16, 32)],
    "built-in": ["w8", "w4", "w4-eora"],
}  # fmt: skip
"""Recipes of one form for all linears, by kind."""
LARGEST = 2
"""Of each kind those of the most bytes that fit in a budget are measured."""
ROWS, TEXT, PICTURES = 64, 128, 512
"""Rows of unseen data, tokens of a row of text, and rows of a classifier."""


class Bench:
    """A model, its calibration data in parts, and unseen data to judge by."""

    def __init__(self, name: str, quick: bool = False) -> None:
        self.name = name
        self.graph = load(name, cache=False)
        self.data = calibration.read(name, self.graph).batches
        self.source = self.graph.copy()
        canonicalize(self.source)
        self.structure = recognize(self.source)
        self.parts = parts(self.source, self.data, unfitted(name, self.graph, self.data))
        if quick:
            self.parts = replace(self.parts, fit=self.parts.fit[:1], judge=self.parts.judge[:2])
        self.unseen = Judge(self.source, self.structure, _unseen(name, self.graph))
        self.bytes = weight_bytes(self.source)

    def optimized(self, recipe: str | Recipe) -> View:
        sample = {name: tensor[:1] for name, tensor in self.parts.judge[0].items()}
        return optimize(
            self.graph, recipe, samples=[sample], calibration=self.parts.fit, target="cpu"
        ).graph

    def judged(self, recipe: str | Recipe) -> tuple[int, Loss]:
        graph = self.optimized(recipe)
        return weight_bytes(graph), self.unseen.of(graph)


def _unseen(name: str, graph: View) -> list[Batch]:
    if name == "zoo:tiny-vit":
        drawn = scenes.classified("test", PICTURES, 3, 64)
        return [{"pixel_values": pixels} for pixels, _ in drawn]
    if name == "zoo:tiny-llava":
        asked = scenes.questions("test", ROWS, 3, scenes.IMAGE)
        folder = graph.source.folder
        assert folder is not None
        return list(scenes.prompt_batches(asked, read_tokenizer(Path(folder)), batch=8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.jsonl"
        texts = [text for text in shipped_text("test") if len(text) > 6 * TEXT]
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts[:ROWS]))
        return list(calibration.read(str(path), graph, samples=ROWS, length=TEXT).batches)


# --- forecasts -----------------------------------------------------------------------------------


def forecast(bench: Bench, count: int) -> None:
    """Random recipes: forecast and measured losses, bytes, and their rank correlation."""
    judge = Judge(bench.source, bench.structure, bench.parts.judge)
    started = time.process_time()
    menu = Menu.of(bench.source, bench.parts, judge, find_target("cpu"), KNOBS, lambda *_: None)
    surveyed = time.process_time() - started
    losses, forecasts, exact = [], [], 0
    for number, choice in enumerate(random_choices(menu.problems, count)):
        graph = bench.optimized(menu.recipe(choice))
        measured = judge.of(graph).value
        losses.append(measured)
        forecasts.append(judge.figure(choice.costs["loss"]))
        size = weight_bytes(graph)
        exact += size == choice.costs["bytes"]
        print(
            f"{number}\t{choice.costs['bytes']:.0f}\t{size}\t{forecasts[-1]:.5f}\t{measured:.5f}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    small = [i for i, loss in enumerate(losses) if loss < 0.2]
    print(
        f"{bench.name}: {count} random recipes, losses of {min(losses):.3g} to {max(losses):.3g}: "
        f"rank correlation {rank_correlation(forecasts, losses):.3f} "
        f"({rank_correlation([forecasts[i] for i in small], [losses[i] for i in small]):.3f} over "
        f"the {len(small)} below 20 %); bytes exact in {exact}; the survey took {surveyed:.0f} s "
        "of processor time"
    )


def random_choices(problems: Sequence[Problem], count: int, seed: int = 0) -> Iterator[Choice]:
    """Choices between all small and all large: of each place an option near a level of the
    recipe's own, or, by a share of its own, any."""
    rng = random.Random(seed)
    for _ in range(count):
        problem = rng.choice(problems)
        level, mixed = rng.random(), rng.random()
        gone = min(rng.choices((0, 1, 2), (3, 2, 1))[0], len(problem.units))
        dropped = {name: problem.units[name] for name in rng.sample(list(problem.units), gone)}
        chosen: dict[str, Option] = {}
        for place in problem.places:
            if place.unit in dropped:
                continue
            options = [o for o in place.options if o.kind != KEPT] or list(place.options)
            at = rng.random() if rng.random() < mixed else level
            chosen[place.name] = options[min(int(at * len(options)), len(options) - 1)]
        yield problem.choice(chosen, dropped)


# --- budgets -------------------------------------------------------------------------------------


def budgets(bench: Bench, shares: Sequence[float]) -> Table:
    """At each budget what was found, and the best of each other kind, on unseen data."""
    table = Table(title=f"{bench.name}: loss on unseen data", box=None, pad_edge=False)
    for column in ("budget", "by", "MB", "loss", "95 %", "recipe"):
        table.add_column(column, overflow="fold")
    judge = Judge(bench.source, bench.structure, bench.parts.judge)
    whole = Menu.of(bench.source, bench.parts, judge, find_target("cpu"), KNOBS, lambda *_: None)
    menus = {"found": whole, "bits alone": whole.bits_alone()}
    others = {kind: list(_planned(bench, recipes)) for kind, recipes in OTHERS.items()}
    known: dict[str, tuple[int, Loss]] = {}
    for share in shares:
        rows = []
        for by, menu in menus.items():
            best = Rounds(
                bench.graph, bench.source, Budget.parse(f"bytes={100 * share:g}%"), bench.parts,
                menu, judge, ROUNDS, lambda *_: None,
            ).found()  # fmt: skip
            rows.append((by, str(best.recipe), *bench.judged(best.recipe)))
            print(f"{share:.1%}", by, rows[-1][2:], sep="\t", file=sys.stderr, flush=True)
        for by, planned in others.items():
            fitting = sorted(pair for pair in planned if pair[0] <= share * bench.bytes)
            for _, recipe in fitting[-LARGEST:]:
                if recipe not in known:
                    known[recipe] = bench.judged(recipe)
            judged = [(by, recipe, *known[recipe]) for _, recipe in fitting[-LARGEST:]]
            rows += [min(judged, key=lambda row: row[3].value)] if judged else []
        for by, recipe, size, loss in rows:
            shown = recipe if len(recipe) < 90 else f"{recipe.count('{')} passes"
            cells = (f"{share:.1%}", by, f"{size / 1e6:.3f}", f"{loss.value:.3%}",
                     f"{loss.low:.3%} to {loss.high:.3%}", shown)  # fmt: skip
            table.add_row(*cells)
            print(*cells, sep="\t", file=sys.stderr, flush=True)
    return table


def _planned(bench: Bench, recipes: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Bytes and text of the recipes that fit the model."""
    stored = Tables.of(bench.source, bench.structure, HeldTables(8, 64), find_target("cpu")).stored
    for recipe in dict.fromkeys(r if stored else r.replace(TABLE, "") for r in recipes):
        chosen = Recipe.parse(recipe) if "{" in recipe else Recipe.load(recipe)
        try:
            yield plan(bench.graph, chosen.settled(find_target("cpu"))).artifact_bytes, str(chosen)
        except BadInput as error:
            print(f"{recipe}: {error}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("forecast", "budgets"))
    parser.add_argument("model", nargs="?", default="zoo:tiny-llama")
    parser.add_argument("--recipes", type=int, default=50)
    parser.add_argument("--shares", help="of the source's bytes, in place of the usual budgets")
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens")
    options = parser.parse_args()
    bench = Bench(options.model, options.quick)
    if options.what == "forecast":
        forecast(bench, options.recipes)
    else:
        usual = SHARES.get(bench.name, USUAL_SHARES)
        shares = [float(x) for x in options.shares.split(",")] if options.shares else usual
        Console().print(budgets(bench, shares))


if __name__ == "__main__":
    main()
