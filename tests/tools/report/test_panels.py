"""What the report draws over a sample's pictures."""

from __future__ import annotations

from graphwright.tools.report.manifest import CutEntry, ImageTokensEntry
from graphwright.tools.report.panels import panels


def test_what_left_is_outlined_in_each_picture() -> None:
    """Two pictures of one row of three patches."""
    cuts = [CutEntry(name=name, block=block, kept=kept)
            for name, block, kept in (("diverse", 0, [0, 1, 2, 4]), ("", 2, []))]  # fmt: skip
    entry = ImageTokensEntry(rows=1, columns=3, pictures=["", ""], cuts=cuts)
    first, last = panels(entry, [])
    assert (first.name, first.count, first.total) == ("diverse", 4, 6)
    assert first.veils == ["", "M0 0h1v1h-1zM2 0h1v1h-1z"]
    assert last.name == "a pass" and [v.count("z") for v in last.veils] == [3, 3]
    assert panels(None, []) == []


def test_patches_below_each_other() -> None:
    cut = CutEntry(name="", block=0, kept=[0, 1, 2])
    entry = ImageTokensEntry(rows=2, columns=2, pictures=[""], cuts=[cut])
    assert panels(entry, [])[0].veils == ["M1 1h1v1h-1z"]
