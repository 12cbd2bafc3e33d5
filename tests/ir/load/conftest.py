"""What tests of several formats of checkpoints read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .checkpoints.quantized_cases import K, N


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in float32; its ``up_proj`` is ``[96, 64]``."""
    import transformers

    folder = tmp_path_factory.mktemp("dense")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=K, intermediate_size=N, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
