"""Scenes: real digits in named cells, answers that follow from them, no leak between splits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.ir.load.zoo import scenes
from graphwright.ir.load.zoo.scenes import Digit, Question, Scene

SPLITS: tuple[scenes.Split, ...] = ("train", "calibration", "validation", "test")


def test_every_digit_falls_to_one_split() -> None:
    known = [{image.tobytes() for image in scenes.digits(split)[0]} for split in SPLITS]
    sizes = [len(scenes.digits(split)[1]) for split in SPLITS]
    assert sum(sizes) == 1797
    for i, first in enumerate(known):
        assert all(first.isdisjoint(second) for second in known[:i])
    assert [round(size / 1797, 2) for size in sizes] == pytest.approx(
        [0.7, 0.05, 0.05, 0.2], abs=0.02
    )
    for split in SPLITS:
        images, labels = scenes.digits(split)
        assert set(labels.tolist()) == set(range(10))
        assert images.shape[1:] == (8, 8) and images.min() >= 0 and images.max() == 1


def right_answer(asked: Question) -> str:
    """What the digits of the scene say, read from the question's text alone."""
    values = [digit.value for digit in asked.scene.digits]
    words = asked.text.split()
    if words[0] == "how":
        return str(len(values))
    if "largest" in words:
        return str(max(values))
    if words[0] == "is":
        return "yes" if int(words[3]) in values else "no"
    cell = scenes.CELLS.index(" ".join(words[5:-1]))
    return next((str(d.value) for d in asked.scene.digits if d.cell == cell), "none")


@pytest.mark.parametrize("size", [96, 192])
def test_answers_follow_from_the_scene(size: int) -> None:
    asked = scenes.questions("validation", 123, seed=5, size=size)
    assert [q.answer for q in asked] == [right_answer(q) for q in asked]
    assert [q.type for q in asked[:5]] == [*scenes.TYPES, scenes.TYPES[0]]
    answers = {q.answer for q in asked}
    assert {"yes", "no", "none"} < answers


@pytest.mark.parametrize("size", [96, 192])
def test_digits_lie_in_cells_of_their_own(size: int) -> None:
    cell = size // 3
    for i in range(30):
        scene = scenes.draw_scene("test", np.random.default_rng(i), size)
        assert scene.image.shape == (3, size, size) and scene.image.dtype == np.float32
        assert scene.image.min() >= 0 and scene.image.max() <= 1
        assert 1 <= len(scene.digits) <= 4
        assert len({digit.cell for digit in scene.digits}) == len(scene.digits)
        for digit in scene.digits:
            top, left, high = digit.box
            assert cell * (digit.cell // 3) <= top and top + high <= cell * (digit.cell // 3 + 1)
            assert cell * (digit.cell % 3) <= left and left + high <= cell * (digit.cell % 3 + 1)
            for start in (top, left):
                assert not start < 96 < start + high, "no digit is cut by the edge of a crop"
            window = scene.image[:, top : top + high, left : left + high]
            assert window.max() > 0.5, "the ink is brighter than any background"


def test_the_number_of_digits_can_be_asked_for() -> None:
    counts = {
        len(scenes.draw_scene("train", np.random.default_rng(i), counts=(5, 9)).digits)
        for i in range(60)
    }
    assert counts == {5, 6, 7, 8, 9}


def test_the_same_seed_gives_the_same_questions() -> None:
    first, again = scenes.questions("test", 12), scenes.questions("test", 5)
    for one, other in zip(first, again, strict=False):
        assert (one.text, one.answer) == (other.text, other.answer)
        assert np.array_equal(one.scene.image, other.scene.image)
    other = scenes.questions("test", 5, seed=1)
    assert not np.array_equal(first[0].scene.image, other[0].scene.image)
    calibration = scenes.questions("calibration", 5)
    assert not np.array_equal(first[0].scene.image, calibration[0].scene.image)


def test_an_unknown_type_of_question() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="colour is not one of"):
        scenes.ask(scenes.draw_scene("test", rng), "colour", rng)


@pytest.mark.parametrize(
    ("box", "patches"),
    [
        ((0, 0, 8), {0}),
        ((8, 16, 16), {14, 15, 26, 27}),
        ((4, 0, 16), {0, 1, 12, 13, 24, 25}),
        ((1, 0, 8), {0}),
        ((91, 91, 5), {143}),
        ((6, 6, 16), {13, 14, 25, 26}),
    ],
)
def test_patches_under_a_box(box: tuple[int, int, int], patches: set[int]) -> None:
    scene = Scene(np.zeros((3, 96, 96), dtype=np.float32), (Digit(1, 0, box),))
    covered = scenes.digit_patches(scene, least=0.5 if box[0] == 6 else 0.25)
    assert covered.shape == (144,) and covered.dtype == torch.bool
    assert set(covered.nonzero().flatten().tolist()) == patches


def test_most_patches_are_background() -> None:
    asked = scenes.questions("test", 100)
    share = torch.stack([scenes.digit_patches(q.scene) for q in asked]).float().mean()
    assert 0.08 < share < 0.2


class Words:
    """A tokenizer that gives each word the number of its letters."""

    def token_to_id(self, word: str) -> int:
        return {"<image>": 100, "<pad>": 101}[word]

    def encode(self, text: str) -> Words:
        self.ids = [99, *map(len, text.split())]
        return self


@pytest.mark.parametrize("batch", [1, 5])
def test_prompts(batch: int) -> None:
    asked = scenes.questions("test", 7)
    batches = scenes.prompt_batches(asked, Words(), batch=batch)
    assert sum(len(part["input_ids"]) for part in batches) == 7
    rows = zip(
        asked, [row for part in batches for row in zip(*part.values(), strict=True)], strict=True
    )
    for question, (ids, mask, pixels) in rows:
        real = ids[mask.bool()].tolist()
        assert real == [99] + [100] * 144 + [len(word) for word in question.text.split()]
        assert ids[~mask.bool()].tolist() == [101] * (len(ids) - len(real))
        assert mask.tolist() == sorted(mask.tolist()), "padded on the left"
        restored = pixels * scenes.STD + scenes.MEAN
        torch.testing.assert_close(restored, torch.from_numpy(question.scene.image))


def test_prompts_of_crops() -> None:
    asked = scenes.questions("test", 3, size=192)
    (batch,) = scenes.prompt_batches(asked, Words())
    assert (batch["input_ids"] == 100).sum(1).tolist() == [5 * 144] * 3
    assert batch["pixel_values"].shape == (3, 5, 3, 96, 96)
    image = (torch.from_numpy(asked[1].scene.image) - scenes.MEAN) / scenes.STD
    thumbnail, *quarters = batch["pixel_values"][1]
    halves = [torch.cat(quarters[i : i + 2], 2) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(halves, 1), image)
    torch.testing.assert_close(thumbnail, torch.nn.functional.avg_pool2d(image, 2))


def test_a_large_scene_in_pictures() -> None:
    for asked in scenes.questions("test", 40, size=192):
        scene = asked.scene
        thumbnail, *quarters = scenes.pictures(scene)
        assert np.array_equal(scenes.crops(scene.image)[0], thumbnail.image)
        assert [d.value for d in thumbnail.digits] == [d.value for d in scene.digits]
        assert sum(len(quarter.digits) for quarter in quarters) == len(scene.digits)
        for number, quarter in enumerate(quarters):
            down, right = number // 2 * 96, number % 2 * 96
            for digit in quarter.digits:
                top, left, high = digit.box
                whole = next(d for d in scene.digits if d.cell == digit.cell)
                assert whole.box == (top + down, left + right, high)
                assert min(top, left) >= 0 and max(top, left) + high <= 96
        assert scenes.digit_tokens(scene).shape == (5 * 144,)
        assert all(scenes.digit_patches(part).sum() >= len(part.digits) for part in quarters)
        assert scenes.digit_patches(thumbnail).sum() >= len(scene.digits)


def test_a_small_scene_is_its_own_picture() -> None:
    scene = scenes.questions("test", 1)[0].scene
    assert scenes.pictures(scene) == [scene]
    assert torch.equal(scenes.digit_tokens(scene), scenes.digit_patches(scene))
    assert scenes.seen(scene) is scene.image


def test_a_frame_tells_where_a_crop_was_cut() -> None:
    """It is of one colour between background and ink, and no digit lies on it."""
    for i in range(20):
        scene = scenes.draw_scene("test", np.random.default_rng(i), 192)
        sides = [scene.image[:, :4], scene.image[:, -4:], *np.split(scene.image, [4, 188], 2)[::2]]
        for side in sides:
            assert np.abs(side.mean((1, 2)) - sides[0].mean((1, 2))).max() < 0.02
            assert 0.4 < side.mean() < 0.6
        for digit in scene.digits:
            top, left, high = digit.box
            assert min(top, left) >= 4 and max(top, left) + high <= 188


def test_classified_shows_every_digit_of_the_split() -> None:
    total = len(scenes.digits("calibration")[1])
    parts = list(scenes.classified("calibration", total, batch=50))
    assert [len(labels) for _, labels in parts] == [50] * (total // 50) + [total % 50]
    assert parts[0][0].shape == (50, 3, 48, 48)
    assert (
        torch.cat([labels for _, labels in parts]).tolist()
        == scenes.digits("calibration")[1].tolist()
    )
