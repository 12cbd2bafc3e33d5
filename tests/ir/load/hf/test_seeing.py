"""What models that see take and give where that is unusual, held to the library."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.hf.inputs import example_inputs, left_out_notes
from graphwright.ir.load.hf.original import _complete
from graphwright.ir.load.hf.pictures import as_the_library_takes, image_features, tokens_of
from graphwright.ir.load.hf.rope import settle_rope
from graphwright.ir.load.tracing.plain_call import named_tensors
from graphwright.tools.bench.family_models import FAMILIES

transformers: Any = importlib.import_module("transformers")
IMAGE = 96


def made(name: str) -> Any:
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.sizes)
    whole = getattr(transformers, family.model)(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter += torch.randn(parameter.shape) * 0.1
    return whole


@pytest.mark.parametrize("name", ["idefics2", "aria", "llava-next-video", "glm-ocr", "llama4-vl"])
def test_features_are_the_library_s(name: str) -> None:
    """What enters the text, of two images; Llama 4's tower turns by complex numbers."""
    whole = made(name)
    tokens = tokens_of(whole.config)
    seen: list[torch.Tensor] = []
    text = whole.model.text_model if name == "idefics2" else (
        whole.language_model.model if name == "llama4-vl" else whole.model.language_model
    )  # fmt: skip
    text.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    sides = (5, 3, 16, 16) if name == "llava-next-video" else (3, 16, 16)
    pixels = torch.randn(2, *sides, generator=torch.Generator().manual_seed(0))
    ids = torch.full((2, tokens), IMAGE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    _complete(whole)
    with torch.no_grad():
        whole(**as_the_library_takes(whole, inputs))
        settle_rope(whole)
        features, _ = image_features(whole, pixels)
    torch.testing.assert_close(features, seen[0])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("vjepa2", (2, 4, 3, 16, 16)), ("x-clip", (2, 4, 3, 16, 16)), ("layoutlmv3", (2, 3, 16, 16))],
)
def test_sizes_by_names_of_their_own(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    whole = made(name)
    inputs, _ = example_inputs(whole, tmp_path)
    (pixels,) = (tensor for key, tensor in inputs.items() if key.startswith("pixel"))
    assert pixels.shape == shape
    assert not left_out_notes(whole, inputs)


def test_outputs_in_lists_are_outputs() -> None:
    x = torch.ones(2)
    assert list(named_tensors({"logits": (x, x), "loss": None})) == ["logits.0", "logits.1"]
    assert list(named_tensors({"logits": x, "states": (x, x)})) == ["logits"]
    with pytest.raises(BadInput, match="gives no tensor"):
        named_tensors({"loss": None})


def test_a_linear_of_a_vector_is_no_site() -> None:
    class Sums(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.bins = torch.nn.Linear(32, 32), torch.nn.Parameter(torch.randn(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(self.wide(x), self.bins)

    view = gw.trace(Sums(), args=(torch.randn(2, 32),))
    done = gw.optimize(view, "quantize{bits=8 group=32}").report.passes[-1].result
    assert len(done.sites) == 1 and not done.refused
