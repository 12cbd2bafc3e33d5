"""The table of token methods: which baselines a row beats, and its types of question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphwright.tools.bench.token_table import beaten, renewed, section
from graphwright.tools.run.comparing_tokens import Comparison, Row


def row(method: str, quality: float, low: float, keep: str = "25%") -> Row:
    return Row(
        method, keep, "", (144, 36), 50, 1, quality, (low, 1.0), 2.0, 0.6, {"count": quality}
    )


def test_baselines_below_the_interval_are_beaten() -> None:
    rows = [
        row("random-tokens", 0.6, 0.5), row("uniform-tokens", 0.7, 0.6), row("good", 0.9, 0.8),
        row("fair", 0.8, 0.65), row("weak", 0.7, 0.55), row("random-tokens", 0.99, 0.9, "50%"),
    ]  # fmt: skip
    assert [beaten(r, rows) for r in rows] == [
        "", "", "random, uniform", "random", "neither", "",
    ]  # fmt: skip


def test_a_section_has_the_best_first() -> None:
    source = Row("source", "", "", (144,), 100, 1, 1.0, (0.9, 1.0), 4.0, 1.0, {"count": 1.0})
    rows = [source, row("random-tokens", 0.5, 0.4), row("good", 0.9, 0.8)]
    comparison = Comparison("m", "q", 10, rows, [("fopru{keep=5}", "whole rows")], ["blind"])
    lines = list(section(comparison))
    assert lines[2] == "| keep | method | tokens | MACs | prefill | accuracy | count | beats |"
    assert lines[4].startswith("| 100% | source | 144 | 100% | 1.00 | 100.0% (90.0 to 100.0)")
    assert lines[5].startswith("| 25% | good | 144 36 | 50% | 0.60 |")
    assert lines[5].endswith("| 90% | random |") and lines[6].endswith("| 50% |  |")
    assert "* blind" in lines and "* not run: `fopru{keep=5}`: whole rows" in lines


def test_a_page_keeps_all_but_the_column_of_prefill() -> None:
    source = Row("source", "", "", (144,), 100, 1, 1.0, (0.9, 1.0), 4.0, 1.0, {"count": 1.0})
    rows = [source, row("random-tokens", 0.5, 0.4), row("good", 0.9, 0.8)]
    page = ["# Ways", "* good: 0.60", *section(Comparison("zoo:m", "q", 10, rows)), "## More",
            "| 25% | good | 144 36 | 50% | 0.60 | 90% | none |"]  # fmt: skip
    asked = []

    def measure(model: str, rows: Sequence[tuple[str, str]]) -> Mapping[tuple[str, str], float]:
        asked.append((model, *rows))
        return {("25%", "good"): 0.5, ("100%", "source"): 0.99}

    lines = list(renewed("\n".join(page), measure))
    assert asked == [
        ("zoo:m", ("100%", "source"), ("25%", "good"), ("25%", "random-tokens"))
    ]
    changed = [(old, new) for old, new in zip(page, lines, strict=True) if old != new]
    assert [old.replace("| 1.00 |", "| 0.99 |").replace("| 0.60 |", "| 0.50 |")
            for old, _ in changed] == [new for _, new in changed]  # fmt: skip
    assert len(changed) == 2
