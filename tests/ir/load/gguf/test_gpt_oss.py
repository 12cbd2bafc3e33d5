"""A GGUF file of gpt-oss: its experts in MXFP4, and transformers' own model with their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.structure.recognize import recognize

gguf: Any = pytest.importorskip("gguf")
transformers: Any = pytest.importorskip("transformers")
MXFP4 = gguf.GGMLQuantizationType.MXFP4
SIZE, EXPERTS = 64, 3
ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
BLOCK = {
    "attn_norm.weight": "input_layernorm.weight", "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.router.weight", "ffn_gate_inp.bias": "mlp.router.bias",
    **{f"{name}.{end}": f"self_attn.{part}.{end}"
       for name, part in ATTENTION.items() for end in ("weight", "bias")},
}  # fmt: skip


def model() -> Any:
    torch.manual_seed(0)
    made = transformers.GptOssForCausalLM(transformers.GptOssConfig(
        vocab_size=48, hidden_size=SIZE, intermediate_size=SIZE, num_hidden_layers=1,
        num_local_experts=EXPERTS, num_experts_per_tok=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=5, max_position_embeddings=64,
        attn_implementation="eager", rope_parameters={
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096},
    )).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return made


def written(model: Any, path: Path, kinds: dict[str, Any], without: str = "") -> Path:
    """The model as llama.cpp's converter writes it; the model then has its numbers."""
    writer, state = gguf.GGUFWriter(path, "gpt-oss"), model.state_dict()
    for key, number in {
        "context_length": 64, "embedding_length": SIZE, "block_count": 1,
        "feed_forward_length": SIZE, "expert_feed_forward_length": SIZE,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.sliding_window": 5, "expert_count": EXPERTS,
        "expert_used_count": 2, "rope.scaling.original_context_length": 4096,
    }.items():  # fmt: skip
        writer.add_uint32(f"gpt-oss.{key}", number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(150000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(32.0)
    inner = "model.layers.0."
    named = {f"blk.0.{name}": state[inner + part] for name, part in BLOCK.items()} | {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"], "output.weight": state["lm_head.weight"],
    }  # fmt: skip
    experts = {name: state[f"{inner}mlp.experts.{name}"] for name in (
        "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")}  # fmt: skip
    for place, part in enumerate(("gate", "up")):
        named[f"blk.0.ffn_{part}_exps.bias"] = experts["gate_up_proj_bias"][:, place::2]
    named["blk.0.ffn_down_exps.bias"] = experts["down_proj_bias"]
    named.pop(without, None)
    for name, tensor in named.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    both = experts["gate_up_proj"]
    for part, turned in (
        ("gate", both[..., ::2]), ("up", both[..., 1::2]), ("down", experts["down_proj"]),
    ):  # fmt: skip
        kind = kinds.get(part, MXFP4)
        packed = gguf.quants.quantize(turned.mT.contiguous().numpy(), kind)
        back = gguf.quants.dequantize(packed, kind).astype(np.float32)
        turned.copy_(torch.from_numpy(back).mT)
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", packed, raw_dtype=kind)
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()
    return path


def test_the_graph_is_the_library_s_with_the_file_s_numbers(tmp_path: Path) -> None:
    library = model()
    view = gw.load(written(library, tmp_path / "m.gguf", {}), cache=False)
    canonicalize(view)
    quantized = [linear.name for linear in recognize(view).linears if linear.quantized]
    assert len(quantized) == 2 * EXPERTS, "gate and up of an expert are one linear"
    ids = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        expected = library(input_ids=ids).logits
    logits = gw.compile(view)(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)


def test_a_gate_of_another_type_than_what_goes_through_it(tmp_path: Path) -> None:
    path = written(model(), tmp_path / "m.gguf", {"up": gguf.GGMLQuantizationType.Q8_0})
    with pytest.raises(BadInput, match="and what goes through it are not of one type"):
        gw.load(path, cache=False)


@pytest.mark.parametrize(("part", "other"), [("up", "gate"), ("gate", "up")])
def test_a_tensor_that_is_absent_is_named(part: str, other: str, tmp_path: Path) -> None:
    name = "blk.0.ffn_{}_exps.bias"
    path = written(model(), tmp_path / "m.gguf", {}, without=name.format(part))
    missing, there = name.format(part), name.format(other)
    with pytest.raises(BadInput, match=rf"m.gguf: no tensor '{missing}', .* is '{there}'"):
        gw.load(path, cache=False)
