"""Qwen2-VL: patches are the library's processor's, places those that it counts for whole texts."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from graphwright.ir.load.hf.qwen_vl import image_sides, patches, places, token_grid
from graphwright.tools.bench.family_models import FAMILIES

transformers: Any = importlib.import_module("transformers")
IMAGE = 96


def config(**vision: Any) -> Any:
    sizes = FAMILIES["qwen2-vl"].sizes
    merged = {**sizes, "vision_config": sizes["vision_config"] | vision}
    return transformers.Qwen2VLConfig(**merged)


def test_patches_are_those_of_the_library_s_processor() -> None:
    cls = importlib.import_module(
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"
    ).Qwen2VLImageProcessorPil
    processor = cls(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64)
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    batch = processor(images=[image], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6]]
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    pixels = ((torch.from_numpy(image) / 255 - mean) / std).permute(2, 0, 1)[None]
    torch.testing.assert_close(patches(config(), pixels)[0], batch["pixel_values"])


def test_places_are_the_library_s() -> None:
    """Rows with an image at once, in the middle, twice, and with none; padding at the left."""
    cut = config()
    image, (rows, columns) = [IMAGE] * 6, token_grid(cut)
    assert (rows, columns) == (2, 3)
    texts = [[*image, 5, 6], [4, 5, *image, 7, *image, 9], [3, 4, 5], [3, *image]]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    model = transformers.Qwen2VLModel(cut)
    grids = torch.tensor([[1, 4, 6]] * 4)
    expected, deltas = model.get_rope_index(
        ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=grids, attention_mask=mask
    )
    actual, shift = places(cut, ids, mask)
    assert torch.equal(actual[:, mask.bool()], expected[:, mask.bool()])
    assert torch.equal(shift, deltas)
    # In two runs: what stands before is told by the mask and the shift.
    row, seen = slice(0, 1), longest - 2
    _, before = places(cut, ids[row, :seen], mask[row, :seen])
    behind, grown = places(cut, ids[row, seen:], mask[row], seen, before)
    assert torch.equal(behind, expected[:, row, seen:]) and torch.equal(grown, deltas[row])


@pytest.mark.parametrize(
    ("size", "sides"), [(None, (128, 128)), (20, (16, 16)), ([16, 24], (16, 24))]
)
def test_the_size_of_an_image(size: Any, sides: tuple[int, int]) -> None:
    assert image_sides(config(image_size=size).vision_config) == sides
