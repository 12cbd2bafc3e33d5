"""From a rewritten graph of either kind to an ONNX graph of stock ops."""

from __future__ import annotations

from ..ir.canonical.families import canonicalize
from ..ir.core.errors import BadInput
from ..ir.core.view import View
from ..ir.fx.view import FxView
from ..ir.onnx.lower import lower
from ..ir.onnx.view import OnnxView
from ..ir.onnx.widen import widen
from ..ir.ops.bitstack_blocks import forget_types
from ..ir.rewrite.cleanup import clean
from ..ir.run.verify import check_structure
from ..ir.structure.vision import SIZED_BY_EXAMPLE


def lowered(view: View) -> OnnxView:
    """An ONNX graph that stock ONNX Runtime runs; ``view`` stays as it is.

    What is bfloat16 becomes float32, inputs and outputs too: see ``widen``. Raises ``BadInput``
    where an op of an FX graph has no ONNX form.
    """
    onnx = translated(view) if isinstance(view, FxView) else view.copy()
    assert isinstance(onnx, OnnxView)
    widen(onnx)
    canonicalize(onnx)
    clean(onnx)
    lower(onnx)
    check_structure(onnx)
    forget_types(onnx.model)
    return onnx


def translated(view: FxView) -> OnnxView:
    """The FX graph as an ONNX graph, our own ops still in their own domain.

    Raises ``BadInput`` where an op has no ONNX form, and for a graph with a cache that has lost
    tokens: prune those as ONNX graphs.
    """
    from .fx_to_onnx import to_onnx

    if SIZED_BY_EXAMPLE in view.metadata():
        raise BadInput(
            f"{view.metadata()[SIZED_BY_EXAMPLE]} pruned tokens in an FX graph with a key-value "
            "cache, which has no ONNX form then: apply the recipe to the ONNX graph instead "
            "(graphwright.backends.lowering.translated(graph), or optimize-model --cache)"
        )
    view = view.copy()
    clean(view)
    program = view.to_program()
    model = to_onnx(program, view.weights(), view.input_names(), view.output_names(), view.symbols)
    onnx = OnnxView(model, source=view.source)
    onnx.metadata().update(view.metadata())
    return onnx
