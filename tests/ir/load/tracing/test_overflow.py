"""Clamps of fp16 that depend on whether a stream overflowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.original import ModuleOriginal
from graphwright.ir.run.sweep import sweep
from safetensors.torch import load_file, save_file

from ..hf.test_families import save_shallow


def test_a_stream_beyond_fp16_is_clamped_as_the_library_does(tmp_path: Path) -> None:
    save_shallow("bart", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.encoder.layers.0.final_layer_norm.weight"][0] = 6e4
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    view = load(tmp_path, dtype=torch.float16)
    ids = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 11, 12, 13]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    assert isinstance(view.source.original, ModuleOriginal)
    with torch.no_grad():
        expected = view.source.original.call(view.source.original.make().eval(), inputs)
    name = "encoder_last_hidden_state"
    assert expected[name].abs().max() == 64504
    assert torch.equal(sweep(view, inputs)[name], expected[name])


def test_a_module_that_asks_for_something_else_is_not_answered() -> None:
    class Zeroing(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x * 0 if torch.isinf(x).any() else x

    with pytest.raises(gw.BadInput, match="tracing failed"):
        gw.trace(Zeroing(), torch.ones(2, 3, dtype=torch.float16))
