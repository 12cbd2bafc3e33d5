"""Names of axes: all of a graph at once, and the total length as the sum that it is."""

from __future__ import annotations

import onnx_ir
from graphwright.ir.onnx.axes import TOTAL_KEY, name_axes, open_sums

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
decoder (int64[batch, seq] ids, int64[batch, 7] mask, bool which, float[batch, 2, past, 4] key)
    => (float[batch, 2, 7, 4] present)
    <int64[batch, 7] wide> {
    wide = Identity(mask)
    present = If (which) <
        then_branch = then () => (float[batch, 2, 7, 4] a) { a = Relu(key) },
        else_branch = other () => (float[batch, 2, 7, 4] b) { b = Neg(key) }
    >
}"""
"""A decoder's axes; where the 7 stand, the texts cannot say a sum."""


def decoder(total: str) -> onnx_ir.Model:
    model = onnx_ir.from_onnx_text(TEXT)
    for value in values(model):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([total if dim == 7 else dim for dim in value.shape])
    return model


def values(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    return [*model.graph.inputs, *(v for n in model.graph.all_nodes() for v in n.outputs)]


def shapes(model: onnx_ir.Model) -> dict[str, str]:
    return {str(value.name): str(value.shape) for value in values(model)}


def test_all_values_are_renamed_and_the_sum_is_read_back() -> None:
    model = decoder("past + seq")
    name_axes(model)
    whole = "[batch_size,2,total_sequence_length,4]"
    assert shapes(model) == {
        "ids": "[batch_size,sequence_length]", "mask": "[batch_size,total_sequence_length]",
        "which": "[]", "key": "[batch_size,2,past_sequence_length,4]",
        "wide": "[batch_size,total_sequence_length]", "present": whole, "a": whole, "b": whole,
    }  # fmt: skip
    open_sums(model)
    assert shapes(model)["a"] == "[batch_size,2,past_sequence_length + sequence_length,4]"
    assert shapes(model)["mask"] == "[batch_size,past_sequence_length + sequence_length]"
    name_axes(model)  # as when an artifact becomes another one
    assert shapes(model)["wide"] == "[batch_size,total_sequence_length]"


def test_other_lengths_are_no_total() -> None:
    """Of a graph that is no decoder, and of one whose total somebody else has named."""
    model = decoder("2*seq - past")
    name_axes(model)
    assert shapes(model)["mask"] == "[batch_size,2*sequence_length - past_sequence_length]"
    assert TOTAL_KEY not in model.metadata_props
    foreign = decoder("total_sequence_length")
    before = shapes(foreign)
    open_sums(foreign)
    assert shapes(foreign) == before
