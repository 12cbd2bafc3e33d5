"""``zoo:tiny-video``: its videos and questions, the graph, what it learned and who takes it."""

from __future__ import annotations

import importlib

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.zoo import scenes, videos
from graphwright.ir.load.zoo.tiny_vision import VIDEO
from graphwright.ir.run.sweep import sweep
from graphwright.tools.data.calibration import read
from graphwright.tools.evaluate import evaluate
from graphwright.tools.zoo.train_video import middle, part_of


def test_questions_and_their_answers() -> None:
    asked = videos.questions("validation", 60)
    assert [q.type for q in asked[:4]] == list(videos.TYPES)
    assert [q.text for q in videos.questions("validation", 9)] == [q.text for q in asked[:9]]
    alone = 0
    for question in asked:
        video = question.scene
        frames = [[digit.value for digit in part.digits] for part in video.parts]
        assert video.image.shape == (8, 3, 48, 48) and all(len(there) <= 1 for there in frames)
        order = list(dict.fromkeys(value for there in frames for value in there))
        assert [digit.value for digit in video.digits] == order and 1 <= len(order) <= 4
        alone += any(sum(there == [value] for there in frames) == 1 for value in order)
        answer = {"first": order[0], "last": order[-1], "count": len(order)}.get(question.type)
        if question.type == "after":
            value = int(question.text.split()[-2])
            answer = ([*order, "none"])[order.index(value) + 1]
        assert question.answer == str(answer)
    assert 10 < alone < 60, "in some videos a digit is there for one frame alone"


def test_parts_and_places() -> None:
    rng = torch.Generator().manual_seed(0)
    numbers = importlib.import_module("numpy").random.default_rng(0)
    drawn = [videos.draw_video("train", numbers) for _ in range(2)]
    for _ in range(9):
        kept = part_of(drawn, numbers)
        assert kept.shape[0] == 2 and 23 <= kept.shape[1] <= 288
        assert (kept.diff() > 0).all() and kept.min() >= 0 and kept.max() < 288
    table = torch.randn(145, 4, generator=rng)
    inside = middle(table)
    assert torch.equal(inside[0], table[0])
    assert torch.equal(inside[1], table[1 + 3 * 12 + 3]) and len(inside) == 37


@pytest.fixture(scope="module")
def model() -> View:
    return gw.load("zoo:tiny-video", cache=False)


def test_the_graph_is_the_library_s_model(model: View) -> None:
    assert [str(model.type(v)) for v in model.inputs()] == [
        "i64[batch, seq]", "i64[batch, seq]", "f32[batch, 8, 3, 48, 48]"
    ]  # fmt: skip
    feeds = {name: value[:2] for name, value in model.source.samples[0].items()}
    cls = importlib.import_module("transformers").LlavaForConditionalGeneration
    eager = cls.from_pretrained(VIDEO, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = eager(**feeds | {"pixel_values": feeds["pixel_values"].flatten(0, 1)}).logits
    real = feeds["attention_mask"].bool()
    actual = sweep(model, feeds)["logits"]
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)


def test_it_answers_and_fewer_frames_miss_what_came(model: View) -> None:
    """By type: the card's figures, with the room that 40 questions leave."""
    data = read("zoo:tiny-video", model, samples=8)
    assert data.batches[0]["pixel_values"].shape == (8, 8, 3, 48, 48)
    whole = evaluate(model, "vqa", samples=40)["vqa"]
    assert set(whole.detail) == set(videos.TYPES)
    assert whole.figures["accuracy"] > 0.75, whole.detail
    few = gw.optimize(model, "pool-frames{to=2x6x6}", samples=data.batches).graph
    assert evaluate(few, "vqa", samples=40)["vqa"].figures["accuracy"] < 0.6


def test_another_number_of_frames_and_another_model_are_refused(model: View) -> None:
    sample = {name: value[:1] for name, value in model.source.samples[0].items()}
    longer = sample | {"pixel_values": sample["pixel_values"].repeat(1, 2, 1, 1, 1)}
    with pytest.raises(BadInput, match="pixel_values"):
        sweep(model, longer)
    with pytest.raises(BadInput, match="tokenizer lacks came"):
        read("zoo:tiny-video", gw.load("zoo:tiny-llava", cache=False), samples=2)
    assert scenes.seen(videos.questions("test", 1)[0].scene).shape == (8, 3, 48, 48)
