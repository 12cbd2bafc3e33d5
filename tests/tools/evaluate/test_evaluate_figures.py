"""Intervals against formulas, and the geometry of the Pareto plots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from graphwright.tools.evaluate import plot, stats
from graphwright.tools.report.manifest import ComparedEntry, EvaluatedEntry


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (1, 29, 0.0061, 0.1718), (29, 29, 0.8830, 1.0)],
)  # fmt: skip
def test_wilson_against_published_intervals(hits: int, count: int, low: float, high: float) -> None:
    assert stats.wilson(hits, count) == pytest.approx((low, high), abs=6e-5)


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    ends = stats.bootstrap(values[None], lambda s: s[0] / 400)
    half = 1.96 * values.std() / math.sqrt(400)
    assert ends is not None
    assert ends == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert stats.bootstrap(values[None], lambda s: s[0] / 400) == ends
    assert stats.bootstrap([[1.0]], lambda s: s[0]) is None


def test_bootstrap_of_a_ratio_draws_whole_units() -> None:
    """Every unit has the same ratio: whichever are drawn, the figure is the same."""
    sums = [[2.0, 4.0, 60.0], [1.0, 2.0, 30.0]]
    assert stats.bootstrap(sums, lambda s: s[0] / s[1]) == (2.0, 2.0)


def test_bootstrap_median_lies_between_the_values() -> None:
    ends = stats.bootstrap_median([1.0, 1.0, 1.0, 9.0])
    assert ends is not None and ends[0] == 1.0 < ends[1] <= 9.0
    assert stats.bootstrap_median([1.0]) is None


def point(cost: float, value: float) -> dict[str, Any]:
    return {"cost": cost, "value": value}


def test_the_front_holds_what_nothing_beats() -> None:
    points = [point(1, 5), point(2, 4), point(3, 7), point(3, 6), point(9, 7)]
    assert plot.pareto(points, "higher") == [point(1, 5), point(3, 7)]
    assert plot.pareto(points, "lower") == [point(1, 5), point(2, 4)]


def result(figure: str, value: float, ends: tuple[float, ...] = ()) -> EvaluatedEntry:
    return EvaluatedEntry(
        figures={figure: value}, interval={figure: list(ends)} if ends else {}, samples=1,
        unit="runs", detail={}, notes=[], seconds=0.0,
    )  # fmt: skip


def row(name: str, size: int | None, quality: float, ms: float | None) -> ComparedEntry:
    results = {"perplexity": result("perplexity", quality, (quality * 0.9, quality * 1.1))}
    if ms is not None:
        results["latency"] = result("median_ms", ms)
    return ComparedEntry(name=name, kind="", backend="eager", bytes=size, results=results)


def test_panels_place_cheap_left_and_high_up() -> None:
    rows = [row("a", 40_000_000, 10.0, 8.0), row("<b>", 10_000_000, 12.0, 9.0)]
    drawing = plot.comparison(rows)
    assert drawing is not None
    size, latency = drawing["panels"]
    assert (size["column"], latency["column"]) == (0, 1)
    a, b = size["points"]
    assert b["x"] < a["x"] and b["y"] < a["y"]
    assert latency["points"][0]["x"] < latency["points"][1]["x"]
    for panel in drawing["panels"]:
        for p in panel["points"]:
            assert panel["left"] <= p["x"] <= panel["right"]
            assert panel["top"] <= p["high"] < p["y"] < p["low"] <= panel["bottom"]
    assert latency["front"].count(",") == 1 and size["front"].count(",") == 2


@pytest.mark.parametrize("rows", [
    [row("a", None, 10.0, None)],
    [ComparedEntry(name="a", kind="", backend="eager", bytes=5,
                   results={"latency": result("median_ms", 1.0)})],
])  # fmt: skip
def test_nothing_to_plot(rows: list[ComparedEntry], tmp_path: Path) -> None:
    assert plot.comparison(rows) is None
    assert not plot.write_svg(tmp_path / "x.svg", rows) and not list(tmp_path.iterdir())


def test_the_file_is_svg_and_names_are_text(tmp_path: Path) -> None:
    rows = [row("a & b", 40_000_000, 10.0, None), row("<b>", 10_000_000, 10.0, None)]
    assert plot.write_svg(tmp_path / "eval.svg", rows)
    root = ElementTree.parse(tmp_path / "eval.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"1  a & b", "2  <b>", "1", "2", "perplexity (lower is better)"} <= set(texts)
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 2 + 2
