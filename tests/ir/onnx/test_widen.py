"""bfloat16 weights keep their width in the file, and a tied table is in it once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphwright as gw
import onnx
import pytest
import torch
from graphwright.backends import compile as compile_graph
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.structure.recognize import recognize

IDS = torch.randint(0, 1500, (2, 9), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def model(dtype: torch.dtype, *, tied: bool) -> Any:
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=1500, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config).eval().to(dtype)


@pytest.mark.parametrize(("dtype", "tied"), [(torch.bfloat16, True), (torch.float32, False)])
def test_an_artifact_is_no_larger_than_its_source(
    dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    original = model(dtype, tied=tied)
    original.save_pretrained(tmp_path / "source")
    view = gw.load(tmp_path / "source", cache=False)
    out = gw.export(view, tmp_path / "out", samples=[INPUTS])
    source = (tmp_path / "source" / "model.safetensors").stat().st_size
    assert (out / "model.onnx.data").stat().st_size < 1.05 * source + 20_000
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    tables = [t for t in graph.initializer if sorted(t.dims) == [64, 1500]]
    assert len(tables) == (1 if tied else 2)
    stored = onnx.TensorProto.BFLOAT16 if dtype == torch.bfloat16 else onnx.TensorProto.FLOAT
    assert {t.data_type for t in tables} == {stored}
    # bfloat16 computed in float32 is the library's float32 model of the same numbers.
    with torch.no_grad():
        expected = original.float()(**INPUTS).logits
    for optimize in (True, False):
        actual = compile_graph(out, optimize=optimize)(**INPUTS)["logits"]
        assert float((actual - expected).norm() / expected.norm()) < 1e-5
    again = gw.load(out)
    canonicalize(again)
    before, after = recognize(view), recognize(again)
    assert [x.role for x in after.linears] == [x.role for x in before.linears]
    assert len(after.blocks) == len(before.blocks) == 2
    assert (after.embeddings[0].rows, after.embeddings[0].width) == (1500, 64)
