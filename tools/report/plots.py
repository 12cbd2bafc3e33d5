"""Geometry of the report's two error plots: plain numbers, which ``report.html.j2`` draws as SVG.

The plotting libraries were left out on purpose: their SVG has its colours baked in, so it cannot
follow the reader's light or dark scheme, and the light ones load a script from the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .summary import ChangedSite, block_index

WIDTH = 880
COLOURS = 8
"""Number of distinct series colours in the style sheet; what comes beyond shares the last one."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis from ``low`` at pixel ``start`` to ``high`` at pixel ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> LogAxis:
        """The narrowest axis between marks of the 1-2-5 series that holds all positive ``values``
        with at least a decade between its ends."""
        positive = [v for v in values if v > 0 and math.isfinite(v)] or [0.1]
        low, high = min(positive), max(positive)
        marks = [m * 10.0**e for e in range(_decade(low) - 1, _decade(high) + 3) for m in (1, 2, 5)]
        first = max(mark for mark in marks if mark <= low * (1 + 1e-9))
        last = min(mark for mark in marks if mark >= max(high, 9.9 * first))
        return cls(first, last, start, end)

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[dict[str, Any]]:
        """Labelled marks: of the 1-2-5 series over up to two decades, else at most nine powers."""
        span = math.log10(self.high / self.low)
        mantissas = (1, 2, 5) if span < 2.1 else (1,)
        exponents = range(_decade(self.low), _decade(self.high) + 1, math.ceil(span / 8))
        pairs = [(m, e) for e in exponents for m in mantissas]
        inside = [p for p in pairs if self.low * 0.99 <= p[0] * 10.0 ** p[1] <= self.high * 1.01]
        return [{"at": self.at(m * 10.0**e), "label": power(m, e)} for m, e in inside]


def _decade(value: float) -> int:
    return math.floor(math.log10(value) + 1e-9)


def power(mantissa: int, exponent: int) -> str:
    """``mantissa * 10 ** exponent`` as a short label: ``0.02``, ``10⁻⁵``, ``2·10⁻⁷``."""
    if -3 <= exponent <= 2:
        return f"{mantissa * 10.0**exponent:g}"
    tens = f"10{str(exponent).translate(SUPERSCRIPTS)}"
    return tens if mantissa == 1 else f"{mantissa}·{tens}"


def error_by_pass(rows: Sequence[tuple[str, float | None]]) -> dict[str, Any]:
    """One labelled row for each (text, relative L2 error). Zero and unmeasured have no place on a
    logarithmic axis and are told in words."""
    left, row_height, top = 320, 34, 10
    axis = LogAxis.over([e for _, e in rows if e is not None], left, WIDTH - 90)
    bottom = top + row_height * len(rows)
    marks = [
        {
            "y": top + row_height * i + row_height / 2,
            "label": shorten(label, 38),
            "title": label,
            "x": axis.at(error) if error else None,
            "value": error,
        }
        for i, (label, error) in enumerate(rows)
    ]
    return {
        "width": WIDTH,
        "height": bottom + 46,
        "left": left,
        "right": WIDTH - 90,
        "top": top,
        "bottom": bottom,
        "ticks": axis.ticks(),
        "rows": marks,
    }


def error_by_site(sites: Sequence[ChangedSite]) -> dict[str, Any] | None:
    """A point for each site with a positive ``rel_l2``, in graph order, coloured by group; ``None``
    where there are fewer than two."""
    shown = [(site, site.rel_l2) for site in sites if site.rel_l2]
    if len(shown) < 2:
        return None
    left, right, top, bottom = 64, WIDTH - 12, 12, 272
    axis = LogAxis.over([error for _, error in shown], bottom, top)
    step = (right - left) / len(shown)
    groups = list(dict.fromkeys(site.group for site, _ in shown))
    colour = {group: min(i, COLOURS - 1) for i, group in enumerate(groups)}
    points = [
        {
            "x": round(left + step * (i + 0.5), 1),
            "y": axis.at(error),
            "colour": colour[site.group],
            "title": f"{site.name}: {error:.3g}",
        }
        for i, (site, error) in enumerate(shown)
    ]
    legend = [{"label": g, "colour": c} for g, c in colour.items() if c < COLOURS - 1]
    rest = [g for g, c in colour.items() if c == COLOURS - 1]
    if rest:
        label = rest[0] if len(rest) == 1 else f"{len(rest)} other groups"
        legend.append({"label": label, "colour": COLOURS - 1})
    return {
        "width": WIDTH,
        "height": bottom + 48,
        "left": left,
        "right": right,
        "top": top,
        "bottom": bottom,
        "ticks": axis.ticks(),
        "points": points,
        "legend": legend,
        "blocks": _blocks([site.name for site, _ in shown], left, step),
    }


def _blocks(names: Sequence[str], left: float, step: float) -> list[dict[str, Any]]:
    """Stretches of neighbouring sites with the same index: where each starts, ends, is labelled."""
    blocks: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        index = block_index(name)
        if not blocks or blocks[-1]["label"] != index:
            blocks.append({"label": index, "start": left + step * i})
        blocks[-1]["end"] = round(left + step * (i + 1), 1)
    every = math.ceil(len(blocks) / 24)
    for i, block in enumerate(blocks):
        block["start"] = round(block["start"], 1)
        block["labelled"] = i % every == 0
    return blocks


def shorten(text: str, limit: int) -> str:
    """The text, its middle left out where it is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"
