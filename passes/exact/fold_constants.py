"""``fold-constants``: compute at once what depends on constants alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput
from ...ir.rewrite import cleanup
from ..base import Context, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Replace nodes whose inputs are constants by their result, up to ``max_bytes`` each."""

    name: ClassVar[str] = "fold-constants"
    exact: ClassVar[bool] = True
    max_bytes: int = 1 << 20
    """Largest result to store."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_bytes < 1:
            raise BadInput(f"fold-constants: max_bytes={self.max_bytes} must be above 0")

    def run(self, context: Context) -> PassResult:
        report = cleanup.fold_constants(context.view, max_bytes=self.max_bytes)
        context.edited()
        notes = [f"{rule}: {count}" for rule, count in sorted(report.applied.items())]
        return PassResult(edits=report.total, notes=notes)

    def plan(self, context: Context) -> PassResult:
        return PassResult(edits=1, notes=["counted when it runs: folding reads constants"])
