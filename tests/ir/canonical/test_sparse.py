"""The side path of outlier weights read back from its ONNX form."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphwright.ir.canonical.sparse import FuseSparse
from graphwright.ir.core.weights import MemoryWeight, tensor_bytes
from graphwright.ir.onnx.lower import lower
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.ops import OWN_OPS, Sample
from graphwright.ir.ops.sparse_linear import _Buckets, entries, index_dtype
from graphwright.ir.rewrite.driver import rewrite
from graphwright.ir.run.sweep import sweep
from hypothesis import given, settings
from hypothesis import strategies as st

OP = OWN_OPS["sparse_linear"]
SAMPLES = [
    pytest.param(s, id=s.label) for s in OP.samples() if s.operands[0].dtype == torch.float32  # type: ignore[union-attr]
]  # fmt: skip


def drawn(sample: Sample) -> OnnxView:
    """A graph that is one ``sparse_linear``, written out."""
    x, *parts = sample.operands
    assert x is not None
    held = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))
    graph = ir.Graph([held], [], nodes=[], opset_imports={"": 20}, name="g")
    view = OnnxView(ir.Model(graph, ir_version=10))
    end = ir.Node("", "Identity", [held], name="end")
    graph.append(end)
    operands = [
        view.add_weight(f"fc.outliers.{name}", MemoryWeight(part))
        for name, part in zip(("rows", "cols", "values"), parts, strict=True)
        if part is not None
    ]
    y = view.build("sparse_linear", [held, *operands], sample.attrs, before=end, name="fc.side")
    view.erase(end)
    view.set_outputs({"y": y})
    lower(view)
    return view


def again(view: OnnxView) -> OnnxView:
    return OnnxView(ir.from_proto(ir.to_proto(view.model)))


def raised(view: OnnxView) -> OnnxView:
    assert rewrite(view, [FuseSparse()]).total == 1
    view.drop_unused_weights()
    return view


@pytest.mark.parametrize("sample", SAMPLES)
def test_what_is_lowered_is_read_back(sample: Sample) -> None:
    opened = raised(again(drawn(sample)))
    (node,) = opened.nodes()
    assert opened.op(node) == "sparse_linear"
    assert opened.attrs(node) == sample.attrs
    x, rows, cols, values = sample.operands
    assert x is not None and rows is not None and cols is not None and values is not None
    handles = [opened.weight(v) for v in opened.operands(node)[1:]]
    assert set(opened.weights()) == {f"fc.outliers.{n}" for n in ("rows", "cols", "values")}
    width = index_dtype(int(sample.attrs["out_features"]))
    expected = [rows.to(width), cols, values]
    if not len(rows):
        expected = [torch.zeros(1, dtype=t.dtype) for t in expected]  # an empty matrix holds one 0
    for handle, tensor in zip(handles, expected, strict=True):
        assert handle is not None and handle.dtype == tensor.dtype
        assert torch.equal(handle.read().int(), tensor.int())
    actual = sweep(opened, {"x": x})["y"]
    torch.testing.assert_close(actual, OP.reference(*sample.operands, **sample.attrs))


@pytest.mark.parametrize("sample", SAMPLES)
def test_lowering_again_writes_the_same(sample: Sample) -> None:
    first = drawn(sample)
    second = raised(again(first))
    lower(second)

    def content(view: OnnxView) -> tuple[Counter[str], dict[str, bytes]]:
        kinds = Counter(node.op_type for node in view.nodes())
        held = {
            n: bytes(tensor_bytes(w.read())) for n, w in view.weights().items() if "by_row" in n
        }
        return kinds, held

    assert content(first) == content(second)


def test_another_sum_is_left_alone() -> None:
    sample = next(s for s in OP.samples() if s.label == "3x123-200-float32")
    view = again(drawn(sample))
    pad = next(n for n in view.nodes() if n.op_type == "Pad")
    pad.replace_input_with(1, view.integers([0, 0, 2, 0]))
    report = rewrite(view, [FuseSparse()])
    assert report.total == 0
    assert report.refusals["fuse-sparse"].reason == "the sums are not those of outlier weights"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 33), st.integers(1, 80), st.integers(0, 9))
def test_entries_are_the_inverse_of_buckets(rows: int, cols: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    flat = np.sort(rng.permutation(rows * cols)[:count])
    at, column = flat // cols, flat % cols
    buckets = _Buckets(at, rows)
    places, slots = entries(buckets.place, buckets.shapes, buckets.spread(column))
    assert np.array_equal(places, at)
    assert np.array_equal(slots, buckets.slot)
