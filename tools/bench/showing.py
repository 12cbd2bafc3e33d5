"""How the commands here end: rows as they come, tables, and a refusal in words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...ir.core.errors import GraphwrightError


def growing(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of rows that take long to make: each goes to stderr as soon as it is known."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*map(escape, row))
        print(*row, sep="\t", file=sys.stderr, flush=True)
    return table


def ended(show: Callable[[Console], object], width: int = 160) -> int:
    """The exit status of a command that prints what it shows; ``width`` is that of a file."""
    try:
        show(Console(width=None if sys.stdout.isatty() else width))
    except GraphwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0
