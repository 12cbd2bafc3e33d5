"""``clean``: drop what computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.rewrite import cleanup
from ..base import Context, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class Clean(Pass):
    """Remove identities, checks, dead and repeated code; results stay bit-identical.

    A graph that has none is clean: ``-p clean`` writes any model as it is.
    """

    name: ClassVar[str] = "clean"
    exact: ClassVar[bool] = True
    optional: bool = True
    """It is no error if the graph is clean already."""

    def run(self, context: Context) -> PassResult:
        report = cleanup.clean(context.view)
        context.edited()
        notes = [f"{rule}: {count}" for rule, count in sorted(report.applied.items())]
        return PassResult(edits=report.total, notes=notes)

    def plan(self, context: Context) -> PassResult:
        return self.run(Context(context.view.copy()))
