"""How ``compare-tokens`` prints what it found."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...ir.structure.costs import MAC_CONVENTION
from ..run.comparing_tokens import Comparison

COLUMNS = ("keep", "tokens", "MACs", "quality", "95 %", "prefill", "faster")


def print_compared(console: Console, comparison: Comparison) -> None:
    """One table by share of tokens, the best quality first; then what did not fit."""
    source = comparison.rows[0]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", overflow="fold")
    rest = comparison.rows[1:]
    keeps = list(dict.fromkeys(row.keep for row in rest))
    rest.sort(key=lambda row: (keeps.index(row.keep), -row.quality))
    for row in (source, *rest):
        low, high = row.interval
        table.add_row(
            Text(row.method, style="bold" if row is source else ""), row.keep,
            " ".join(map(str, row.tokens)), f"{row.macs / source.macs:.0%}",
            f"{row.quality:.3f}", f"{low:.2f}-{high:.2f}", f"{row.prefill_ms:.2f}",
            f"{1 / row.prefill_ratio:.2f}",
        )  # fmt: skip
    console.print(table)
    timing = (
        f"prefill: ms of one prompt ({comparison.clock}), and how many times faster than the "
        f"source, which once more takes {source.prefill_ratio:.2f} of its time: less is noise."
    )
    lines = [
        f"quality: {comparison.quality}, {comparison.prompts} of them. {MAC_CONVENTION}.", timing
    ]  # fmt: skip
    lines += comparison.notes
    weak = [f"{row.method} at {row.keep}" for row in rest if row.warning]
    if weak:
        lines.append(f"do not beat random tokens: {', '.join(weak)}")
    lines += [f"not run: {recipe}: {reason}" for recipe, reason in comparison.refused]
    best = [row for row in rest if row.method != "no-image"]
    for keep in keeps:
        rows = [row for row in best if row.keep == keep]
        if rows:
            command = f"optimize-model {comparison.model} -p '{rows[0].recipe}' -o OUT"
            lines.append(f"best at {keep}: {command}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
