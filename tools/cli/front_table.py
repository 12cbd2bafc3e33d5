"""What ``optimize-model front OUT`` prints: the front of a search, and its price list."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..report.manifest import FrontEntry, Manifest, PriceEntry
from ..report.summary import size


def print_front(console: Console, manifest: Manifest) -> None:
    """Points by size, prices by knob, and what the linears hold."""
    search = manifest.search
    assert search is not None
    # The files of a graph hold more than its weights, which a budget is of.
    weights = search.source.get("bytes") or manifest.sizes.source_bytes
    console.print(_points(search.front, weights))
    loss = f"loss: {search.loss_is}; on {search.judged} rows that nothing was fitted to"
    console.print(Text(loss))
    for of, unit in (("bytes", "megabyte"), ("ms", "millisecond")):
        prices = [price for price in search.prices if price.of == of]
        if prices:
            console.print(_prices(prices, unit))
    held = ", ".join(f"{what}: {count}" for what, count in search.held.items())
    for line in (f"budget {search.budget}; {held}", *search.notes):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _points(front: list[FrontEntry], source: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    timed = any("ms" in point.costs for point in front)
    names = ("weights", "of the source", *(("ms",) if timed else ()), "loss", "95 %")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for point in front:
        ends = point.interval
        interval = "forecast" if ends is None else f"{ends[0]:.3%} to {ends[1]:.3%}"
        table.add_row(
            "chosen" if point.chosen else "", size(point.bytes), f"{point.bytes / source:.1%}",
            *((f"{point.costs.get('ms') or 0:.4g}",) if timed else ()),
            "" if point.loss is None else f"{point.loss:.3%}", interval,
            style="bold" if point.chosen else "",
        )  # fmt: skip
    return table


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
