"""From a rewritten graph of either kind to an ONNX graph of stock ops."""

from __future__ import annotations

from ..ir.cleanup import clean
from ..ir.fx import FxView
from ..ir.lower import lower
from ..ir.onnx import OnnxView
from ..ir.raising import raise_graph
from ..ir.verify import check_structure
from ..ir.view import View


def lowered(view: View) -> OnnxView:
    """An ONNX graph that stock ONNX Runtime runs; ``view`` stays as it is.

    Raises ``BadInput`` where an op of an FX graph has no ONNX form.
    """
    onnx = translated(view) if isinstance(view, FxView) else view.copy()
    assert isinstance(onnx, OnnxView)
    raise_graph(onnx)
    clean(onnx)
    lower(onnx)
    check_structure(onnx)
    return onnx


def translated(view: FxView) -> OnnxView:
    """The FX graph as an ONNX graph, our own ops still in their own domain."""
    from .fx_to_onnx import to_onnx

    view = view.copy()
    clean(view)
    program = view.to_program()
    model = to_onnx(program, view.weights(), view.input_names(), view.output_names(), view.symbols)
    return OnnxView(model, source=view.source)
