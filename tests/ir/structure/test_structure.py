"""The same model has the same structure from its FX graph and from its ONNX export."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from graphwright.backends.onnx.lowering import lowered
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.quiet import quiet
from graphwright.ir.core.view import View
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure, compare
from graphwright.ir.structure.recognize import Structure, recognize
from graphwright.ir.vocab.targets import PORTABLE

from ... import models

MODELS = ("llama", "qwen2", "gemma2", "gpt2", "opt", "bert", "clip_vision", "vit", "t5_encoder")
GATED = ["q", "k", "v", "o", "gate", "up", "down"]
PLAIN = ["q", "k", "v", "o", "fc1", "fc2"]
ROLES = {
    "llama": [*GATED, *GATED, "head"],
    "qwen2": [*GATED, *GATED, "head"],
    "gemma2": [*GATED, *GATED, "head"],
    "gpt2": ["qkv", "o", "fc1", "fc2", "qkv", "o", "fc1", "fc2", "head"],
    "opt": [*PLAIN, *PLAIN, "head"],
    "bert": [*PLAIN, *PLAIN, ""],
    "clip_vision": [*PLAIN, *PLAIN, "head"],
    "vit": [*PLAIN, *PLAIN, ""],
    "t5_encoder": [*PLAIN, *PLAIN],
}
KV_HEADS = {"llama": 2, "qwen2": 2, "gemma2": 2}


@pytest.fixture(scope="module")
def views() -> dict[str, tuple[Any, View, View, dict[str, torch.Tensor]]]:
    """By model: the small model, its raised FX graph, its raised ONNX graph, the outputs before."""
    by_model = {}
    for name in MODELS:
        small = getattr(models, name)()
        fx = models.plain(small)
        before = sweep(fx, small.inputs)
        raised = models.raised(small)
        by_model[name] = small, raised["fx"], raised["onnx"], before
    return by_model


def additions(structure: Structure) -> tuple[Any, ...]:
    """The residual additions of the spine."""
    return tuple(getattr(structure.spine, "additions", structure.spine))


def facts(structure: Structure, names: bool = True) -> list[Any]:
    linears = [
        (x.name * names, x.role, x.block, x.in_features, x.out_features, x.bias is not None)
        for x in structure.linears
    ]
    sites = [(a.heads, a.kv_heads, a.head_dim, a.block) for a in structure.attentions]
    blocks = [(len(b.sub_blocks), len(b.linears), len(b.attentions)) for b in structure.blocks]
    return [linears, sites, blocks, len(additions(structure))]


@pytest.mark.parametrize("name", MODELS)
def test_fx_and_onnx_agree(name: str, views: Any) -> None:
    _, fx, onnx, _ = views[name]
    assert facts(recognize(fx)) == facts(recognize(onnx))


@pytest.mark.parametrize("name", MODELS)
def test_roles_blocks_and_heads(name: str, views: Any) -> None:
    structure = recognize(views[name][1])
    assert sorted(x.role for x in structure.linears) == sorted(ROLES[name])
    assert len(structure.blocks) == 2
    assert len(additions(structure)) == 4, "two residual additions a layer"
    assert [len(b.sub_blocks) for b in structure.blocks] == [2, 2]
    assert [b.tower for b in structure.blocks] == [0, 0]
    assert [a.block for a in structure.attentions] == [0, 1]
    heads = {(a.heads, a.kv_heads) for a in structure.attentions}
    assert heads == {(4, KV_HEADS.get(name, 4))}
    inside = [x for x in structure.linears if x.role not in ("", "head")]
    assert {x.block for x in inside} == {0, 1}
    assert len({x.name for x in structure.linears}) == len(structure.linears)


@pytest.mark.parametrize("name", MODELS)
def test_canonicalizing_keeps_the_numbers_and_settles(name: str, views: Any) -> None:
    small, fx, onnx, before = views[name]
    for view in (fx, onnx):
        check_structure(view)
        errors = compare(before, sweep(view, small.inputs))
        assert max(d.rel_l2 for d in errors.values()) < 2e-6
        view.canonical = None
        assert canonicalize(view).total == 0, "canonicalizing is idempotent"


def test_products_of_rounded_operands_are_attention(views: Any) -> None:
    """As ONNX Runtime's quantizer writes QDQ files; whole layers are blocks all the same."""
    _, fx, _, _ = views["vit"]
    model = lowered(fx, PORTABLE).model
    scale, zero = (
        onnx_ir.Value(name=name, const_value=onnx_ir.tensor(number, name=name))
        for name, number in (("s", np.float32(0.05)), ("z", np.int8(0)))
    )
    model.graph.initializers.add(scale)
    model.graph.initializers.add(zero)
    for node in [node for node in model.graph if node.op_type == "MatMul"]:
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is not None:
                continue
            rounded = onnx_ir.node("QuantizeLinear", [value, scale, zero])
            again = onnx_ir.node("DequantizeLinear", [rounded.outputs[0], scale, zero])
            model.graph.insert_before(node, [rounded, again])
            node.replace_input_with(index, again.outputs[0])
    view = OnnxView(model)
    view.infer_types()
    canonicalize(view)
    structure = recognize(view)
    assert not structure.attentions and len(structure.linears) == len(recognize(fx).linears)
    attends = [[sub.attends for sub in block.sub_blocks] for block in structure.blocks]
    assert attends == [[True, False], [True, False]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2"])
def test_the_exporters_own_file_gives_the_same_structure(name: str, views: Any) -> None:
    """torch.onnx.export folds weights and writes kᵀ through shapes; names may differ."""
    small, fx, _, before = views[name]
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            small.module, (), kwargs=small.inputs, dynamic_shapes=small.dynamic_shapes,
            dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    view = OnnxView(program.model)
    canonicalize(view)
    assert facts(recognize(view), names=False) == facts(recognize(fx), names=False)
    outputs = sweep(view, small.inputs)
    for expected, actual in zip(before.values(), outputs.values(), strict=True):
        assert float((expected - actual).norm() / expected.norm()) < 2e-6


def test_a_graph_without_attention_has_linears_and_no_blocks() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    view = trace(module, torch.randn(2, 5))
    canonicalize(view)
    structure = recognize(view)
    assert [(x.name, x.role) for x in structure.linears] == [("0", "fc1"), ("2", "fc2")]
    assert structure.blocks == () and structure.attentions == () and not additions(structure)
