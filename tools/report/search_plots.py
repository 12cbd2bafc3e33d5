"""Geometry of what the report draws of a search: the front, and the bits of linears by depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .manifest import FrontEntry, PassEntry, SearchEntry
from .plots import WIDTH, LogAxis, shorten
from .summary import ChangedSite, block_index

LEFT, RIGHT = 84, WIDTH - 24
CELL, ROW, NAMES = 44, 22, 250
"""Widest cell, height of a row, width of the rows' names."""
NUMBERED = 26
"""A cell that is narrower than this shows its number when it is pointed at only."""
FULL_BITS = 8.5
"""Bits of a weight whose cell is drawn in full colour."""


BOUGHT = {"bytes": "megabyte", "ms": "millisecond", "kv": "megabyte of keys and values"}
"""By measure, what prices are of."""
_AXES = {"bytes": ("weights", "MB", 1e6), "ms": ("one run", "ms", 1.0),
         "kv": ("keys and values of one sample", "MB", 1e6)}  # fmt: skip


def front(search: SearchEntry) -> dict[str, Any] | None:
    """Loss against what the search's axis is of, both on logarithmic axes: measured points with
    their intervals, forecast ones hollow. ``None`` where fewer than two have a place there."""
    name, unit, scale = _AXES[search.axis]
    shown = [
        (p, cost / scale, p.loss) for p in search.front
        if p.loss is not None and p.loss > 0 and (cost := p.cost(search.axis))
    ]  # fmt: skip
    if len(shown) < 2:
        return None
    top, bottom = 14, 274
    known = [end for p, *_ in shown for end in p.interval or [] if end is not None and end > 0]
    ends = [100 * loss for *_, loss in shown] + [100 * e for e in known]
    losses = LogAxis.over(ends, bottom, top)
    costs = LogAxis.over([cost for _, cost, _ in shown], LEFT, RIGHT)
    source = (search.source.get(search.axis) or 0.0) / scale
    marks = [
        {
            "x": costs.at(cost), "y": losses.at(100 * loss), "chosen": p.chosen,
            "ends": _ends(p, losses), "title": _title(p, f"{cost:.4g} {unit}", cost, source, loss),
        }
        for p, cost, loss in shown
    ]  # fmt: skip
    return {
        "label": f"Loss against {name}", "axis": f"{name}, {unit}",
        "width": WIDTH, "height": bottom + 48, "left": LEFT, "right": RIGHT, "top": top,
        "bottom": bottom, "xs": costs.ticks(), "ys": losses.ticks(), "points": marks,
    }  # fmt: skip


def _ends(point: FrontEntry, losses: LogAxis) -> list[float] | None:
    """Pixels of an interval's ends; a lower one that is not above 0 is drawn to the axis."""
    if point.interval is None:
        return None
    low, high = point.interval
    least = losses.start if low is None or low <= 0 else losses.at(100 * low)
    return [least, losses.end if high is None else losses.at(max(100 * high, losses.low))]


def _title(point: FrontEntry, shown: str, cost: float, source: float, loss: float) -> str:
    share = f", {cost / source:.1%} of the source" if source else ""
    kind = "forecast" if point.interval is None else "measured"
    return f"{shown}{share}: loss {loss:.3%}, {kind}"


def allocation(sites: Sequence[ChangedSite], passes: Sequence[PassEntry]) -> dict[str, Any] | None:
    """Bits of a weight by block and role: a row for each role, a column for each block, and what
    lies outside of blocks in a last row of its own; ``None`` where no block is known."""
    held = [site for site in sites if site.bits_per_weight is not None]
    inside = [site for site in held if block_index(site.name).isdigit()]
    if not inside:
        return None
    blocks = sorted({int(block_index(site.name)) for site in inside})
    width = min(CELL, (WIDTH - NAMES - 12) // len(blocks))
    place = {block: NAMES + i * width for i, block in enumerate(blocks)}
    roles = sorted({site.group for site in inside})
    cells = [
        _cell(site, place[int(block_index(site.name))], 24 + ROW * roles.index(site.group), width)
        for site in inside
    ]
    outside = [site for site in held if site not in inside]
    every = max(1, -(-len(blocks) * 14 // (width * len(blocks))))
    return {
        "width": WIDTH, "height": 24 + ROW * len(roles) + 10, "names": NAMES, "cell": width,
        "row": ROW, "cells": cells,
        "roles": [
            {"y": 24 + ROW * i, "label": shorten(role, 36), "title": role}
            for i, role in enumerate(roles)
        ],
        "blocks": [
            {"x": place[block] + width / 2, "label": block}
            for i, block in enumerate(blocks) if i % every == 0
        ],
        "outside": [f"{site.name}: {site.bits_per_weight:.3g}" for site in outside],
        "left_out": [
            site.name for step in passes for site in step.sites
            if site.kind in ("block", "attn", "mlp") and site.shape == [0]
        ],
    }  # fmt: skip


def _cell(site: ChangedSite, x: float, y: float, width: int) -> dict[str, Any]:
    bits = site.bits_per_weight or 0.0
    return {
        "x": x, "y": y, "text": f"{bits:.1f}" if width >= NUMBERED else "",
        "share": round(min(1.0, max(0.08, bits / FULL_BITS)), 3), "dark": bits / FULL_BITS > 0.55,
        "title": f"{site.name}: {bits:.3g} bits a weight",
    }  # fmt: skip
