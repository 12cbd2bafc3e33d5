"""The Pareto plots of an evaluation: quality against size and against latency, as SVG.

The geometry is made here; ``pareto.html.j2`` draws it, in a file of its own and in the report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..report.manifest import ComparedEntry
from ..report.plots import COLOURS, LogAxis, shorten
from . import TASKS

PANEL, GAP, LEFT, TOP, HEIGHT = 330, 110, 84, 34, 220
LEGEND_ROW = 20
TEMPLATES = Path(__file__).parent
COSTS = (("bytes", 1e-6, "weights on disk, MB"), ("median_ms", 1.0, "median latency, ms"))


def comparison(rows: Sequence[ComparedEntry]) -> dict[str, Any] | None:
    """What the template draws: a row of panels for each judged quality.

    ``None`` where there is no quality or no cost to plot.
    """
    qualities = [
        (task.name, next(iter(task.headlines.items())))
        for task in TASKS.values()
        if task.quality and any(task.name in row.results for row in rows)
    ]
    panels: list[dict[str, Any]] = []
    for task, (figure, better) in qualities:
        for number, (cost, scale, label) in enumerate(COSTS):
            points = _points(rows, task, figure, cost, scale)
            if points:
                place = (number, len({panel["task"] for panel in panels} | {task}) - 1)
                panels.append(_panel(task, figure, better, label, points, place))
    if not panels:
        return None
    columns = 1 + max(panel["column"] for panel in panels)
    bottom = max(panel["bottom"] for panel in panels) + 52
    legend = [
        {"label": f"{i + 1}  {shorten(row.name, 60)}", "colour": min(i, COLOURS - 1),
         "y": bottom + LEGEND_ROW * i + 6}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return {
        "width": LEFT + columns * PANEL + (columns - 1) * GAP + 30,
        "height": bottom + LEGEND_ROW * len(rows) + 8,
        "left": LEFT, "panels": panels, "legend": legend,
    }  # fmt: skip


def _points(
    rows: Sequence[ComparedEntry], task: str, figure: str, cost: str, scale: float
) -> list[dict[str, Any]]:
    points = []
    for number, row in enumerate(rows):
        result, timed = row.results.get(task), row.results.get("latency")
        amount = row.bytes if cost == "bytes" else timed.figures.get(cost) if timed else None
        value = result.figures.get(figure) if result else None
        if result and amount and value is not None:
            ends = result.interval.get(figure) or (value, value)
            points.append({"cost": amount * scale, "value": value, "ends": ends,
                           "name": row.name, "number": number + 1,
                           "colour": min(number, COLOURS - 1)})  # fmt: skip
    return points


def _panel(
    task: str, figure: str, better: str, label: str, points: list[dict[str, Any]],
    place: tuple[int, int],
) -> dict[str, Any]:  # fmt: skip
    column, row = place
    left = LEFT + column * (PANEL + GAP)
    top = TOP + row * (HEIGHT + 92)
    right, bottom = left + PANEL, top + HEIGHT
    across = LogAxis.over([p["cost"] for p in points], left + 12, right - 12)
    low, high, ticks = _linear([e for p in points for e in (*p["ends"], p["value"])])

    def up(value: float) -> float:
        return round(bottom - 8 - (value - low) / (high - low) * (HEIGHT - 16), 1)

    drawn = [
        {"x": across.at(p["cost"]), "y": up(p["value"]), "low": up(p["ends"][0]),
         "high": up(p["ends"][1]), "colour": p["colour"], "number": p["number"],
         # Beside the point, and below it where the panel ends above.
         "label_y": up(p["value"]) + (16 if up(p["value"]) < top + 20 else -8),
         "title": f"{p['name']}: {figure} {p['value']:.4g}, {label} {p['cost']:.4g}"}
        for p in points
    ]  # fmt: skip
    front = [f"{across.at(p['cost'])},{up(p['value'])}" for p in pareto(points, better)]
    title = figure if figure == task else f"{task}: {figure}"
    return {
        "task": task, "column": column, "title": f"{title} ({better} is better)", "x_label": label,
        "left": left, "right": right, "top": top, "bottom": bottom,
        "x_ticks": across.ticks(), "y_ticks": [{"at": up(t), "label": f"{t:g}"} for t in ticks],
        "points": drawn, "front": " ".join(front),
    }  # fmt: skip


def pareto(points: Sequence[dict[str, Any]], better: str) -> list[dict[str, Any]]:
    """The points that no other one beats in both cost and value, by rising cost."""
    sign = 1.0 if better == "higher" else -1.0
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["cost"], -sign * p["value"])):
        if not front or sign * point["value"] > sign * front[-1]["value"]:
            front.append(point)
    return front


def _linear(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends of a linear axis and about five round marks between them."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    raw = (high - low) / 4
    tens = 10.0 ** math.floor(math.log10(raw))
    step = next(m * tens for m in (1, 2, 5, 10) if m * tens >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return low, high, [round(i * step, 12) for i in range(first, last + 1)]


def write_svg(path: Path, rows: Sequence[ComparedEntry]) -> bool:
    """Write the plots as one SVG file; whether there was anything to plot."""
    plot = comparison(rows)
    if plot is None:
        return False
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    module = environment.get_template("pareto.html.j2").module
    path.write_text(str(module.file(plot)), encoding="utf-8")  # type: ignore[attr-defined]
    return True
