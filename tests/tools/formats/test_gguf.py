"""GGUF: blocks by the layout's own formula, and a file by the library's reader."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.ops.pack import n_groups, pack
from graphwright.tools.formats.convert import convert
from graphwright.tools.formats.gguf_experts import Tensor, stacked
from graphwright.tools.formats.gguf_file import _blocks, _rows
from graphwright.tools.formats.model_state import ModelState, PackedLinear, read_state
from graphwright.tools.formats.quantized_folder import _as_saved

ROWS, COLUMNS = 12, 64


def packed(bits: int, group: int) -> tuple[PackedLinear, torch.Tensor]:
    """A linear of random symmetric codes, and the matrix that it stands for."""
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=rng, dtype=torch.uint8)
    groups = n_groups(group, COLUMNS)
    scales = (torch.rand(ROWS, groups, generator=rng) * 0.05 + 0.01).half()
    dense = (codes.float() - (1 << (bits - 1))).view(ROWS, groups, -1) * scales.float().unsqueeze(2)
    stored = MemoryWeight(pack(codes, bits, group)), MemoryWeight(scales), None
    return PackedLinear("a.q_proj", ROWS, COLUMNS, bits, group, stored), dense.view(ROWS, COLUMNS)


def decoded(data: np.ndarray, kind: str) -> torch.Tensor:
    """Q4_0: the low nibbles are the first half of a block; Q8_0: signed bytes."""
    size = {"Q4_0": 18, "Q8_0": 34}[kind]
    blocks = data.reshape(ROWS, -1, size)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    body = blocks[..., 2:]
    if kind == "Q4_0":
        codes = np.concatenate([body & 15, body >> 4], -1).astype(np.float32) - 8
    else:
        codes = body.copy().view(np.int8).astype(np.float32)
    return torch.from_numpy((codes * scale).reshape(ROWS, COLUMNS))


@pytest.mark.parametrize(
    ("bits", "group", "kind"),
    [(4, 32, "Q4_0"), (4, 0, "Q4_0"), (3, 64, "Q4_0"), (2, 32, "Q4_0"), (8, 32, "Q8_0")],
)
def test_blocks_are_the_same_numbers(bits: int, group: int, kind: str) -> None:
    linear, dense = packed(bits, group)
    tensor = _blocks(linear, None)
    assert tensor.kind == kind and tensor.make().shape == tensor.shape
    assert torch.equal(decoded(tensor.make(), kind), dense)


def test_heads_of_arch_llama_are_interleaved() -> None:
    """Row ``2 i + h`` of a head is row ``i`` of its half ``h``; of other linears and archs none
    moves."""
    config = {"num_attention_heads": 3, "num_key_value_heads": 1}
    linear, dense = packed(4, 32)
    order = _rows("a.q_proj", ROWS, config, "llama")
    heads = dense.view(3, 2, 2, COLUMNS)
    expected = torch.stack([heads[:, h, i] for i in range(2) for h in range(2)], 1)
    numbers = decoded(_blocks(linear, order).make(), "Q4_0")
    assert torch.equal(numbers, expected.reshape(ROWS, COLUMNS)) and not torch.equal(numbers, dense)
    assert _rows("a.v_proj", ROWS, config, "llama") is None
    assert _rows("a.q_proj", ROWS, config, "qwen2") is None


def test_what_no_block_is_equal_to() -> None:
    linear, _ = packed(4, 16)
    with pytest.raises(BadInput, match=r"groups of 16 of 64 columns are no blocks of 32"):
        _blocks(linear, None)
    codes, scales, _ = packed(4, 32)[0].stored
    zeros = MemoryWeight(torch.zeros(ROWS, 1, dtype=torch.uint8))
    uneven = PackedLinear("b", ROWS, COLUMNS, 4, 32, (codes, scales, zeros))
    with pytest.raises(BadInput, match="b: Q4_0 and Q8_0 are symmetric"):
        _blocks(uneven, None)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("gguf")
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "source")
    result = gw.optimize(gw.load(folder / "source"), "quantize{bits=4 group=32 embeddings=8}")
    return gw.export(result.graph, folder / "out", report=result.report)


def test_without_the_package(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Missing, match=r"pip install 'graphwright\[gguf\]'"):
        convert(artifact, "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_read_back_as_a_person_types_it(
    language_model: Path, publish: Any, tmp_path: Path
) -> None:
    """A file of ours, and what is made of it: the same numbers, its tokenizer beside them."""
    pytest.importorskip("gguf")
    first = publish(language_model, "quantize{bits=8 group=32 accuracy_level=0}")
    convert(first, "gguf", tmp_path / "out")
    again = publish(tmp_path / "out" / "model.gguf", "clean")
    ids = torch.arange(3, 15).reshape(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = [gw.compile(folder)(**inputs)["logits"] for folder in (first, again)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    words = [json.loads((x / "tokenizer.json").read_text())["model"] for x in (first, again)]
    assert words[0]["vocab"] == words[1]["vocab"] and len(words[0]["vocab"]) > 500
    known = json.loads((again / "graphwright.json").read_text())["source"]
    assert known["kind"] == "gguf" and "6 of F32, 15 of Q8_0" in " ".join(known["notes"])


def test_the_librarys_reader(artifact: Path, tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf")
    assert convert(artifact, "gguf", tmp_path / "out") == [
        "model.gguf: 3 tensors F32, 8 tensors Q4_0, 1 tensors Q8_0"
    ]
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    state = read_state(artifact)
    table, words = state.whole["model.embed_tokens.weight"].read(), tensors["token_embd.weight"]
    assert np.array_equal(gguf.quants.dequantize(words.data, words.tensor_type), table.numpy())
    stored, linear = tensors["blk.0.ffn_down.weight"], state.packed["model.layers.0.mlp.down_proj"]
    dense = (linear.codes().float() - 8).view(64, 3, 32) * linear.scales().float().unsqueeze(2)
    numbers = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(numbers, dense.view(64, 96).numpy())


def test_experts_of_a_layer_are_one_tensor(tmp_path: Path) -> None:
    """Read back they are the same codes, the expert that all share with its gate among them."""
    gguf: Any = pytest.importorskip("gguf")
    import transformers

    config = transformers.Qwen2MoeConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, intermediate_size=96, num_experts=3,
        num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "source")
    ids = torch.arange(3, 15).reshape(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    result = gw.optimize(gw.load(tmp_path / "source"), "quantize{bits=4 group=32}")
    artifact = gw.export(result.graph, tmp_path / "artifact", report=result.report)
    convert(artifact, "gguf", tmp_path / "out")
    path = tmp_path / "out/model.gguf"
    shapes = {t.name: tuple(t.shape[::-1]) for t in gguf.GGUFReader(path).tensors}
    assert shapes["blk.0.ffn_gate_exps.weight"] == (3, 32, 64)
    assert shapes["blk.0.ffn_gate_inp_shexp.weight"] == (64,)
    logits = [gw.compile(graph)(**inputs)["logits"] for graph in (artifact, gw.load(path))]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    notes = convert(artifact, "compressed-tensors", tmp_path / "folder")
    # transformers' router is no linear: it looks for no codes there.
    assert notes[1].endswith("whole here: model.layers.0.mlp.gate.weight")
    there = gw.compile(gw.load(tmp_path / "folder", cache=False))(**inputs)["logits"]
    torch.testing.assert_close(there, logits[0], rtol=1e-4, atol=1e-5)
    settings = json.loads((artifact / "config.json").read_text()) | {"norm_topk_prob": True}
    (artifact / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=r"norm_topk_prob is True .* of qwen2_moe has False"):
        convert(artifact, "gguf", tmp_path / "other")


def test_checkpoints_have_other_names_for_the_experts_of_mixtral() -> None:
    linear, _ = packed(4, 32)
    names = {"layers.0.mlp.experts.1.gate_proj": "layers.0.block_sparse_moe.experts.1.w1",
             "layers.0.self_attn.q_proj": "layers.0.self_attn.q_proj"}  # fmt: skip
    state = ModelState(
        Path(), {"model_type": "mixtral"},
        {name: dataclasses.replace(linear, name=name) for name in names},
        {"layers.0.mlp.gate.weight": linear.weight()}, {}, {},
    )  # fmt: skip
    saved = _as_saved(state)
    assert [x.name for x in saved.packed.values()] == list(saved.packed) == [*names.values()]
    assert list(saved.whole) == ["layers.0.block_sparse_moe.gate.weight"]


def test_experts_that_are_stored_unlike_each_other() -> None:
    one = Tensor("m.experts.0.up_proj.weight", "Q4_0", (4, 18), lambda: np.zeros((4, 18), "u1"))
    other = dataclasses.replace(one, name="m.experts.1.up_proj.weight", kind="Q8_0")
    with pytest.raises(BadInput, match=r"0.up_proj.weight is stored as Q4_0 and m.experts.1"):
        list(stacked([one, other]))
