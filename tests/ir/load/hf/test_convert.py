"""Checkpoints that transformers rearranges when it loads them: the weights are those it makes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.load.checkpoints.checkpoint import read_checkpoint
from graphwright.ir.load.hf.experts import fill
from graphwright.ir.load.hf.match import match
from graphwright.ir.load.hf.model import build, read_config
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES

transformers: Any = importlib.import_module("transformers")


@pytest.mark.parametrize(
    ("name", "parts", "stored"),
    [
        ("kimi-linear", ("self_attn.conv1d.weight",), "model.layers.0.self_attn.q_conv1d.weight"),
        ("granite-moe", ("experts.gate_up_proj", "experts.down_proj"),
         "model.layers.0.block_sparse_moe.input_linear.weight"),
    ],
)  # fmt: skip
def test_joined_and_renamed_tensors_are_found(
    name: str, parts: tuple[str, ...], stored: str, tmp_path: Path
) -> None:
    """Three convolutions in one; stacks of experts by other names."""
    save(FAMILIES[name], tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None and stored in checkpoint.tensors
    model = build(tmp_path, read_config(tmp_path, trust_remote_code=False), checkpoint)
    found = match(model, checkpoint.tensors)
    assert not found.absent and not found.unused
    library = getattr(transformers, FAMILIES[name].model).from_pretrained(tmp_path)
    expected = {n: t for n, t in library.state_dict().items() if n.endswith(parts)}
    assert expected
    for key, tensor in expected.items():
        ours = torch.zeros_like(tensor)
        fill(ours, key, found.weights)
        assert torch.equal(ours, tensor), key
