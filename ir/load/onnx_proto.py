"""The proto of an ONNX file, external data unseen."""

from __future__ import annotations

from pathlib import Path

import onnx_ir

from ..core.errors import BadInput, Missing
from ..core.quiet import quiet


def read_model(path: Path) -> onnx_ir.Model:
    """The model as the file says it, external data unseen.

    Raises ``Missing`` for an absent file, ``BadInput`` for one that is damaged or cut short.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        raise Missing(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: the file is empty")
    try:
        with quiet():
            model = onnx_ir.load(path, format="protobuf")
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        # onnx-ir raises the last four for protos that parse and still make no sense.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInput(f"{path}: not an ONNX model, or cut short ({reason})") from error
    if not model.graph.outputs or "" not in model.opset_imports:
        raise BadInput(f"{path}: not an ONNX model, or cut short (no outputs or no opset)")
    return model
