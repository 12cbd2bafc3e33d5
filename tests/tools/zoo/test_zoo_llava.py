"""What the trainers of the LLaVAs learn from: pictures of scenes, parts of tokens, statements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphwright.ir.load.zoo import scenes
from graphwright.tools.zoo.llava_figures import accuracy
from graphwright.tools.zoo.llava_learner import Learner, make_tokenizer, part_of
from graphwright.tools.zoo.llava_tower import NONE, TowerTeacher, patch_classes
from graphwright.tools.zoo.llava_training import write_model
from graphwright.tools.zoo.train_llava import make_model
from graphwright.tools.zoo.train_llava_next import start_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Untrained; as it starts to learn of large scenes."""
    folder = tmp_path_factory.mktemp("llava")
    write_model(make_model(0), make_tokenizer(), folder)
    return start_model(folder, 0)


def drawn(count: int, size: int) -> list[scenes.Scene]:
    return [scenes.draw_scene("train", np.random.default_rng(i), size) for i in range(count)]


@pytest.mark.parametrize(("size", "count"), [(96, 30), (96, 144), (192, 60), (192, 123)])
def test_a_part_holds_the_digits_first(size: int, count: int) -> None:
    drawings = drawn(5, size)
    kept = part_of(drawings, count, np.random.default_rng(0))
    assert kept.shape == (5, count)
    for scene, row in zip(drawings, kept, strict=True):
        on = scenes.digit_tokens(scene)
        assert (row.diff() > 0).all() and row.max() < len(on)
        assert on[row].sum() == min(count, int(on.sum()))


def test_every_digit_has_a_patch_that_says_it() -> None:
    for scene in drawn(40, 192):
        for picture in scenes.pictures(scene):
            values, places = patch_classes(picture)
            assert set(places[places >= 0].tolist()) == {d.cell for d in picture.digits}
            for digit in picture.digits:
                assert set(values[places == digit.cell].tolist()) == {digit.value}
            assert (values == NONE).sum() >= 144 - 9 * len(picture.digits)


@pytest.mark.parametrize("size", [96, 192])
def test_a_step_of_each_stage(model: Any, size: int) -> None:
    assert model.config.image_seq_length == 720
    drawings = drawn(2, size)
    teacher = TowerTeacher(model.model.vision_tower, 128)
    shown = [picture for scene in drawings for picture in scenes.pictures(scene)]
    assert teacher.loss(shown).isfinite()
    learner = Learner(model, make_tokenizer())
    rng = np.random.default_rng(0)
    for kept in (None, part_of(drawings, 40, rng)):
        loss: Any = learner.loss(drawings, rng, kept)
        loss.backward()
        assert loss.isfinite()
    gradients = [p.grad for p in model.model.multi_modal_projector.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    assert 0 <= accuracy(model, make_tokenizer(), scenes.questions("validation", 2, size=size)) <= 1


def test_what_is_written_says_the_size(model: Any, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    write_model(model, make_tokenizer(), tmp_path, scenes.LARGE)
    model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    assert '"height": 192' in (tmp_path / "preprocessor_config.json").read_text()
    assert '"image_seq_length": 720' in (tmp_path / "config.json").read_text()
