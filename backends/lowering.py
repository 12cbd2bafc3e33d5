"""From a rewritten graph of either kind to an ONNX graph of stock ops, in the forms of a target."""

from __future__ import annotations

from collections.abc import Callable

from ..ir.core.errors import BadInput
from ..ir.core.heap import uncollected
from ..ir.core.view import View
from ..ir.fx.view import FxView
from ..ir.onnx.lower import lower
from ..ir.onnx.view import OnnxView
from ..ir.onnx.widen import widen
from ..ir.ops.bitstack_blocks import forget_types
from ..ir.rewrite.cleanup import clean
from ..ir.rewrite.driver import rewrite
from ..ir.rewrite.rule import Rule
from ..ir.run.verify import check_structure
from ..ir.vocab.targets import CPU, Target
from .attention_form import ShareKeys, SpellAttention
from .expert_form import RouteExperts
from .fx_to_onnx import translated
from .norm_form import sum_before_norms
from .siblings import join_siblings

FORMS: dict[str, tuple[type[Rule], ...]] = {"shared-keys": (ShareKeys, SpellAttention)}
"""Forms that rules make, by the names that targets have for them; others are the ops' own."""
EDITS: dict[str, Callable[[View], int]] = {
    "one-product": join_siblings, "sum-apart": sum_before_norms
}  # fmt: skip
"""Forms of several nodes at once, behind those that rules make."""


@uncollected()
def lowered(view: View, target: Target = CPU) -> OnnxView:
    """An ONNX graph of stock ops in the forms that ``target`` likes; ``view`` stays as it is.

    What is bfloat16 becomes float32, inputs and outputs too: see ``widen``. Raises ``BadInput``
    where an op of an FX graph has no ONNX form, and for an ONNX graph of an opset that is too old.
    """
    onnx = translated(view) if isinstance(view, FxView) else view.copy()
    assert isinstance(onnx, OnnxView)
    _check_opset(onnx, target)
    widen(onnx)
    clean(onnx)
    forms = [rule() for row in target.rows for rule in FORMS.get(row.form, ())]
    rewrite(onnx, [RouteExperts(), *forms])
    for row in target.rows:
        EDITS.get(row.form, _nothing)(onnx)
    lower(onnx, target)
    clean(onnx)
    check_structure(onnx)
    forget_types(onnx.model)
    return onnx


def _nothing(view: View) -> int:
    return 0


def _check_opset(view: OnnxView, target: Target) -> None:
    opset = view.model.opset_imports.get("", target.opset)
    if opset < target.opset:
        raise BadInput(
            f"the model is of opset {opset}, and the forms of target {target.name} need "
            f"{target.opset}: export it with opset_version={target.opset} or later, or convert it "
            "with onnx.version_converter"
        )


__all__ = ["lowered", "translated"]
