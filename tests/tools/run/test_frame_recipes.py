"""What ``compare-tokens`` tries of the passes over frames."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from graphwright.passes.recipe import Recipe
from graphwright.tools.run.frame_recipes import frame_recipes, has_frames


def video(frames: int, rows: int, columns: int, *, cls_token: bool = True) -> Any:
    patches = rows * columns
    return SimpleNamespace(
        pictures=frames, grid=(rows, columns), patches=patches, count=frames * patches,
        cls_token=cls_token, layout=(), check_whole=lambda reason: None, check_patches=lambda: None,
        check_members=lambda: None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("images", "keep"),
    [
        (video(8, 6, 6), 144), (video(8, 6, 6), 72), (video(8, 6, 6), 36), (video(8, 6, 6), 16),
        (video(50, 24, 24), 3456), (video(6, 27, 27, cls_token=False), 1000),
    ],
)  # fmt: skip
def test_recipes_leave_about_as_many_as_asked_for(images: Any, keep: int) -> None:
    names = []
    for recipe in frame_recipes(images, keep):
        (step,) = Recipe.parse(recipe).steps
        names.append(step.pass_.name)
        assert 0.55 * keep <= step.pass_.count(images) <= keep, recipe
    assert {"pool-frames", "ts-llava"} <= set(names)
    # A region of one frame of 36 patches has 15; without a CLS token it is a whole frame.
    assert ("free-video" in names) == (keep > 16 and images.cls_token)


def test_a_thumbnail_and_crops_are_no_frames() -> None:
    counts = [n for n in range(1, 12) if has_frames(video(n, 2, 2))]
    assert counts == [2, 3, 4, 6, 7, 8, 9, 11]
