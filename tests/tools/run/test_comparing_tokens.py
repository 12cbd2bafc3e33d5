"""``compare-tokens``: what is compared, what is measured, what is said of it."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from graphwright.ir.core.errors import BadInput
from graphwright.ir.structure.vision import ImageTokens
from graphwright.passes.recipe import Recipe
from graphwright.tools.cli.main import main
from graphwright.tools.cli.token_table import print_compared
from graphwright.tools.run import comparing_tokens
from graphwright.tools.run.comparing_tokens import Comparison, Row
from graphwright.tools.run.prefill import clock_words
from rich.console import Console

Recipes = list[tuple[str, str, str]]
"""Method, share and recipe of each."""
FEW = [("random-tokens", "9", "random-tokens{keep=9}"), ("no-image", "0%", "no-image"),
       ("fopru", "9", "fopru{keep=9 strategy=row}")]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[Recipes]]:
    """What the command prints of ``FEW`` on tiny-llava, its picture, and the recipes that it would
    have compared at a half and a quarter of the tokens."""
    inner, asked = comparing_tokens._recipes, []

    def few(images: ImageTokens, keeps: Sequence[str]) -> Recipes:
        assert keeps == ["9"]
        asked.append(list(inner(images, ["50%", "25%"])))
        return FEW

    drawing, printed = tmp_path_factory.mktemp("picture") / "kept.svg", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(comparing_tokens, "_recipes", few)
        with pytest.raises(SystemExit) as ended:
            main(["compare-tokens", "zoo:tiny-llava", "--calib", "zoo:tiny-llava", "--keep", "9",
                  "--samples", "8", "--rounds", "1", "--threads", "1", "--eval", "vqa", "--json",
                  "--picture", str(drawing)])  # fmt: skip
    assert ended.value.code == 0
    return printed.getvalue(), drawing.read_text(), asked


def test_every_method_is_asked_for_about_the_same_tokens(
    compared: tuple[str, str, list[Recipes]],
) -> None:
    (recipes,) = compared[2]
    for _, _, recipe in recipes:
        Recipe.parse(recipe)
    named = {(method, keep): recipe for method, keep, recipe in recipes}
    assert named["diverse", "25%"] == "diverse{keep=36}"
    assert named["tome", "50%"] == "tome{r=14}"
    assert named["visual-exit", "50%"] == "visual-exit{layer=3}"
    ratio = float(re.findall(r"ratio=([\d.]+)", named["pyramid-drop", "50%"])[0])
    assert sum(ratio**i for i in range(4)) / 4 == pytest.approx(0.5, abs=0.01)
    assert ("pyramid-drop", "25%") not in named, "four stages keep more than a quarter"


def test_a_comparison_as_json(compared: tuple[str, str, list[Recipes]]) -> None:
    printed, drawn, _ = compared
    comparison = json.loads(printed)
    source, random, blind = comparison["rows"]
    assert [r["tokens"] for r in comparison["rows"]] == [[144], [144, 9], [144, 0]]
    assert source["macs"] > random["macs"] > blind["macs"]
    assert source["quality"] > blind["quality"]
    assert set(source["by_type"]) == {"where", "count", "largest", "contains"}
    assert all(r["interval"][0] < r["quality"] < r["interval"][1] for r in comparison["rows"])
    assert all(row["prefill_ms"] > 0 < row["prefill_ratio"] for row in comparison["rows"])
    assert comparison["clock"] == "processor time of the one thread"
    assert [recipe for recipe, _ in comparison["refused"]] == ["fopru{keep=9 strategy=row}"]
    assert "not a number of whole rows of 12" in comparison["refused"][0][1]
    assert comparison["notes"][0].startswith("without the image: ")
    assert "random-tokens at 9, from block 0: 9 of 144" in drawn
    assert drawn.count("<rect") == 144 - 9 + 144


def test_what_does_not_beat_random_tokens_is_said() -> None:
    def row(method: str, quality: float, low: float, keep: str = "25%") -> Row:
        return Row(method, keep, "", (), 1, 1, quality, (low, 1.0), 1.0)

    comparison = Comparison("m", "q", 10, [
        row("source", 0.9, 0.8, ""), row("random-tokens", 0.6, 0.4), row("good", 0.8, 0.7),
        row("weak", 0.8, 0.5), row("no-image", 0.5, 0.3, "0%"),
    ])  # fmt: skip
    comparing_tokens._warn(comparison)
    assert [r.method for r in comparison.rows if r.warning] == ["weak"]
    assert "56% of the source's" in comparison.notes[0] and "need no image" in comparison.notes[0]


def test_a_model_of_text_alone_and_bad_options(plain_artifact: Path) -> None:
    with pytest.raises(BadInput, match="it takes no images: compare-tokens is for vision"):
        comparing_tokens.compare(
            str(plain_artifact), "zoo:tiny-llama", ["50%"], vqa=False, samples=2, rounds=1,
            progress=lambda *_: None,
        )  # fmt: skip


def test_the_table_says_by_what_it_was_timed_and_what_is_noise() -> None:
    source = Row("source", "", "", (144,), 10, 1, 0.9, (0.8, 1.0), 4.0, 0.93)
    half = Row("good", "50%", "good{keep=72}", (144, 72), 5, 1, 0.8, (0.7, 0.9), 2.0, 0.5)
    comparison = Comparison("m", "right answers", 10, [source, half], clock=clock_words(None))
    page = io.StringIO()
    print_compared(Console(file=page, width=100), comparison)
    printed = page.getvalue()
    assert re.search(r"good +50% +144 72 +50% +0.800 +0.70-0.90 +2.00 +2.00", printed)
    assert "ms of one prompt (wall time, all cores)" in printed
    assert "which once more takes 0.93 of its time: less is noise" in printed
    assert "best at 50%: optimize-model m -p 'good{keep=72}' -o OUT" in printed
