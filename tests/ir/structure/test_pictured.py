"""A prompt that names an image, and the image: both, or a refusal in words."""

from __future__ import annotations

from pathlib import Path

import graphwright as gw
import onnx
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.run.inputs import sample_inputs
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.pictured import (
    PROMPT_KEY,
    check_pictured,
    prompt_metadata,
    read_prompt,
)
from onnx import TensorProto, helper

IMAGE = 3
PAST = "past_key_values.0.key"
MISSING = r"input_ids holds 4 times the token 3.* 0 images .*have 0: give one image for each 4"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Ids and sums of pixels; an image is four tokens."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["pixel_values"], ["s"], keepdims=0),
            helper.make_node("CastLike", ["input_ids", "s"], ["f"]),
            helper.make_node("Add", ["f", "s"], ["y"]),
        ],
        "g",
        [
            value("input_ids", TensorProto.INT64, ["batch", "seq"]),
            value("attention_mask", TensorProto.INT64, ["batch", "seq"]),
            value("pixel_values", TensorProto.FLOAT, ["images", 3, 2, 2]),
        ],
        [value("y", TensorProto.FLOAT, ["batch", "seq"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, prompt_metadata((IMAGE,) * 4))
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def prompt(rows: int, images: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *[IMAGE] * 4, 2]] * rows)
    pixels = torch.zeros(images, 3, 2, 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_a_prompt_without_its_image_is_refused(file: Path) -> None:
    graph = gw.load(file)
    run = gw.compile(file)
    for call in (run, lambda **inputs: sweep(graph, inputs)):
        assert call(**prompt(2, 2))["y"].shape == (2, 6)
        with pytest.raises(BadInput, match=MISSING):
            call(**prompt(1, 0))
        with pytest.raises(BadInput, match="seq is 6 in input input_ids and 5 in input attention_"):
            call(**prompt(1, 1) | {"attention_mask": torch.ones(1, 5, dtype=torch.int64)})


def test_random_inputs_hold_the_image(file: Path) -> None:
    inputs = sample_inputs(gw.load(file))
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [4] * len(inputs["pixel_values"])


def test_a_step_is_not_asked_for_its_image() -> None:
    step = {**prompt(1, 0), PAST: torch.zeros(1, 2, 5, 8)}
    check_pictured((IMAGE,) * 4, step)
    check_pictured((IMAGE,) * 4, step, cut=True)
    with pytest.raises(BadInput, match=MISSING):
        check_pictured((IMAGE,) * 4, {**step, PAST: torch.zeros(1, 2, 0, 8)})


def test_images_that_no_text_names() -> None:
    """A graph without a cache reads an image a row, one with a cache the next of all images."""
    some = prompt(2, 2)
    some["input_ids"][0, :] = 1
    none = some | {"input_ids": some["input_ids"][:1], "pixel_values": some["pixel_values"][:1]}
    for inputs in (some, none, none | {PAST: torch.zeros(1, 2, 0, 8)}):
        check_pictured((IMAGE,) * 4, inputs)
    with pytest.raises(BadInput, match="have 8: leave out the images that no text names"):
        check_pictured((IMAGE,) * 4, some | {PAST: torch.zeros(2, 2, 0, 8)})


def test_tokens_leave_every_row_of_a_pruned_model() -> None:
    check_pictured((IMAGE,) * 4, prompt(2, 2), cut=True)
    text = prompt(2, 2)
    text["input_ids"][1, :3] = 1
    step = {**text, PAST: torch.zeros(2, 2, 5, 8)}
    check_pictured((IMAGE,) * 4, step)
    for inputs in (text, step):
        with pytest.raises(BadInput, match="row 1 of input_ids holds 2 times the token 3, and an"):
            check_pictured((IMAGE,) * 4, inputs, cut=True)


@pytest.mark.parametrize("text", ["", "3", "3 4 5", "-3 4", "3 999999999", "three 4"])
def test_metadata_that_say_nothing(text: str) -> None:
    assert read_prompt({PROMPT_KEY: text}) == ()
