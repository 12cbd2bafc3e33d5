"""A small random gpt-oss in a folder, experts in MXFP4 as the published have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

EXPERTS = 4
_YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
    "beta_slow": 1.0, "original_max_position_embeddings": 4096,
}  # fmt: skip


def save_gpt_oss(
    folder: Path, *, size: int = 256, blocks: int = 2, words: int = 288, truncate: bool = False,
    mxfp4: bool = True,
) -> Path:  # fmt: skip
    """Write the folder. ``size`` is that of the stream and of an expert; ``truncate`` that of YaRN,
    false in the published configs; without ``mxfp4`` experts are float32."""
    import transformers
    from safetensors.torch import load_file, save_file

    config = transformers.GptOssConfig(
        vocab_size=words, hidden_size=size, intermediate_size=size, num_hidden_layers=blocks,
        num_local_experts=EXPERTS, num_experts_per_tok=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=8, max_position_embeddings=131072,
        rope_parameters={**_YARN, "truncate": truncate}, pad_token_id=1, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            small = name.endswith(("bias", "sinks", "norm.weight"))
            parameter.add_((0.3 if small else 0.05) * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    if not mxfp4:
        return folder
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, columns, rows = tensors.pop(name).shape
        tensors |= _blocks(name, (count, rows, columns // 32))
    save_file(tensors, path, {"format": "pt"})
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def _blocks(name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random codes, and exponents by which numbers are below .4."""
    return {
        f"{name}_blocks": torch.randint(0, 256, (*shape, 16)).to(torch.uint8),
        f"{name}_scales": torch.randint(119, 123, shape).to(torch.uint8),
    }
