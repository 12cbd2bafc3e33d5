"""Weights that know their codes: written as they were stored, read back, changed like any other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
import pytest
import torch
from graphwright.backends.onnx.lowering import lowered, remarks
from graphwright.ir.canonical import families
from graphwright.ir.core.weights import CastWeight, MemoryWeight
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.ops import OWN_OPS, OwnOp, Sample
from graphwright.ir.ops.coded_weight import CodedWeight, coded
from graphwright.ir.vocab.targets import CPU, PORTABLE, Target
from onnx_ir.tensor_adapters import from_torch_dtype

CASES = [
    pytest.param(op, sample, id=f"{op.name}-{sample.label}")
    for op in OWN_OPS.values() if op.as_numbers
    for sample in op.samples()
    if sample.operands[0] is not None and sample.operands[0].dtype == torch.float32
]  # fmt: skip


def stored(op: OwnOp, sample: Sample) -> CodedWeight:
    _, *constants, _ = sample.operands
    names = [name.removesuffix("?") for name in op.operands[1:-1]]
    parts = {n: MemoryWeight(c) for n, c in zip(names, constants, strict=True) if c is not None}
    return CodedWeight(op.name, parts, sample.attrs)


def graph(op: OwnOp, sample: Sample, weight: Any) -> OnnxView:
    """``linear(x, w, b)`` alone."""
    x, bias = sample.operands[0], sample.operands[-1]
    assert x is not None
    held = ir.Value(name="x", type=ir.TensorType(from_torch_dtype(x.dtype)),
                    shape=ir.Shape(["rows", *x.shape[1:]] if x.dim() > 1 else x.shape))  # fmt: skip
    model = ir.Graph([held], [], nodes=[], opset_imports={"": 21}, name="g")
    view = OnnxView(ir.Model(model, ir_version=10))
    end = ir.Node("", "Identity", [held], name="end")
    model.append(end)
    operands: list[Any] = [held, view.add_weight("layer.fc.weight", weight)]
    if bias is not None:
        operands.append(view.add_weight("layer.fc.bias", MemoryWeight(bias)))
    y = view.build("linear", operands, {}, before=end, name="fc")
    view.erase(end)
    view.set_outputs({"y": y})
    return view


def again(view: OnnxView) -> OnnxView:
    """The view as its file would give it, canonical."""
    opened = OnnxView(ir.from_proto(ir.to_proto(view.model)))
    families.canonicalize(opened)
    return opened


@pytest.mark.parametrize("target", [CPU, PORTABLE], ids=lambda target: target.name)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_what_is_written_is_read_back(
    op: OwnOp, sample: Sample, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "_FOLD_BYTES", 0)  # weights are larger than what is folded
    weight = stored(op, sample)
    onnx = lowered(graph(op, sample, weight), target)
    unpacked = "MatMulBnb4" in {node.op_type for node in onnx.model.graph}
    costs = ["a CPU unpacks codes of NF4 and FP4 at each call"] * unpacked
    expected = [f"weights that no pass changed keep their codes: 1 of {weight.form}", *costs]
    assert [said.partition(" (2.5 ms")[0] for said in remarks(onnx)] == expected
    opened = again(onnx)
    assert Counter(opened.op(node) for node in opened.nodes()) == {"linear": 1}
    (node,) = opened.nodes()
    value = opened.tensor(node, 1)
    held = coded(opened.weight(value))
    assert held is not None and opened.name(value).removesuffix(".T") == "layer.fc.weight"
    assert torch.equal(held.read(), weight.read())
    assert held.parts["codes"].nbytes == weight.parts["codes"].nbytes
    assert lowered(opened, target).weights().keys() == onnx.weights().keys()


def test_numbers_of_a_narrower_model_keep_their_codes() -> None:
    op = OWN_OPS["linear_bnb4"]
    sample = next(s for s in op.samples() if s.operands[0].dtype == torch.bfloat16)  # type: ignore[union-attr]
    weight = stored(op, sample)
    narrow = CastWeight(weight, torch.bfloat16)
    assert narrow.stored_bytes == weight.stored_bytes < narrow.nbytes
    onnx = lowered(graph(op, sample, narrow))
    (held,) = [w for w in onnx.weights().values() if w.dtype == torch.uint8]
    assert torch.equal(held.read(), weight.parts["codes"].read())
    assert "MatMulBnb4" in {node.op_type for node in onnx.model.graph}


@pytest.mark.parametrize("change", [{"K": 0}, {"block_size": 32}, {"N": 25}, {"quant_type": 2}])
def test_a_node_that_contradicts_its_constants_stays_native(change: dict[str, int]) -> None:
    op = OWN_OPS["linear_bnb4"]
    sample = op.samples()[0]
    view = lowered(graph(op, sample, stored(op, sample)))
    (node,) = view.model.graph
    for name, value in change.items():
        node.attributes[name] = ir.AttrInt64(name, value)
    assert [again(view).native_op(n) for n in again(view).nodes()] == ["com.microsoft::MatMulBnb4"]


def test_other_numbers_are_written_as_numbers() -> None:
    op = OWN_OPS["linear_float8"]
    sample = op.samples()[0]
    view = graph(op, sample, stored(op, sample))
    (node,) = view.nodes()
    view.set_weight(view.tensor(node, 1), MemoryWeight(torch.ones(24, 64)))
    assert remarks(lowered(view)) == []
