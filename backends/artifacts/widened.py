"""An artifact in bfloat16 where nothing runs bfloat16: the same graph in float32, to be checked."""

from __future__ import annotations

from pathlib import Path

import onnx_ir

from ...ir.onnx.view import OnnxView
from ...ir.onnx.widen import widen

_NARROW = onnx_ir.DataType.BFLOAT16


def widened_twin(path: Path, device: str) -> bytes | None:
    """The model in ``path`` with float32 in the place of bfloat16, as bytes to be loaded instead;
    ``None`` where it can be run as it is.

    ONNX Runtime's CPU provider has no arithmetic in bfloat16. Nodes, weights and attributes of the
    twin are those of the file, whose data it reads; sums are rounded less.
    """
    if device != "cpu":
        return None
    model = onnx_ir.load(path)
    if not any(v.dtype == _NARROW for v in (*model.graph.inputs, *model.graph.outputs)):
        return None
    view = OnnxView(model)
    widen(view)
    return bytes(onnx_ir.to_proto(view.model).SerializeToString())
