"""From a rewritten graph of either kind to an ONNX graph of stock ops, in the forms of a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput
from ...ir.core.heap import uncollected
from ...ir.core.view import View
from ...ir.fx.view import FxView
from ...ir.load.side_files import longest_text
from ...ir.onnx.axes import OURS, TOTAL_KEY, name_axes
from ...ir.onnx.lower import lower
from ...ir.onnx.view import OnnxView
from ...ir.onnx.widen import widen
from ...ir.ops.bitstack_blocks import forget_types
from ...ir.rewrite.cleanup import clean
from ...ir.rewrite.driver import RewriteReport, rewrite
from ...ir.rewrite.rule import Rule
from ...ir.run.verify import check_structure
from ...ir.structure.cache_slots import ROWS_KEY
from ...ir.structure.tree_input import TREE_KEY
from ...ir.vocab.targets import CPU, Target
from .forms.attention_form import ShareKeys, SpellAttention
from .forms.attention_node import UseAttention, take_opset
from .forms.coded_form import UNPACKED, KeepCodes, are_unpacked, codes_kept
from .forms.expert_form import RouteExperts
from .forms.group_query import UseGroupQuery, caches_are_shared
from .forms.norm_form import sum_before_norms
from .forms.row_places import Places
from .forms.siblings import join_siblings
from .forms.topk_form import never_without_rows
from .forms.tree_form import take_tree
from .fx_to_onnx import translated

FORMS_KEY = "graphwright.forms"
"""Metadata: which forms of the target the graph does not have, and why, one remark a line."""
WIDE_KEY = "graphwright.wide"
"""Metadata: the target for which bfloat16 became float32."""
CODES_KEY = "graphwright.codes"
"""Metadata: which linears keep the codes that their weights were stored in, and in a line of its
own what that costs."""


def _shared_keys(_: OnnxView) -> Sequence[Rule]:
    return ShareKeys(), SpellAttention()


def _one_node(view: OnnxView) -> Sequence[Rule]:
    return ShareKeys(), UseAttention(view)


def _group_query(*dtypes: torch.dtype) -> Callable[[OnnxView], Sequence[Rule]]:
    def rules(view: OnnxView) -> Sequence[Rule]:
        canonicalize(view)  # a graph that no pass has seen is not in the vocabulary's words yet
        places = Places(view, longest_text(view.source.folder))
        return ShareKeys(), UseGroupQuery(places, dtypes), SpellAttention()

    return rules


FORMS: dict[str, Callable[[OnnxView], Sequence[Rule]]] = {
    "attention": _one_node,
    "shared-keys": _shared_keys,
    "group-query": _group_query(torch.float16, torch.bfloat16),
    "group-query-float": _group_query(torch.float32, torch.float16),
}
"""Forms that rules make, by the names that targets have for them; others are the ops' own."""
EDITS: dict[str, Callable[[View], int]] = {
    "one-product": join_siblings, "sum-apart": sum_before_norms
}  # fmt: skip
"""Forms of several nodes at once, behind those that rules make."""


@uncollected()
def lowered(view: View, target: Target = CPU) -> OnnxView:
    """An ONNX graph of stock ops in the forms that ``target`` likes; ``view`` stays as it is.

    What is bfloat16 becomes float32 where the target has no bfloat16, inputs and outputs too: see
    ``widen``. What could not be written in a form of the target is said in its metadata. Raises
    ``BadInput`` where an op of an FX graph has no ONNX form, for an ONNX graph of an opset that is
    too old, and as ``take_tree``.
    """
    onnx = translated(view) if isinstance(view, FxView) else view.copy()
    assert isinstance(onnx, OnnxView)
    _check_opset(onnx, target)
    onnx.metadata().pop(WIDE_KEY, None)
    if torch.bfloat16 not in target.dtypes and widen(onnx):
        onnx.metadata()[WIDE_KEY] = target.name
    clean(onnx)
    if TREE_KEY in onnx.metadata():
        take_tree(onnx, longest_text(view.source.folder))
    forms = [rule for row in target.rows if row.form in FORMS for rule in FORMS[row.form](onnx)]
    _remark(onnx, forms, rewrite(onnx, [RouteExperts(), KeepCodes(), *forms]))
    _remark_codes(onnx, target)
    for row in target.rows:
        EDITS.get(row.form, _nothing)(onnx)
    lower(onnx, target)
    take_opset(onnx)
    never_without_rows(onnx)
    clean(onnx)
    if ROWS_KEY in onnx.metadata() and caches_are_shared(onnx):
        onnx.metadata()[ROWS_KEY] = "shared"
    check_structure(onnx)
    forget_types(onnx.model)
    if view.source.kind in OURS or TOTAL_KEY in onnx.metadata():
        name_axes(onnx.model)
    return onnx


def _nothing(view: View) -> int:
    return 0


def remarks(view: View) -> list[str]:
    """What a person should know of how a graph was written, one sentence each."""
    lines = view.metadata().get(FORMS_KEY, "").splitlines()
    codes, *costs = view.metadata().get(CODES_KEY, "").splitlines() or [""]
    if codes:
        lines += [f"weights that no pass changed keep their codes: {codes}", *costs]
    if WIDE_KEY in view.metadata():
        lines.append(
            "bfloat16 is computed in float32, inputs, outputs and cache too: the target "
            f"{view.metadata()[WIDE_KEY]} has none (cuda has)"
        )
    if ROWS_KEY in view.metadata():
        lines.append("attention takes rows by their length: padding goes behind a text, not before")
    return lines


def _remark(view: OnnxView, rules: Sequence[Rule], report: RewriteReport) -> None:
    """Say in the metadata what became of attention where a form of it may be refused."""
    if not any(isinstance(rule, UseGroupQuery) for rule in rules):
        return
    grouped, general = (report.applied[rule.name] for rule in (UseGroupQuery, SpellAttention))
    if grouped:
        view.metadata()[ROWS_KEY] = "begin"
    refusal = report.refusals.get(UseGroupQuery.name)
    if refusal is not None and general:
        view.metadata()[FORMS_KEY] = (
            f"{general} of {general + grouped} attentions keep their general form, not "
            f"GroupQueryAttention: {refusal.reason}"
        )
    elif not grouped:
        view.metadata()[FORMS_KEY] = "no attention is recognised: none becomes GroupQueryAttention"


def _remark_codes(view: OnnxView, target: Target) -> None:
    view.metadata().pop(CODES_KEY, None)
    codes = codes_kept(view)
    if codes and are_unpacked(view, target):
        codes += f"\n{UNPACKED}"
    if codes:
        view.metadata()[CODES_KEY] = codes


def _check_opset(view: OnnxView, target: Target) -> None:
    opset = view.model.opset_imports.get("", target.opset)
    if opset < target.opset:
        raise BadInput(
            f"the model is of opset {opset}, and the forms of target {target.name} need "
            f"{target.opset}: export it with opset_version={target.opset} or later, or convert it "
            "with onnx.version_converter"
        )


__all__ = ["lowered", "remarks", "translated"]
