"""``zoo:tiny-llava-details``: questions, what it learned, and that CLS attention fails."""

from __future__ import annotations

import graphwright as gw
import numpy as np
from graphwright.ir.load.zoo import details, scenes
from graphwright.tools.data.calibration import read
from graphwright.tools.evaluate import evaluate
from graphwright.tools.zoo.train_llava_details import part_of


def test_questions_and_their_answers() -> None:
    asked = details.questions("validation", 40)
    assert [q.type for q in asked[:4]] == list(details.TYPES)
    again = details.questions("validation", 9)
    assert [q.text for q in again] == [q.text for q in asked[:9]]
    for question in asked:
        scene = question.scene
        assert isinstance(scene, details.DetailScene)
        small, *large = scene.digits
        assert 8 <= small.box[2] <= 12 and all(16 <= digit.box[2] <= 24 for digit in large)
        assert len({digit.cell for digit in scene.digits}) == len(scene.digits)
        assert not any(scene.lines[digit.cell] for digit in scene.digits)
        place = question.text.removesuffix(" ?").partition(" at the ")[2]
        if question.type == "count":
            assert question.answer == str(len(scene.digits))
        elif question.type == "background":
            lines = scene.lines[scenes.CELLS.index(place)]
            assert question.answer == ("none", "1", "2")[lines]
        else:
            (there,) = [d for d in scene.digits if scenes.CELLS[d.cell] == place]
            assert question.answer == str(there.value)
            assert (there is small) == (question.type == "detail")


def test_parts_of_all_kinds() -> None:
    drawn = [details.draw_scene("train", np.random.default_rng(i)) for i in range(3)]
    rng = np.random.default_rng(0)
    for _ in range(9):
        kept = part_of(drawn, rng)
        assert kept.shape[0] == 3 and 12 <= kept.shape[1] <= 144
        assert (kept.diff() > 0).all() and kept.min() >= 0 and kept.max() < 144


def test_cls_attention_fails_where_chance_does_not() -> None:
    """By type: the card's figures, with the room that 60 questions leave."""
    graph = gw.load("zoo:tiny-llava-details", cache=False)
    data = read("zoo:tiny-llava-details", graph, samples=8)
    assert data.batches[0]["pixel_values"].shape == (8, 3, 96, 96)
    whole = evaluate(graph, "vqa", samples=60)["vqa"]
    assert set(whole.detail) == set(details.TYPES)
    assert whole.figures["accuracy"] > 0.75, whole.detail
    accuracies = {
        name: evaluate(gw.optimize(graph, f"{name}{{keep=25%}}", samples=data.batches).graph, "vqa",
                       samples=60)["vqa"].figures["accuracy"]
        for name in ("fastervlm", "uniform-tokens")
    }  # fmt: skip
    assert accuracies["uniform-tokens"] > accuracies["fastervlm"], accuracies
