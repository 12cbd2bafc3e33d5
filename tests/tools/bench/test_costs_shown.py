"""Costs and calibration data as a person reads them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from graphwright.ir.structure.costs import MAC_CONVENTION
from graphwright.tools.cli import terminal
from graphwright.tools.report import manifest_diff
from graphwright.tools.report.manifest import Manifest, parse
from graphwright.tools.report.summary import tokens_text
from graphwright.tools.run import report
from rich.console import Console

Make = Callable[..., Manifest]


@pytest.fixture
def manifest(make_json: Callable[..., dict[str, Any]]) -> Manifest:
    rows = [
        {"name": "source", "macs": 369_448_192, "weight_bytes": 8_377_032, "kv_bytes": 466_944,
         "tokens": [145] * 5 + [152] * 6},
        {"name": "1 fastv", "macs": 270_255_850, "weight_bytes": 8_377_040, "kv_bytes": 223_232,
         "tokens": [145] * 5 + [152, 152, 44, 44, 44]},
        {"name": "2 other", "macs": None, "weight_bytes": 8_000_000, "kv_bytes": 0,
         "tokens": [None, None]},
    ]  # fmt: skip
    entry = make_json("quantize", layers=1)
    entry["costs"] = {
        "convention": MAC_CONVENTION, "sizes": {"batch": 1, "seq": 152}, "rows": rows
    }
    entry["calibration"] = {
        "name": "zoo:tiny-llava", "sha256": "ab" * 32, "samples": 128, "tokens": 19_456,
        "length": None,
    }  # fmt: skip
    return parse(entry)


def test_the_terminal_says_before_and_after(manifest: Manifest) -> None:
    console = Console(file=io.StringIO(), width=100)
    terminal.print_costs(console, manifest)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "calibrated on zoo:tiny-llava: 128 samples, 19,456 tokens"
    assert "source 369 M 8.4 MB 466.9 kB 145 x5, 152 x6" in lines
    assert "1 fastv 270 M 8.4 MB 223.2 kB 145 x5, 152 x2, 44 x3" in lines
    assert "2 other - 8.0 MB - ? x2" in lines
    whole = " ".join(text.split())
    assert f"with batch=1, seq=152; {MAC_CONVENTION}" in whole


def test_the_report_says_the_same(manifest: Manifest) -> None:
    page = report.render(manifest)
    assert "<td>145 x5, 152 x2, 44 x3</td>" in page and MAC_CONVENTION in page
    assert "128 samples, 19456 tokens" in page
    assert "--calib zoo:tiny-llava" in page


def test_a_manifest_without_costs_is_shown_without(make_manifest: Make) -> None:
    console = Console(file=io.StringIO())
    terminal.print_costs(console, make_manifest("quantize"))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    assert "Costs of one sample" not in report.render(make_manifest("quantize"))


def test_differences_of_costs_are_listed(manifest: Manifest, make_manifest: Make) -> None:
    rows = manifest_diff.diff(manifest, make_manifest("quantize", layers=1))
    differences = {row.name: (row.a, row.b) for row in rows if row.section == "costs"}
    assert differences["1 fastv: kv_bytes"] == (223_232, None)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [([], "-"), ([7], "7"), ([7, 7, 5, 7], "7 x2, 5, 7"), ([None, None, 3], "? x2, 3")],
)
def test_runs_of_tokens(tokens: list[int | None], text: str) -> None:
    assert tokens_text(tokens) == text
