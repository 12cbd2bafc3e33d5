"""An ONNX model as two files: the graph, and the data of its larger tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir
from onnx_ir import external_data

from ..ir.core.tensors import refuse_changed
from ..ir.ops.bitstack_blocks import in_file_order, place_of

INLINE_BYTES = 1024
"""Tensors up to this size stay inside the graph's file, but for blocks of stacked weights."""
PAGE_BYTES = 4096
PAGE_ALIGNED_BYTES = 1 << 16
"""Tensors above this size start on a page of the data file, so that they can be mapped in place."""


def save(
    model: onnx_ir.Model, path: Path, data: str,
    callback: Callable[[onnx_ir.TensorProtocol, external_data.CallbackInfo], None],
) -> None:  # fmt: skip
    """Write ``path`` and, beside it, ``data``; each tensor is read, written and freed in turn.

    ``model`` stays as it is. The blocks of stacked weights come last in the data, in their order:
    a smaller size of the model is a beginning of it. Raises ``BadInput`` where a tensor's own data
    file is another than when the model was opened.
    """
    values = [v for g in model.graphs() for v in g.initializers.values() if _has_data(v)]
    outside = in_file_order(v for v in values if _is_outside(v))
    inside = [v for v in values if not _is_outside(v)]
    originals = [(v, v.const_value) for v in values]

    def checked(tensor: onnx_ir.TensorProtocol, info: external_data.CallbackInfo) -> None:
        refuse_changed(tensor)
        callback(tensor, info)

    tensors = [
        *external_data.convert_tensors_to_external(
            [v.const_value for v in outside if v.const_value is not None], path.parent, data,
            callback=checked, alignment=PAGE_BYTES, align_threshold=PAGE_ALIGNED_BYTES,
        ),
        *(_in_memory(v.const_value) for v in inside if v.const_value is not None),
    ]  # fmt: skip
    try:
        for value, tensor in zip([*outside, *inside], tensors, strict=True):
            value.const_value = tensor
        onnx_ir.save(model, path)
    finally:
        for value, before in originals:
            value.const_value = before


def _has_data(value: onnx_ir.Value) -> bool:
    return value.const_value is not None


def _is_outside(value: onnx_ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and (
        tensor.nbytes > INLINE_BYTES or place_of(value.name) is not None
    )


def _in_memory(tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    if not isinstance(tensor, onnx_ir.ExternalTensor):
        return tensor
    refuse_changed(tensor)
    return external_data.convert_tensors_from_external([tensor])[0]
