"""Qwen3-VL: its tower's features, of all layers, as the library's own forward has them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from graphwright.ir.load.hf.pictures import as_the_library_takes, tokens_of
from graphwright.ir.load.hf.qwen3_vl import features, settle
from graphwright.tools.bench.family_models import FAMILIES

from ....models import joined

transformers: Any = importlib.import_module("transformers")
IMAGE = 96


def model(**vision: Any) -> Any:
    sizes = FAMILIES["qwen3-vl"].sizes
    merged = sizes["vision_config"] | {"depth": 3, **vision}
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(**{**sizes, "vision_config": merged})
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("size", "places"),
    [([16, 24], 25), ([32, 8], 9), ([16, 16], 16)],  # a table of fewer, of more, and of as many
)
def test_features_are_the_library_s(size: list[int], places: int) -> None:
    whole = model(
        image_size=size, num_position_embeddings=places, deepstack_visual_indexes=[0, 2]
    )
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    ids = torch.full((2, tokens_of(whole.config)), IMAGE)
    taken = as_the_library_takes(whole, {"input_ids": ids, "pixel_values": pixels})
    with torch.no_grad():
        actual, levels = features(whole, pixels)
        expected = whole.model.get_image_features(taken["pixel_values"], taken["image_grid_thw"])
    torch.testing.assert_close(actual.flatten(0, 1), joined(expected.pooler_output))
    assert len(levels) == 2
    for level, own in zip(levels, expected.deepstack_features, strict=True):
        torch.testing.assert_close(level.flatten(0, 1), joined(own))


def test_directions_of_frequencies_are_the_library_s() -> None:
    rope = (whole := model()).model.language_model.rotary_emb
    places = torch.randint(0, 50, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    expected = rope(torch.zeros(1), places)
    settle(whole)
    for one, other in zip(rope(torch.zeros(1), places), expected, strict=True):
        assert torch.equal(one, other)
