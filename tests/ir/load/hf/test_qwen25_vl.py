"""Qwen2.5-VL: windows of a tower, whole and cut short, as the library's own forward has them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.view import View
from graphwright.ir.load.hf.pictures import as_the_library_takes, tokens_of
from graphwright.ir.load.hf.qwen25_vl import features
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.original import ModuleOriginal
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import compare
from graphwright.tools.bench.family_models import FAMILIES

transformers: Any = importlib.import_module("transformers")
IMAGE = 96


def model(depth: int = 3, **vision: Any) -> Any:
    sizes = FAMILIES["qwen2.5-vl"].sizes
    merged = sizes["vision_config"] | {"depth": depth, **vision}
    torch.manual_seed(0)
    cls = transformers.Qwen2_5_VLForConditionalGeneration
    return cls(transformers.Qwen2_5_VLConfig(**{**sizes, "vision_config": merged})).eval()


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ([32, 48], 16),  # 4 by 6 tokens in windows of 2 by 2
        ([24, 40], 16),  # 3 by 5: cut short at both sides
        ([16, 40], 16),  # at one of them
        ([16, 24], 32),  # one window, larger than the image
    ],
)
def test_windows_are_the_library_s(size: list[int], window: int) -> None:
    whole = model(image_size=size, window_size=window, fullatt_block_indexes=[1])
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    ids = torch.full((2, tokens_of(whole.config)), IMAGE)
    taken = as_the_library_takes(whole, {"input_ids": ids, "pixel_values": pixels})
    with torch.no_grad():
        actual = features(whole, pixels)
        expected = whole.model.get_image_features(taken["pixel_values"], taken["image_grid_thw"])
    torch.testing.assert_close(actual, torch.stack(expected.pooler_output))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> View:
    """In whole windows; the family is of windows that are cut short."""
    folder: Path = tmp_path_factory.mktemp("qwen2.5-vl")
    model(depth=2, image_size=[16, 32], window_size=16).save_pretrained(folder)
    return load(folder)


def test_prompts_of_several_images_padded_on_the_left(loaded: View) -> None:
    image = list(loaded.source.prompt)
    texts = [[5, *image, 7, *image, 8], [6, *image, 9]]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    pixels = torch.randn(3, 3, 16, 32, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    caches = (name for name in loaded.input_names() if name.endswith((".key", ".value")))
    inputs |= {name: torch.zeros(2, 2, 0, 8) for name in caches}
    inputs["past_key_values.shift"] = torch.zeros(2, 1, dtype=torch.int64)
    original = loaded.source.original
    assert isinstance(original, ModuleOriginal)
    module: Any = original.make()
    taken = as_the_library_takes(module, inputs)
    plain = {n: t for n, t in taken.items() if not n.startswith("past")}
    with torch.no_grad():
        expected = module(**plain).logits * mask.unsqueeze(-1)
    run = gw.compile(loaded, backend="onnxruntime")
    for outputs in (sweep(loaded, inputs), run(**inputs)):
        actual = outputs["logits"] * mask.unsqueeze(-1)
        assert compare({"logits": expected}, {"logits": actual})["logits"].rel_l2 < 1e-5


def test_a_placeholder_that_the_model_has_written_is_a_word(loaded: View) -> None:
    """It takes a place of its own, as every word does."""
    ids = torch.tensor([[5, *loaded.source.prompt, 8]])
    pixels = torch.randn(1, 3, 16, 32, generator=torch.Generator().manual_seed(1))
    run = gw.compile(loaded, backend="onnxruntime")
    original = loaded.source.original
    assert isinstance(original, ModuleOriginal)
    module, seen = original.make(), ids.shape[1]
    outputs = run(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    for word in (IMAGE, 6):
        seen += 1
        step = {n.replace("present", "past_key_values"): t
                for n, t in outputs.items() if n.startswith("present")}  # fmt: skip
        step |= {
            "input_ids": torch.tensor([[word]]), "pixel_values": pixels[:0],
            "attention_mask": torch.ones(1, seen, dtype=torch.int64),
        }  # fmt: skip
        outputs = run(**step)
        with torch.no_grad():
            expected = original.call(module, step)
        assert torch.equal(outputs["present.shift"], expected["present.shift"])
        assert compare(expected, outputs)["logits"].rel_l2 < 1e-5
