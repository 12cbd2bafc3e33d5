"""Stacks of experts are cut where they lie in their file, and put together again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.weights import FileWeight, Weight, read_safetensors_header
from graphwright.ir.load.hf_experts import by_expert, fill
from safetensors.torch import save_file

STACKS = {
    "m.experts.gate_up_proj": torch.randn(3, 8, 4), "m.experts.down_proj": torch.randn(3, 4, 4),
    "m.experts.down_proj_bias": torch.randn(3, 4), "m.gate.weight": torch.randn(3, 4),
}  # fmt: skip
APART = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
AS_STORED = ("gate_up_proj", "down_proj", "down_proj_bias")


@pytest.mark.parametrize("parts", [APART, AS_STORED])
def test_a_stack_is_cut_without_being_read(parts: tuple[str, ...], tmp_path: Path) -> None:
    stacks = dict(STACKS)
    if parts is APART:
        del stacks["m.experts.down_proj_bias"]
    save_file(stacks, tmp_path / "m.safetensors")
    handles: dict[str, Weight] = dict(read_safetensors_header(tmp_path / "m.safetensors"))
    names = [f"m.experts.{expert}.{part}" for expert in range(3) for part in parts]
    weights = by_expert(dict.fromkeys(names), handles)
    assert weights.keys() == {*names, "m.gate.weight"}
    assert all(isinstance(weight, FileWeight) for weight in weights.values())
    for name, stack in stacks.items():
        whole = torch.zeros_like(stack)
        fill(whole, name, weights)
        assert torch.equal(whole, stack)


def test_more_experts_than_the_config_has(tmp_path: Path) -> None:
    save_file(STACKS, tmp_path / "m.safetensors")
    handles: dict[str, Weight] = dict(read_safetensors_header(tmp_path / "m.safetensors"))
    reason = r"has 'm.experts.2.\w+_proj.weight', and by the config there are 2 experts"
    with pytest.raises(BadInput, match=reason):
        by_expert({f"m.experts.{expert}.{APART[0]}": None for expert in range(2)}, handles)


def test_a_linears_matrix_is_turned_for_a_class_that_has_it_the_other_way() -> None:
    """A reader of quantized checkpoints gives [out, in]."""
    stored = FileWeight(Path("absent"), 0, (8, 4), torch.float32)
    name = "m.experts.0.gate_up_proj"
    weights = by_expert({name: None}, {f"{name}.weight": stored})
    assert weights[name].shape == (4, 8) and weights[name].transposed() is stored
