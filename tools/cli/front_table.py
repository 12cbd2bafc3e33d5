"""What ``optimize-model front OUT`` prints: the front of a search, and its price list."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..report.manifest import FrontEntry, Manifest, PriceEntry, SearchEntry
from ..report.search_plots import BOUGHT
from ..report.summary import size

_COSTS = {"bytes": "weights", "ms": "ms", "kv": "keys, values"}
"""Names of columns by measure."""


def print_front(console: Console, manifest: Manifest) -> None:
    """Points by what they cost, prices by knob, and what the linears hold."""
    search = manifest.search
    assert search is not None
    # The files of a graph hold more than its weights, which a budget is of.
    weights = search.source.get("bytes") or manifest.sizes.source_bytes
    console.print(_points(search, {**search.source, "bytes": weights}))
    loss = (
        f"loss: {search.loss_is}; on {search.judged} rows that nothing was fitted to; shares are "
        "of the source"
    )
    console.print(Text(loss))
    for of, unit in BOUGHT.items():
        prices = [price for price in search.prices if price.of == of]
        if prices:
            console.print(_prices(prices, unit))
    held = ", ".join(f"{what}: {count}" for what, count in search.held.items())
    for line in (f"budget {search.budget}; {held}", *search.notes):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _points(search: SearchEntry, source: Mapping[str, float | None]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    measures = ["bytes", *(m for m in ("ms", "kv") if m in search.limits)]
    costs = (name for m in measures for name in (_COSTS[m], "share"))
    for name in (*costs, "loss", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in search.front:
        ends = point.interval
        table.add_row(
            "chosen" if point.chosen else "",
            *(cell for m in measures for cell in _cells(point, m, source.get(m))),
            "" if point.loss is None else f"{point.loss:.3%}",
            "forecast" if ends is None else f"{ends[0]:.3%} to {ends[1]:.3%}",
            style="bold" if point.chosen else "",
        )  # fmt: skip
    return table


def _cells(point: FrontEntry, measure: str, source: float | None) -> tuple[str, str]:
    """What a point costs, and its share of the source."""
    cost = point.cost(measure)
    if cost is None:
        return "", ""
    shown = f"{cost:.4g}" if measure == "ms" else size(round(cost))
    return shown, f"{cost / source:.1%}" if source else ""


def _prices(prices: list[PriceEntry], unit: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"loss by a {unit}", no_wrap=True)
    table.add_column("the last bought", justify="right", no_wrap=True)
    table.add_column("the next would", justify="right", no_wrap=True)
    table.add_column("at", overflow="fold")
    for price in prices:
        steps = [step for step in (price.last_step, price.next_step) if step]
        table.add_row(price.knob, _loss(price.last), _loss(price.next), Text("; ".join(steps)))
    return table


def _loss(price: float | None) -> str:
    return "" if price is None else f"{price:.3%}"
