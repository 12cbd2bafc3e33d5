"""Gemma 4 with images, and other texts whose layers keep more than keys and values of one width."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.view import View
from graphwright.ir.load.hf.gemma3 import image_masks
from graphwright.ir.load.hf.gemma4 import features, size_note
from graphwright.ir.load.hf.pictures import as_the_library_takes, tokens_of
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import difference
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES

from .test_families import EXACT
from .test_towers import by_library, prompts

transformers: Any = importlib.import_module("transformers")
IMAGE = 96
FEWER = {
    "gemma4-e2b-vl": {"vision_config": {
        "num_hidden_layers": 1, "use_clipped_linears": False}, "text_config": {
        "num_hidden_layers": 3, "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"]}},
    "qwen3.5-vl": {"vision_config": {"depth": 1}},
}  # fmt: skip
"""No more layers than it takes."""


def model(name: str, **vision: Any) -> Any:
    sizes = FAMILIES[name].sizes
    torch.manual_seed(0)
    config = transformers.Gemma4Config(**{**sizes, "vision_config": {
        **sizes["vision_config"], **vision}})  # fmt: skip
    made = transformers.Gemma4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            if tensor.is_floating_point() and tensor.isfinite().all():
                tensor += torch.randn(tensor.shape) * 0.1
    return made


@pytest.mark.parametrize(
    ("vision", "sides"),
    [({"image_size": [16, 24], "standardize": True}, (16, 24)),
     ({"image_size": None, "position_embedding_size": 32, "use_clipped_linears": True},
      (128, 128))],
)  # fmt: skip
def test_features_are_the_library_s(vision: dict[str, Any], sides: tuple[int, int]) -> None:
    whole = model("gemma4-vl", **vision)
    pixels = torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(0))
    ids = torch.full((2, tokens_of(whole.config)), IMAGE)
    taken = as_the_library_takes(whole, {"input_ids": ids, "pixel_values": pixels})
    with torch.no_grad():
        expected = whole.get_image_features(taken["pixel_values"], taken["image_position_ids"])
        actual = features(whole, pixels)
    torch.testing.assert_close(actual, torch.stack(expected.pooler_output))
    said = f"images are of {sides[0]} x {sides[1]}, which are {tokens_of(whole.config)} tokens: "
    assert size_note(whole.config).startswith(said)


def test_images_see_themselves_where_there_is_a_window() -> None:
    """The library's masks: layers without a window show those before alone."""
    gemma4 = importlib.import_module("transformers.models.gemma4.modeling_gemma4")
    config = model("gemma4-vl").config.get_text_config()
    kinds = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0]])
    mask = torch.ones_like(kinds)
    expected = gemma4.create_masks_for_vision_model(
        config, torch.zeros(1, 11, 32), mask, None, torch.arange(11)[None],
        gemma4.get_block_sequence_ids_for_mask(kinds, "cpu"),
    )  # fmt: skip
    actual = image_masks(config, mask, kinds == 1, 0, full=False)
    assert isinstance(actual, dict)
    assert torch.equal(actual["sliding_attention"], expected["sliding_attention"])
    causal = torch.ones(11, 11).tril().bool()  # what the library says by no mask at all
    assert expected["full_attention"] is None
    assert torch.equal(actual["full_attention"][0, 0], causal)


@pytest.mark.parametrize("name", ["gemma4-e2b-vl", "qwen3.5-vl"])
def test_texts_that_keep_more_than_keys_of_one_width(name: str, tmp_path: Path) -> None:
    """Through the cache's graph, padded on the left. Layers of Gemma 4 are of two widths, the last
    look at what others keep, and each takes something of a word for itself, which leaves with it;
    a layer of Qwen3.5 has a state."""
    sizes = {n: v | FEWER[name].get(n, {}) if isinstance(v, dict) else v
             for n, v in FAMILIES[name].sizes.items()}  # fmt: skip
    save(replace(FAMILIES[name], sizes=sizes), tmp_path)
    view = load(tmp_path)
    image = [*view.source.prompt]
    inputs = prompts(view, [[5, 94, *image, 7, *image, 8], [6, *image, 9, 10], [3, 95, 5]])
    real = inputs["attention_mask"].bool()
    expected = by_library(view, inputs)["logits"][real]
    assert difference(expected, sweep(view, inputs)["logits"][real]).within(EXACT)
    kept = [name for name in view.input_names() if name.startswith("past")]
    assert len(kept) == {"gemma4-e2b-vl": 4, "qwen3.5-vl": 5}[name]
    if name == "gemma4-e2b-vl":
        check_cut(view, inputs)


def check_cut(view: View, inputs: dict[str, torch.Tensor]) -> None:
    """Of tokens that were pruned nothing is left, or the lengths would not be one."""
    one = {name: tensor[1:2] for name, tensor in inputs.items()}
    cut = gw.optimize(view, "uniform-tokens{keep=3}", samples=one).graph
    logits = sweep(cut, one)["logits"]
    assert logits.shape[1] == one["input_ids"].shape[1] - len(view.source.prompt) + 3
