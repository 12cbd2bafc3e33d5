"""What ``optimize-model inspect MODEL --calib DATA --outliers`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...ir.canonical.families import canonicalize
from ...ir.load.sources import load
from ..data import calibration
from ..run import outlook_page
from ..run.outliers import Outlook, outlook
from ..run.outlook_words import LEGEND, cost_cells, cost_line, tail_cells

LONGEST_NAME = 34
"""Columns that a site's name gets of a narrow terminal, the longest ones folded."""

COST_COLUMN = 13
"""Those that a figure of a pass takes: as many passes are side by side as there is room for."""


def print_outliers(
    console: Console, model: str, calib: Sequence[str], passes: Sequence[str], *,
    samples: int | None, output: Path | None, trust: bool,
) -> None:  # fmt: skip
    """Load, sweep and print; of several sets of data the first in full, and how far they spread.

    Raises what ``load`` and ``calibration.read`` raise, and ``outlook``.
    """
    view = load(model, trust_remote_code=trust, cache=False)
    sets = [calibration.read(one, view, samples=samples) for one in calib]
    canonicalize(view)
    survey = outlook(view, [data.batches for data in sets], passes)
    names = [data.name for data in sets]
    _print(console, f"{model} on {names[0]}", survey, names)
    if output is not None:
        outlook_page.write(output, model, survey, names)


def _print(console: Console, title: str, survey: Outlook, sets: Sequence[str]) -> None:
    console.print(Text(title))
    tails = _table(survey, list(tail_cells(survey.sites[0], survey)))
    for site in survey.sites:
        tails.add_row(Text(site.name), *tail_cells(site, survey).values())
    console.print(tails)
    console.print(Text(LEGEND))
    each = (2 if len(sets) == 1 else 3) * COST_COLUMN
    together = max(1, (console.width - LONGEST_NAME) // each)
    texts = list(enumerate(survey.agreement, 1))
    for begin in range(0, len(texts), together):
        some = dict(texts[begin : begin + together])
        for number, text in some.items():
            console.print(Text(f"{number}: {cost_line(survey, text, sets)}"))
        rows = [cost_cells(site, survey, some) for site in survey.sites]
        costs = _table(survey, list(rows[0]))
        for site, cells in zip(survey.sites, rows, strict=True):
            costs.add_row(Text(site.name), *cells.values())
        console.print(costs)
    if len(survey.agreement) > 1:
        console.print(Text(f"over all passes the rank correlation is {survey.overall:.2f}"))


def _table(survey: Outlook, columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    widest = max(len(site.name) for site in survey.sites)
    table.add_column("input of", overflow="fold", min_width=min(widest, LONGEST_NAME))
    for name in columns:
        table.add_column(name, justify="right")
    return table
