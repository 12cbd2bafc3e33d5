"""The search under a budget, judged: its forecasts, its recipes beside others, and its knobs.

``python -m graphwright.tools.bench.budget forecast zoo:tiny-llama --recipes 50`` draws recipes from
the menu at random, from nearly all small to nearly all large, runs each, and prints the rank
correlation of forecast and measured losses, and how many bytes came out as forecast. ``... times``
does so for milliseconds.

``... budgets zoo:tiny-llama`` searches at five budgets of bytes and measures what it finds beside
single methods, uniform bits with EoRA, the built-in recipes, and bits alone by the same
solver: on data of the test split, which no search and no fit has seen. Each of the others is the
better one of the two largest of its kind that fit in the budget. ``... speeds`` does so at five
budgets of time, ``... caches`` at three of the key-value cache: of each kind they take the best of
those that keep it. With ``--cache`` the model has its key-value cache, as ``optimize-model`` loads
it, whose bits are a knob then, and whose heads all stay.

``... knobs zoo:tiny-llama --budgets bytes=15% ms=0.8x`` prints what each knob did, and what is lost
with each one taken away. ``... workers`` says how long a search takes beside one ``w4-eora``, and
whether several workers and Ray find the same. ``... refine`` says what a refinement adds.
Several by commas share one survey, ``forecast,budgets``.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from ...ir.core.errors import near_misses
from .budget_forecast import forecast, times
from .budget_knobs import knobs
from .budget_refine import refinements
from .budget_rivals import CACHES, SHARES, SPEEDS, USUAL_SHARES, budgets, caches, speeds
from .budget_subject import Subject
from .budget_workers import workers

KINDS = ("forecast", "times", "budgets", "speeds", "caches", "knobs", "workers", "refine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", type=_listed, help=f"{', '.join(KINDS)}; several by commas")
    parser.add_argument("model", nargs="?", default="zoo:tiny-llama")
    parser.add_argument("--recipes", type=int, default=50)
    parser.add_argument("--shares", help="of what the source takes, instead of the usual ones")
    parser.add_argument("--kinds", nargs="*", default=[], help="of rivals; all, if none is named")
    parser.add_argument("--others", action="store_true", help="rivals alone: search nothing")
    parser.add_argument("--budgets", nargs="+", default=["bytes=15%", "bytes=20%"])
    parser.add_argument("--seconds", type=float, default=0.0, help="of refining; 0: to its end")
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens")
    parser.add_argument("--cache", action="store_true", help="the model with its cache")
    options = parser.parse_args()
    subject = Subject(options.model, options.quick, options.cache)
    shares = [float(x) for x in (options.shares or "").split(",") if x]
    for what in options.what:
        _run(what, subject, shares, options)


def _listed(text: str) -> list[str]:
    unknown = [what for what in text.split(",") if what not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: {near_misses(unknown[0], KINDS)}")
    return text.split(",")


def _run(
    what: str, subject: Subject, shares: list[float], options: argparse.Namespace
) -> None:
    console = Console()
    match what:
        case "forecast":
            forecast(subject, options.recipes)
        case "times":
            times(subject, options.recipes)
        case "budgets":
            usual = SHARES.get(subject.name, USUAL_SHARES)
            console.print(budgets(
                subject, shares or usual, options.kinds, searched=not options.others
            ))
        case "speeds":
            console.print(speeds(
                subject, shares or SPEEDS, options.kinds, searched=not options.others
            ))
        case "caches":
            console.print(caches(subject, shares or CACHES, options.kinds))
        case "knobs":
            console.print(knobs(subject, options.budgets))
        case "refine":
            console.print(refinements(subject, options.budgets, options.seconds))
        case "workers":
            console.print(workers(subject, options.budgets[0]))


if __name__ == "__main__":
    main()
