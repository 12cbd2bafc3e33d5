"""Canonicalization: native encodings become ops of the vocabulary, on either graph, in place."""

from __future__ import annotations

from ..core.view import View
from ..rewrite.cleanup import clean, fold_constants
from ..rewrite.driver import RewriteReport, rewrite
from ..rewrite.rule import Rule
from . import (
    activation,
    attention,
    bitstack,
    dequantize,
    einsum,
    folded_heads,
    fused,
    fused_attention,
    fused_gqa,
    fused_layers,
    fused_rotary,
    linear,
    nbit,
    norm,
    shape,
    shared_keys,
    siblings,
    sinks,
    stored,
    stored_nbit,
)

RULES: tuple[type[Rule], ...] = (
    *norm.RULES,
    *activation.RULES,
    *stored.RULES,
    *linear.RULES,
    *einsum.RULES,
    *shape.RULES,
    *attention.RULES,
    *folded_heads.RULES,
    *sinks.RULES,
    *shared_keys.RULES,
    *bitstack.RULES,
    *dequantize.RULES,
    *siblings.RULES,
    *stored_nbit.RULES,
)
"""Every rule, in the order in which they are tried at a node."""

FUSED: tuple[type[fused.Fused], ...] = (
    *fused_layers.RULES, *fused_attention.RULES, *fused_gqa.RULES, *fused_rotary.RULES,
)  # fmt: skip
"""What expands the fused ops of other tools, before anything else."""

_FOLD_BYTES = 1 << 16
"""Enough for shapes, scales and rotary tables; weights are left as they are."""


def canonicalize(view: View, *, step: int = 0) -> RewriteReport:
    """Canonicalize a graph: what hinders a match is cleaned and folded, then the rules apply.

    Outputs agree with those before to the rounding of their dtype. A second time changes nothing,
    and where no edit came between nothing is tried. The report counts rules, cleaning and folding;
    its refusals are those of the last round.
    """
    report = RewriteReport()
    if view.canonical == view.edits:
        return report
    report.applied.update(nbit.canonicalize_stored(view, step=step).applied)
    report.applied.update(fused.expand_fused(view, FUSED, step=step).applied)
    while True:
        report.applied.update(fold_constants(view, max_bytes=_FOLD_BYTES).applied)
        report.applied.update(clean(view).applied)
        round_ = rewrite(view, [rule() for rule in RULES], step=step)
        report.applied.update(round_.applied)
        report.refusals = round_.refusals
        if not round_.total:
            view.drop_unused_weights()
            view.canonical = view.edits
            return report
