"""One static page of what is seen before changing: tails, forecasts beside errors, spreads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ..report.plots import COLOURS, LogAxis
from ..report.visible import visible
from .outliers import Outlook
from .outlook_words import LEGEND, cost_cells, cost_line, tail_cells

SIDE, MARGIN = 420, 64


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    colour: int
    title: str


def render(model: str, survey: Outlook, sets: Sequence[str]) -> str:
    """The page as HTML; it loads nothing from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    rows = [(s.name, tail_cells(s, survey), cost_cells(s, survey)) for s in survey.sites]
    lines = [cost_line(survey, text, sets) for text in survey.agreement]
    return visible(
        environment.get_template("outlook.html.j2").render(
            model=model, sets=sets, rows=rows, legend=LEGEND, lines=lines, plot=_plot(survey),
            overall=survey.overall, colours=COLOURS,
        )
    )  # fmt: skip


def write(path: Path, model: str, survey: Outlook, sets: Sequence[str]) -> None:
    path.write_text(render(model, survey, sets), encoding="utf-8")


def _plot(survey: Outlook) -> dict[str, Any]:
    """Forecasts across, measured errors up, on logarithmic axes of one scale."""
    costs = [
        (site.name, number, text, site.costs[text])
        for number, text in enumerate(survey.agreement)
        for site in survey.sites
        if text in site.costs
    ]
    both = [error for *_, cost in costs for error in (cost.forecast, cost.measured)]
    across = LogAxis.over(both, MARGIN, MARGIN + SIDE)
    up = LogAxis.over(both, MARGIN / 4 + SIDE, MARGIN / 4)
    points = [
        Point(
            across.at(cost.forecast), up.at(cost.measured), min(number, COLOURS - 1),
            f"{name}, {text}: forecast {cost.forecast:.3g}, measured {cost.measured:.3g}",
        )
        for name, number, text, cost in costs
        if cost.forecast > 0 and cost.measured > 0
    ]  # fmt: skip
    return {
        "width": SIDE + MARGIN + 16, "height": SIDE + MARGIN, "left": MARGIN,
        "right": MARGIN + SIDE, "top": MARGIN / 4, "bottom": MARGIN / 4 + SIDE,
        "xs": across.ticks(), "ys": up.ticks(), "points": points,
    }  # fmt: skip
