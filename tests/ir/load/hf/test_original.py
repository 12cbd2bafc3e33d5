"""What transformers makes of a folder: the source that our reading of it is held against."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.run.verify import compare

IDS = torch.arange(12).reshape(3, 4)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers: Any = importlib.import_module("transformers")
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("qwen2")
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_too_large_for_a_copy_is_run_a_module_at_a_time(
    dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = gw.load(folder, cache=False, dtype=dtype).source.original
    module: Any = importlib.import_module("graphwright.ir.load.hf.original")
    monkeypatch.setattr(module, "available_bytes", lambda: 0)
    lean = gw.load(folder, cache=False, dtype=dtype).source.original
    assert usual is not None and lean is not None
    cast = dtype == torch.float32
    assert lean.by.endswith(", the weights of one module at a time") is cast
    expected, actual = usual.start()(INPUTS), lean.start()(INPUTS)
    assert actual["logits"].dtype == dtype
    assert compare(expected, actual)["logits"].rel_l2 < 1e-6


def test_what_the_library_does_not_load_is_told(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    graph = gw.load(tmp_path, cache=False)
    (tmp_path / "model.safetensors").unlink()
    assert graph.source.original is not None
    with pytest.raises(BadInput, match=r"Qwen2ForCausalLM in transformers .* does not load it"):
        graph.source.original.start()


def test_layers_that_look_at_the_last_tokens_alone_keep_a_whole_cache(tmp_path: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    truth = gw.optimize(gw.load(tmp_path), "quantize{bits=8 group=32}").report.truth
    assert truth["probes"][1:] == ["a chunk after it", "a step after that"]
    assert truth["error"]["rel_l2"] < 1e-5
