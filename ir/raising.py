"""Raising: native spellings become the words of the vocabulary, on either graph, in place."""

from __future__ import annotations

from . import (
    raise_activation,
    raise_attention,
    raise_bitstack,
    raise_linear,
    raise_nbit,
    raise_norm,
    raise_shape,
)
from .cleanup import clean, fold_constants
from .rewrite import RewriteReport, rewrite
from .rule import Rule
from .view import View

RULES: tuple[type[Rule], ...] = (
    *raise_norm.RULES,
    *raise_activation.RULES,
    *raise_linear.RULES,
    *raise_shape.RULES,
    *raise_attention.RULES,
    *raise_bitstack.RULES,
)
"""Every raising rule, in the order in which they are tried at a node."""

_FOLD_BYTES = 1 << 16
"""Enough for shapes, scales and rotary tables; weights are left as they are."""


def raise_graph(view: View, *, step: int = 0) -> RewriteReport:
    """Raise a graph: what stands in a match's way is cleaned and folded, then the rules apply.

    Outputs agree with those before to the rounding of their dtype. Raising twice changes nothing.
    The report counts rules, cleaning and folding; its refusals are those of the last round.
    """
    report = RewriteReport()
    report.applied.update(raise_nbit.raise_stored(view, step=step).applied)
    while True:
        report.applied.update(fold_constants(view, max_bytes=_FOLD_BYTES).applied)
        report.applied.update(clean(view).applied)
        done = rewrite(view, [rule() for rule in RULES], step=step)
        report.applied.update(done.applied)
        report.refusals = done.refusals
        if not done.total:
            view.drop_unused_weights()
            return report
