"""GLM-4.1V: its tower's features as the library's own forward has them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.hf.glm4v import features
from graphwright.ir.load.hf.pictures import as_the_library_takes, size_notes, tokens_of
from graphwright.ir.load.sources import load
from graphwright.ir.structure.recognize import recognize
from graphwright.tools.bench.family_models import FAMILIES

transformers: Any = importlib.import_module("transformers")


def model(size: int) -> Any:
    sizes = FAMILIES["glm-4.1v"].sizes
    merged = sizes["vision_config"] | {"image_size": size}
    torch.manual_seed(0)
    config = transformers.Glm4vConfig(**{**sizes, "vision_config": merged})
    whole = transformers.Glm4vForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter += torch.randn(parameter.shape) * 0.1
    return whole


def test_features_are_the_library_s() -> None:
    whole = model(32)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.full((2, tokens_of(whole.config)), whole.config.image_token_id)
    taken = as_the_library_takes(whole, {"input_ids": ids, "pixel_values": pixels})
    with torch.no_grad():
        actual = features(whole, pixels)
        expected = whole.model.get_image_features(taken["pixel_values"], taken["image_grid_thw"])
    torch.testing.assert_close(actual, torch.stack(expected.pooler_output), rtol=1e-4, atol=1e-5)
    (note,) = size_notes(whole.config)
    assert note.endswith("32 x 32, which are 16 tokens: as large as the tower's table of places")


def test_an_image_of_no_whole_number_of_tokens() -> None:
    with pytest.raises(BadInput, match="image_size of 20, and a token is 8 pixels wide"):
        features(model(20), torch.zeros(1, 3, 16, 16))


def test_the_merger_s_gate_is_in_no_block_of_the_text(tmp_path: Path) -> None:
    model(16).save_pretrained(tmp_path)
    view = load(tmp_path)
    canonicalize(view)
    structure = recognize(view)
    assert [sub.linears[0] for block in structure.blocks for sub in block.sub_blocks[:1]] == [
        f"model.{part}" for part in (
            "visual.blocks.0.attn.qkv", "visual.blocks.1.attn.qkv",
            "language_model.layers.0.self_attn.q_proj", "language_model.layers.1.self_attn.q_proj",
        )
    ]  # fmt: skip
