"""From a rewritten graph of either kind to an ONNX graph of stock ops."""

from __future__ import annotations

from ..ir.core.heap import uncollected
from ..ir.core.view import View
from ..ir.fx.view import FxView
from ..ir.onnx.lower import lower
from ..ir.onnx.view import OnnxView
from ..ir.onnx.widen import widen
from ..ir.ops.bitstack_blocks import forget_types
from ..ir.rewrite.cleanup import clean
from ..ir.rewrite.driver import rewrite
from ..ir.run.verify import check_structure
from .attention_form import ShareKeys, SpellAttention
from .fx_to_onnx import translated


@uncollected()
def lowered(view: View) -> OnnxView:
    """An ONNX graph that stock ONNX Runtime runs; ``view`` stays as it is.

    What is bfloat16 becomes float32, inputs and outputs too: see ``widen``. Raises ``BadInput``
    where an op of an FX graph has no ONNX form.
    """
    onnx = translated(view) if isinstance(view, FxView) else view.copy()
    assert isinstance(onnx, OnnxView)
    widen(onnx)
    clean(onnx)
    rewrite(onnx, [ShareKeys(), SpellAttention()])
    lower(onnx)
    clean(onnx)
    check_structure(onnx)
    forget_types(onnx.model)
    return onnx


__all__ = ["lowered", "translated"]
