"""Rows of CSV and TSV as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from graphwright.ir.core.errors import BadInput
from graphwright.tools.data.table_lines import table_lines

HELLO = {"text": '"Hello', "label": "1"}


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        # Excel's: a mark of its encoding, two characters at an end.
        ("a.csv", "\ufefftext,label\r\n\"a, b\",1\r\n", [{"text": "a, b", "label": "1"}]),
        ("a.tsv", "text\tlabel\n\"a\nb\"\t1\n", [{"text": "a\nb", "label": "1"}]),
        # GLUE's: a quote that begins a text and has no other, and one that does two rows behind.
        ("b.tsv", "text\tlabel\n\"Hello\t1\nb\t0\n", [HELLO, {"text": "b", "label": "0"}]),
        ("c.tsv", "text\tlabel\n\"Hello\t1\nb\"\t0\n", [HELLO, {"text": 'b"', "label": "0"}]),
        ("d.tsv", 'text\tlabel\n"Hello\t1\n' + "b\t0\n" * 40000, [HELLO]),
        ("e.csv", "", []),
        ("f.CSV", "text\n" + "a" * 200_000, [{"text": "a" * 200_000}]),  # a document
    ],
)
def test_rows(name: str, content: str, rows: list[dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, newline="")
    read = table_lines(tmp_path / name)
    assert read[: len(rows)] == rows and (len(read) == len(rows) or len(read) == 40001)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text,label\nhello, world,1\n", r"sample 1: 3 cells under 2 .* holds ',' stands in"),
        ("text,label\nhello\n", "sample 1: 1 cells under 2 names"),
        ('text,label\n"hello,1\n', "not CSV: unexpected end of data"),
    ],
)
def test_rows_that_do_not_fit(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(BadInput, match=reason):
        table_lines(tmp_path / "a.csv")


def test_of_two_columns_of_a_name_none_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,,text,\na,,b,\n")
    with pytest.raises(BadInput, match="two columns are named text"):
        table_lines(tmp_path / "a.csv")
