"""Rows of CSV and TSV, by the names of their columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from ...ir.core.errors import BadInput
from .text_lines import read_content

SEPARATORS: Mapping[str, str] = {".csv": ",", ".tsv": "\t"}


def table_lines(path: Path) -> list[dict[str, str]]:
    """The rows of a file, the first of which names the columns; none of an empty file.

    Cells may stand in quotes. Those of a TSV whose quotes do not fit that are a part of its texts,
    as in GLUE's files. Raises ``BadInput`` for a row of more or fewer cells than there are names,
    and where two columns have one name.
    """
    text, separator = read_content(path), SEPARATORS[path.suffix.lower()]
    try:
        rows = _rows(text, separator, csv.QUOTE_MINIMAL)
    except csv.Error as error:
        rows = []
        if separator == ",":
            raise BadInput(f"{path}: not CSV: {error}") from None
    if separator == "\t" and not _is_quoted_well(rows):
        rows = _rows(text, separator, csv.QUOTE_NONE)
    names = [name.strip() for name in rows[0]] if rows else []
    twice = next((name for name in names if name and names.count(name) > 1), "")
    if twice:
        raise BadInput(f"{path}: two columns are named {twice}: which one is meant?")
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(names):
            raise BadInput(
                f"{path}, sample {number}: {len(row)} cells under {len(names)} names of columns "
                f"({', '.join(names)}): a text that holds {separator!r} stands in quotes"
            )
    return [dict(zip(names, row, strict=True)) for row in rows[1:]]


def _rows(text: str, separator: str, quoting: Literal[0, 3]) -> list[list[str]]:
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)
    before = csv.field_size_limit(max(len(text), 1))  # 131072 letters, which a document has
    try:
        return [row for row in reader if row]
    finally:
        csv.field_size_limit(before)


def _is_quoted_well(rows: Sequence[Sequence[str]]) -> bool:
    """Whether quotes were put around cells, and not only met at their beginnings."""
    even = all(len(row) == len(rows[0]) for row in rows)
    return bool(rows) and even and not any("\t" in cell for row in rows for cell in row)
