"""What ``optimize-model inspect MODEL --calib DATA --outliers`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...ir.canonical.families import canonicalize
from ...ir.load.sources import load
from ..data import calibration
from ..run.outliers import DORMANT, GROUP, Outlook, outlook, spreads

LONGEST_NAME = 34
"""Columns that a site's name gets of a narrow terminal, the longest ones folded."""


def print_outliers(
    console: Console, model: str, calib: Sequence[str], *, samples: int | None, bits: int,
    trust: bool,
) -> None:  # fmt: skip
    """Load, sweep and print; of several sets of data the first in full, and how far they spread.

    Raises what ``load`` and ``calibration.read`` raise.
    """
    view = load(model, trust_remote_code=trust, cache=False)
    sets = [calibration.read(one, view, samples=samples) for one in calib]
    canonicalize(view)
    surveys = [outlook(view, data.batches, bits) for data in sets]
    spread = spreads(surveys) if len(surveys) > 1 else {}
    _print(console, model, [data.name for data in sets], surveys[0], spread)


def _print(
    console: Console, model: str, sets: Sequence[str], survey: Outlook, spread: Mapping[str, float]
) -> None:
    console.print(Text(f"{model} on {sets[0]}"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    widest = max(len(site.name) for site in survey.sites)
    table.add_column("input of", overflow="fold", min_width=min(widest, LONGEST_NAME))
    names = ("kurtosis", "peak", "outliers", "top", "massive", "dormant", "forecast", "measured")
    for name in (*names, "spread") if spread else names:
        table.add_column(name, justify="right")
    for site in survey.sites:
        heads = survey.dormant.get(site.name)
        dormant = "" if heads is None else f"{int((heads >= DORMANT).sum())} of {len(heads)}"
        table.add_row(
            Text(site.name), f"{site.kurtosis:.1f}", f"{site.peak:.1f}", str(site.outliers),
            f"{site.top_share:.1%}", str(site.massive), dormant, f"{site.forecast:.4f}",
            f"{site.measured:.4f}", *([f"{spread[site.name]:.1%}"] if spread else []),
        )  # fmt: skip
    console.print(table)
    console.print(Text(
        "kurtosis: 0 for Gaussian features; peak: largest magnitude by root mean square; outliers: "
        "channels six times as large as the median one; top: the largest channel's share of all "
        "energy; massive: activations above 100 and 1000 times their token's median; dormant: "
        f"heads that give the first token {DORMANT:.0%} of their attention or more"
    ))  # fmt: skip
    console.print(Text(
        f"forecast, measured: relative error of outputs, weights rounded to {survey.bits} bits in "
        f"groups of {GROUP}; the two agree by a rank correlation of {survey.agreement:.2f} over "
        f"{len(survey.sites)} linears"
    ))  # fmt: skip
    if spread:
        far = max(spread, key=lambda name: spread[name])
        console.print(Text(
            f"spread: the largest less the least of what is measured on {', '.join(sets)}, by the "
            f"mean: {sum(spread.values()) / len(spread):.1%} on average, most at {far}"
        ))  # fmt: skip
