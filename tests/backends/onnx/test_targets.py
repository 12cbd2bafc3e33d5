"""Artifacts for each target: what they are made of, what they compute, and how they are read."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import graphwright as gw
import onnx
import onnx_ir
import pytest
import torch
from graphwright.backends.onnx.lowering import lowered, remarks
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.run.verify import difference
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.vocab.targets import PORTABLE, find_target

RECIPE = "quantize{bits=4 group=16 embeddings=8}"
ONES = torch.ones(2, 20, dtype=torch.int64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> View:
    """A decoder of two layers with a cache, and a tied head that is large enough for its table to
    be stored in few bits."""
    transformers: Any = importlib.import_module("transformers")
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=2100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return gw.load(folder)


def exported(source: View, target: str, folder: Path, recipe: str = RECIPE) -> Path:
    result = gw.optimize(source, recipe, target=target)
    return gw.export(result.graph, folder / target, report=result.report, target=target)


def test_a_portable_artifact_is_standard_onnx(source: View, tmp_path: Path) -> None:
    folder = exported(source, "portable", tmp_path)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    kinds = Counter(node.op_type for node in model.graph.node)
    linears = len(recognize(source).linears)
    assert kinds["DequantizeLinear"] == linears and kinds["Expand"] == 0
    manifest = json.loads((folder / "graphwright.json").read_text())
    assert manifest["target"] == "portable"
    assert manifest["recipe"] == "quantize{bits=4 group=16 embeddings=8 accuracy_level=4}"
    view = OnnxView(onnx_ir.load(folder / "model.onnx"))
    canonicalize(view)
    structure, known = recognize(view), recognize(source)
    assert len(structure.linears) == linears and len(structure.blocks) == len(known.blocks)
    assert len(structure.attentions) == len(known.attentions)


def test_a_table_and_its_head_that_are_kept_are_standard_too(source: View, tmp_path: Path) -> None:
    folder = exported(source, "portable", tmp_path, "quantize{bits=4 group=16 embeddings=keep}")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [o.domain for o in model.opset_import] == [""]
    table = source.name(recognize(source).embeddings[0].weight)
    readers = {n.op_type for n in model.graph.node if table in n.input}
    assert readers == {"Gather", "Transpose"}


def test_targets_compute_the_same(source: View, tmp_path: Path) -> None:
    batch = {"input_ids": torch.arange(5, 45).reshape(2, 20), "attention_mask": ONES}
    outputs = [
        gw.compile(exported(source, target, tmp_path), threads=1)(**batch)["logits"]
        for target in ("cpu", "portable")
    ]
    assert difference(*outputs).rel_l2 < 2e-2  # both round activations, in sums of other orders
    exact, folder = "quantize{bits=4 group=16 accuracy_level=0}", tmp_path / "exact"
    plain = [
        gw.compile(exported(source, target, folder, exact), threads=1)(**batch)["logits"]
        for target in ("cpu", "portable")
    ]
    assert difference(*plain).rel_l2 < 1e-5


def test_levels_that_are_given_stay(source: View) -> None:
    for text in ("quantize{bits=4 accuracy_level=0}", "quantize{bits=8}", "quantize{bits=3}"):
        assert str(gw.Recipe.parse(text).settled(PORTABLE)) == text
    two = gw.Recipe.parse("quantize{bits=2 group=64},eora{rank=2}").settled(PORTABLE)
    assert str(two) == "quantize{bits=2 group=64 accuracy_level=4},eora{rank=2}"


def test_an_older_opset_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    node = onnx.helper.make_node("Neg", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    view = OnnxView(onnx_ir.from_proto(model))
    with pytest.raises(BadInput, match="opset 18, and the forms of target portable need 21"):
        lowered(view, PORTABLE)
    assert len(list(lowered(view).nodes())) == 1


def test_what_bfloat16_becomes_is_said() -> None:
    """By targets that have none; of the artifact, which has none either, nothing is."""
    view = gw.trace(torch.nn.Linear(4, 3).bfloat16(), (torch.ones(2, 4).bfloat16(),))
    for name, count in (("cpu", 1), ("portable", 1), ("cuda", 0)):
        written = lowered(view, find_target(name))
        said = [line for line in remarks(written) if line.startswith("bfloat16 is computed in f")]
        assert len(said) == count and all(f"the target {name} has none" in line for line in said)
        assert count == 0 or not remarks(lowered(written, find_target(name)))
