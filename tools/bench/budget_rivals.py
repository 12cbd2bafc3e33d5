"""What searches find at budgets, beside every single method that fits, on unseen data."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from rich.table import Table

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.structure.costs import weight_bytes
from ...ir.vocab.targets import find_target
from ...passes.forecast import plan
from ...passes.recipe import Recipe
from ..run.machine import processor
from ..search.judge import Loss
from ..search.menu import Menu
from ..search.pace import SLACK
from ..search.recipe_of import HeldTables
from ..search.skips import graph_measures
from ..search.tables import Tables
from ..search.timing import Timing, clock_of, one_row
from .budget_subject import Subject

SHARES = {
    "zoo:minilm": (0.25, 0.2, 0.16, 0.3, 0.4), "zoo:tiny-vit": (0.15, 0.2, 0.25, 0.13, 0.3),
}  # fmt: skip
"""Budgets of a model in shares of its weights."""
USUAL_SHARES = (0.15, 0.2, 0.125, 0.25, 0.1)
TABLE = ",quantize{bits=8 group=64 embeddings=8 min_size=1000000000 optional=true}"
GROUPS = (32, 64, 128)
LESS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
OTHERS = {
    "quantize": [f"quantize{{bits={b} group={g}}}{t}" for b in (2, 3, 4, 8) for g in GROUPS
                 for t in ("", TABLE)],
    "gptq": [f"gptq{{bits={b} group={g}}}{TABLE}" for b in (2, 3, 4, 8) for g in GROUPS],
    "awq": [f"awq{{bits={b} group={g}}}{TABLE}" for b in (2, 3, 4, 8) for g in GROUPS],
    "hqq": [f"hqq{{bits={b} group={g}}}{TABLE}" for b in (2, 3, 4, 8) for g in GROUPS],
    "easyquant": [f"easyquant{{bits={b} group=64}}{TABLE}" for b in (3, 4, 8)],
    "bitstack": [f"bitstack{{blocks={n}}}{TABLE}" for n in range(1, 9)],
    "w8a8": ["w8a8", f"w8a8{TABLE}"],
    "low-rank": [f"low-rank{{ratio={r} whiten=gram}}{TABLE}" for r in (0.9, 0.8, 0.6, 0.4)],
    "drop-blocks": [f"drop-blocks{{count={n}}}" for n in range(1, 9)],
    "flap": [f"flap{{ratio={r} across=place repair=regression}}" for r in LESS],
    "quantize, eora": [f"quantize{{bits={b} group=32}}{TABLE},eora{{rank={r}}}"
                       for b in (2, 3, 4) for r in (8, 16, 32)],
    "gptq, eora": [f"gptq{{bits={b} group=64}}{TABLE},eora{{rank={r}}}"
                   for b in (2, 3, 4) for r in (8, 16, 32)],
    "built-in": ["w8", "w4", "w4-eora", "W4A16", "W8A16", "W8A8"],
}  # fmt: skip
"""Recipes of one form for all linears, by kind."""
LARGEST = 2
"""Of each kind those of the most bytes that fit in a budget are measured."""
SPEEDS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Budgets of time in shares of the source's."""
TOKENS = ("diverse", "fastervlm", "similarity", "uniform-tokens", "vispruner")
FAST = {
    "8 bits": ["quantize{bits=8 group=64}", f"quantize{{bits=8 group=128}}{TABLE}"],
    "4 bits": [f"gptq{{bits=4 group={g}}}{TABLE}" for g in (64, 128)],
    "w8a8": ["w8a8", f"w8a8{TABLE}", "w8a8{feedback=true}"],
    "drop-blocks": [f"drop-blocks{{count={n}}}" for n in range(1, 9)],
    "half blocks": [f"drop-blocks{{count={n} of={half}}}" for n in (1, 2, 3, 4)
                    for half in ("attn", "mlp")],
    "flap": [f"flap{{ratio={r} across=place repair=regression}}" for r in LESS],
    "built-in": ["w8", "w4", "w4-eora", "W8A8"],
    **{kind: [f"{kind}{{keep={keep}%}}" for keep in (75, 50, 25, 12, 6)] for kind in TOKENS},
}  # fmt: skip
"""What makes a model faster on a CPU, by kind."""
CACHES = (0.75, 0.5, 0.25)
"""Budgets of the key-value cache in shares of the source's."""
LIGHT = {
    **{kind: [f"{kind}{{keep={keep}%}}" for keep in range(90, 5, -5)]
       for kind in TOKENS},
    "half blocks": [f"drop-blocks{{count={n} of=attn}}" for n in (1, 2, 3, 4)],
    "quantize-cache": ["quantize-cache{bits=8}", "quantize-cache{bits=4}"],
}  # fmt: skip
"""What makes the cache smaller, by kind."""
COLUMNS = ("budget", "by", "MB", "share", "loss", "95 %", "recipe")
Share = Callable[["Subject", View], float]
"""Of the source's time or cache that a graph takes."""


class Rivals:
    """Recipes by kind, each measured once."""

    def __init__(self, subject: Subject, recipes: Mapping[str, Sequence[str]]) -> None:
        self.subject = subject
        self.planned = {kind: sorted(_planned(subject, texts)) for kind, texts in recipes.items()}
        self._judged: dict[str, Row | None] = {}
        self._kv: dict[str, float] = {}

    def judged(self, kind: str, recipe: str, share: Share | None = None) -> Row | None:
        """What is measured of a recipe; ``None`` where the model has no place for it."""
        if recipe not in self._judged:
            try:
                self._judged[recipe] = measured_row(self.subject, kind, recipe, share)
            except BadInput as error:
                print(f"{recipe}: {error}", file=sys.stderr)
                self._judged[recipe] = None
        return self._judged[recipe]

    def kv(self, recipe: str) -> float:
        """The share of the source's cache that a recipe leaves."""
        if recipe not in self._kv:
            self._kv[recipe] = of_cache(self.subject, self.subject.optimized(recipe))
        return self._kv[recipe]


@dataclass(frozen=True)
class Row:
    """One recipe on unseen data."""

    by: str
    recipe: str
    bytes: int
    loss: Loss
    share: float = math.nan
    """Of the source's time, in turns with it, or of its cache."""

    def cells(self, budget: str) -> tuple[str, ...]:
        shown = self.recipe if len(self.recipe) < 90 else f"{self.recipe.count('{')} passes"
        loss = self.loss
        return (
            budget, self.by, f"{self.bytes / 1e6:.3f}",
            "" if math.isnan(self.share) else f"{self.share:.2f}x",
            f"{loss.value:.3%}", f"{loss.low:.3%} to {loss.high:.3%}", shown,
        )  # fmt: skip


def measured_row(
    subject: Subject, by: str, recipe: str | Recipe, share: Share | None = None
) -> Row:
    """Run a recipe, judge it on unseen data and take its share of the source, if asked."""
    graph = subject.optimized(recipe)
    taken = math.nan if share is None else share(subject, graph)
    return Row(by, str(recipe), weight_bytes(graph), subject.unseen.of(graph), taken)


def of_time(subject: Subject, graph: View) -> float:
    """In turns with the source."""
    clock = clock_of(one_row(subject.source, subject.judge.batches[0]), torch.get_num_threads())
    source, ms = clock([subject.source, graph])
    return ms / source


def of_cache(subject: Subject, graph: View) -> float:
    """By the cost model."""
    source, kept = (
        graph_measures(view, subject.judge.batches[0]) for view in (subject.source, graph)
    )
    return kept.get("kv", 0.0) / source["kv"]


def budgets(
    subject: Subject, shares: Sequence[float], kinds: Sequence[str] = (), *, searched: bool = True
) -> Table:
    """At each budget of bytes what was found, and the best of each other kind, on unseen data;
    the others alone, where nothing is to be ``searched``."""
    menus = _with_bits(subject.menu()) if searched else {}
    rivals = Rivals(subject, _of(kinds, OTHERS))

    def of(share: float) -> Iterator[Row]:
        yield from _found(subject, f"bytes={100 * share:g}%", menus)
        for kind, planned in rivals.planned.items():
            fitting = [recipe for size, recipe in planned if size <= share * subject.bytes]
            yield from _best(rivals.judged(kind, recipe) for recipe in fitting[-LARGEST:])

    return _table(subject, {f"{share:.1%}": partial(of, share) for share in shares})


def speeds(
    subject: Subject, shares: Sequence[float], kinds: Sequence[str] = (), *, searched: bool = True
) -> Table:
    """At each budget of time what was found, and the best of each other kind that keeps it; the
    others alone, where nothing is to be ``searched``."""
    menus = _with_bits(subject.menu(Timing(machine=processor()))) if searched else {}
    rivals = Rivals(subject, _of(kinds, FAST))

    def of(share: float) -> Iterator[Row]:
        yield from _found(subject, f"ms={share:g}x", menus, of_time)
        for kind, planned in rivals.planned.items():
            known = [rivals.judged(kind, recipe, of_time) for _, recipe in planned]
            most = SLACK["ms"] * share  # as a search has it
            yield from _best(row for row in known if row is not None and row.share <= most)

    return _table(subject, {f"{share:g}x": partial(of, share) for share in shares})


def caches(subject: Subject, shares: Sequence[float], kinds: Sequence[str] = ()) -> Table:
    """What was found at each budget of the key-value cache, and of each other kind the better of
    the two largest that keep it. Raises ``BadInput`` without a cache."""
    if "kv" not in graph_measures(subject.source, subject.judge.batches[0]):
        raise BadInput(f"{subject.name} keeps no keys and values")
    rivals = Rivals(subject, _of(kinds, LIGHT))

    def of(share: float) -> Iterator[Row]:
        budget = f"kv={100 * share:g}%"
        menu = subject.menu(budget=budget)
        tokens = menu.without("layers").without("heads").without("cache")
        menus = {"found": menu, "tokens alone": tokens}
        yield from _found(subject, budget, menus, of_cache)
        for kind, planned in rivals.planned.items():
            fitting = (recipe for _, recipe in reversed(planned) if rivals.kv(recipe) <= share)
            largest = islice(fitting, LARGEST)
            yield from _best(rivals.judged(kind, recipe, of_cache) for recipe in largest)

    return _table(subject, {f"{share:.1%} kv": partial(of, share) for share in shares})


def _with_bits(menu: Menu) -> Mapping[str, Menu]:
    """What is asked at budgets that bits may keep."""
    return {"found": menu, "bits alone": menu.bits_alone()}


def _found(
    subject: Subject, budget: str, menus: Mapping[str, Menu], share: Share | None = None
) -> Iterator[Row]:
    """What a search finds, and what the same solver finds with some of the candidates."""
    for by, menu in menus.items():
        try:
            recipe = subject.search(budget, menu).recipe
        except BadInput as error:
            print(budget, by, error, sep="\t", file=sys.stderr, flush=True)
            continue
        yield measured_row(subject, by, recipe, share)


def _of(kinds: Sequence[str], recipes: Mapping[str, list[str]]) -> Mapping[str, list[str]]:
    """Those kinds alone; all, if none is named."""
    return {kind: texts for kind, texts in recipes.items() if not kinds or kind in kinds}


def _best(rows: Iterable[Row | None]) -> list[Row]:
    known = [row for row in rows if row is not None]
    return [min(known, key=lambda row: row.loss.value)] if known else []


def _table(subject: Subject, rows_of: Mapping[str, Callable[[], Iterable[Row]]]) -> Table:
    table = Table(title=f"{subject.name}: loss on unseen data", box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for budget, rows in rows_of.items():
        for row in rows():
            table.add_row(*row.cells(budget))
            print(*row.cells(budget), sep="\t", file=sys.stderr, flush=True)
    return table


def _planned(subject: Subject, recipes: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Bytes and text of the recipes that fit the model, of those that do the same the first."""
    target = find_target("cpu")
    stored = Tables.of(subject.source, subject.structure, HeldTables(8, 64), target).stored
    seen, told = set[str](), set[str]()
    for recipe in dict.fromkeys(r if stored else r.replace(TABLE, "") for r in recipes):
        chosen = Recipe.parse(recipe) if "{" in recipe else Recipe.load(recipe)
        try:
            outlook = plan(subject.graph, chosen.settled(target))
        except BadInput as error:
            if str(error) not in told:  # of forty recipes of one kind as well
                print(f"{recipe}: {error}", file=sys.stderr)
            told.add(str(error))
            continue
        # Where a table was stored with its head, the pass behind it finds none.
        done = zip(chosen.passes, outlook.passes, strict=True)
        does = str(Recipe.of(*(by for by, (_, x) in done if x.changed or not by.optional)))
        if does not in seen:
            seen.add(does)
            yield outlook.artifact_bytes, str(chosen)
