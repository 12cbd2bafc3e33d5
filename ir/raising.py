"""Raising: native spellings become ops of the vocabulary, so that a pattern is written once."""

from __future__ import annotations

from . import raise_attention, raise_elementwise, raise_linear
from .cleanup import clean
from .rewrite import RewriteReport, rewrite
from .rule import Rule
from .view import View

RULES: tuple[type[Rule], ...] = (
    *raise_elementwise.RULES, *raise_linear.RULES, *raise_attention.RULES,
)  # fmt: skip


def raise_graph(view: View) -> RewriteReport:
    """Clean a graph and raise it, in place; how often each rule applied.

    Idempotent. Outputs keep to the tolerance of their dtype (``verify.EXACT_REL_L2``).
    """
    clean(view)
    report = rewrite(view, [rule() for rule in RULES])
    clean(view)
    return report
