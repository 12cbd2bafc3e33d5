"""Stacks of experts are cut where they lie in their file, and put together again."""

from __future__ import annotations

import copy
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.weights import FileWeight, Weight, read_safetensors_header
from graphwright.ir.load.hf.experts import by_expert, fill, split_experts
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


@pytest.mark.parametrize("kind", ["HYV4", "NemotronH"])
def test_experts_run_by_what_their_own_class_does(kind: str) -> None:
    """A gate that is clamped at a limit, and none at all."""
    library: Any = importlib.import_module("transformers")
    config = getattr(library, f"{kind}Config")(
        hidden_size=8, moe_intermediate_size=4, n_routed_experts=3, swiglu_limit=0.1,
        num_experts=3, num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    config._experts_implementation = "eager"
    file = importlib.import_module(inspect.getmodule(getattr(library, f"{kind}Model")).__name__)
    whole = getattr(file, f"{kind}Experts")(config)
    stacks = {f"experts.{name}": torch.randn_like(p) for name, p in whole.named_parameters()}
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(stacks[f"experts.{name}"])
    holder = torch.nn.Module()
    holder.experts = copy.deepcopy(whole)
    split_experts(holder)
    for name in [name for name, _ in holder.experts.named_parameters()]:
        expert, part = name.split(".")[:2]
        stack = stacks.get(f"experts.{part}")
        if stack is None:
            halves = stacks["experts.gate_up_proj"].chunk(2, 1)
            stack = halves[("gate_proj", "up_proj").index(part)]
        owner = holder.experts.get_submodule(f"{expert}.{part}")
        owner.weight = torch.nn.Parameter(stack[int(expert)], requires_grad=False)
    x, picked = torch.randn(5, 8), torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]])
    weights = torch.rand(5, 2)
    expected = whole(x, picked, weights)
    torch.testing.assert_close(holder.experts(x, picked, weights), expected, rtol=1e-5, atol=1e-6)
