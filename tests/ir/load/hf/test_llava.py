"""LLaVA folders: our forward is the library's, for any batch, feature layer and padding."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.core.view import View
from graphwright.ir.load.hf.llava import merge_features
from graphwright.ir.load.hf.pictures import crop_count
from graphwright.ir.load.sources import load
from graphwright.ir.run.inputs import sample_inputs
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import empty_past

transformers: Any = importlib.import_module("transformers")

VISION = transformers.CLIPVisionConfig(
    image_size=24, patch_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=2, projection_dim=16,
)  # fmt: skip
TEXT = transformers.LlamaConfig(
    vocab_size=30, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
IMAGE = 29


def save_llava(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=VISION, text_config=TEXT, image_token_id=IMAGE, **options
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def prompts(tokens: int, batch: int, crops: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the left; an image each, or ``crops`` of one."""
    generator = torch.Generator().manual_seed(batch)
    rows = []
    for row in range(batch):
        words = torch.randint(1, IMAGE, (2 + row % 3,), generator=generator)
        rows.append(torch.cat([words[:1], torch.full((tokens,), IMAGE), words[1:]]))
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0)) for r in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(batch, *crops, 3, 24, 24, generator=generator),
    }


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"vision_feature_select_strategy": "default", "vision_feature_layer": -2}, 9),
        ({"vision_feature_select_strategy": "full", "vision_feature_layer": -1}, 10),
        ({"vision_feature_select_strategy": "default", "vision_feature_layer": [-3, -1]}, 9),
    ],
    ids=["default", "full", "two-layers"],
)
def test_a_llava_folder(options: dict[str, Any], tokens: int, tmp_path: Path) -> None:
    """With random inputs of one image a row beside it."""
    model = save_llava(tmp_path, image_seq_length=tokens, **options)
    view = load(tmp_path, cache=False)
    assert view.source.task == "image-text-to-text"
    assert {
        n: str(view.type(v)) for n, v in zip(view.input_names(), view.inputs(), strict=True)
    } == {
        "input_ids": "i64[batch, seq]",
        "attention_mask": "i64[batch, seq]",
        "pixel_values": "f32[batch, 3, 24, 24]",
    }
    assert view.output_names() == ("logits",)
    for batch in (1, 5):
        inputs = prompts(tokens, batch)
        with torch.no_grad():
            expected = model(**inputs).logits
        real = inputs["attention_mask"].bool()
        actual = sweep(view, inputs)["logits"]
        torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
    check_random_inputs(view, tokens)


def check_random_inputs(view: View, tokens: int) -> None:
    inputs = sample_inputs(view)
    images = inputs["input_ids"] == IMAGE
    assert images[:, :tokens].all() and images.sum() == tokens * len(images) > 0
    assert inputs["pixel_values"].shape[0] == len(images)
    assert sweep(view, inputs)["logits"].isfinite().all()


@pytest.mark.parametrize(("strategy", "tokens"), [("full", 10)])
def test_an_image_in_crops(strategy: str, tokens: int, tmp_path: Path) -> None:
    """The library takes the crops as images of their own; ours may lie in a batch of any size."""
    model = save_llava(
        tmp_path, image_seq_length=5 * tokens, vision_feature_select_strategy=strategy
    )
    view, cached = load(tmp_path, cache=False), load(tmp_path, cache=True)
    shapes = [dict(zip(v.input_names(), map(v.type, v.inputs()), strict=True)) for v in
              (view, cached)]  # fmt: skip
    assert str(shapes[0]["pixel_values"]) == "f32[batch, 5, 3, 24, 24]"
    assert str(shapes[1]["pixel_values"]) == "f32[images, 5, 3, 24, 24]"
    for batch in (1, 5):
        inputs = prompts(5 * tokens, batch, (5,))
        with torch.no_grad():
            flat = inputs["pixel_values"].flatten(0, 1)
            expected = model(**inputs | {"pixel_values": flat}).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(
            sweep(view, inputs)["logits"][real], expected[real], rtol=1e-4, atol=1e-4
        )
        # Padding moves a row's first position there, and no distance between two.
        actual = sweep(cached, inputs | empty_past(shapes[1], inputs))["logits"]
        torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
    check_random_inputs(cached, 5 * tokens)


@pytest.mark.parametrize(
    ("tokens", "count"), [(9, 1), (45, 5), (18, 2), (44, 1), (1, 1)],
)  # fmt: skip
def test_how_many_crops_a_config_means(tokens: int, count: int) -> None:
    config = transformers.LlavaConfig(
        vision_config=VISION, text_config=TEXT, image_token_id=IMAGE, image_seq_length=tokens
    )
    assert crop_count(config) == count


@pytest.mark.parametrize("tokens", [1, 5])
def test_features_take_the_places_of_their_rows(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    words = torch.randn(3, 9, 4, generator=generator)
    features = torch.randn(3, tokens, 4, generator=generator)
    placeholders = torch.zeros(3, 9, dtype=torch.bool)
    for row in range(3):
        placeholders[row, torch.randperm(9, generator=generator)[:tokens]] = True
    merged = merge_features(words, placeholders, features)
    expected = words.masked_scatter(placeholders.unsqueeze(-1).expand_as(words), features)
    assert torch.equal(merged, expected)
