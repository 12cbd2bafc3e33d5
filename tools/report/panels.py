"""The pictures of the report's part on image tokens: what lies over each behind each cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .manifest import ImageTokensEntry, PassEntry
from .summary import pass_text


@dataclass(frozen=True)
class Panel:
    """A cut, and the outlines of what has left, one path in units of patches for each picture."""

    name: str
    block: int
    count: int
    total: int
    veils: list[str]


def panels(entry: ImageTokensEntry | None, passes: Sequence[PassEntry]) -> list[Panel]:
    """One for each cut, in the model's order, called as the pass with its options was."""
    if entry is None:
        return []
    each = entry.rows * entry.columns
    total = each * len(entry.pictures)
    called = {step.name: pass_text(step) for step in passes}
    rows = []
    for cut in entry.cuts:
        kept = set(cut.kept)
        veils = [
            "".join(_patch(n, entry.columns) for n in range(each) if start + n not in kept)
            for start in range(0, total, each)
        ]
        name = called.get(cut.name, cut.name or "a pass")
        rows.append(Panel(name, cut.block, len(cut.kept), total, veils))
    return rows


def _patch(number: int, columns: int) -> str:
    row, column = divmod(number, columns)
    return f"M{column} {row}h1v1h-1z"
