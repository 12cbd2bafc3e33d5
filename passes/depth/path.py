"""``path``: run the residual stream through chosen blocks, some of them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput, Refusal
from ...ir.moves import Path, follow
from ...ir.structure.recognize import last_tower
from ..base import BLOCKS, Context, Pass, PassResult
from .blocks import block_sites


@dataclass(frozen=True, kw_only=True)
class FollowPath(Pass):
    """Freeze one path through the blocks of the (language) model into the graph.

    ``blocks=0-3,3,5-11`` leaves out block 4 and runs block 3 twice. Repeated blocks share their
    weights. Such paths are what CoLa searches for (Li et al. 2025, arXiv 2507.07996), one for each
    input; this pass takes one for all. The path of every block once, in order, is the identity.
    """

    name: ClassVar[str] = "path"
    exact: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = (BLOCKS,)
    blocks: str
    """The blocks in order, as 0-3,3,5-11."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Path.parse(self.blocks)

    def run(self, context: Context) -> PassResult:
        blocks = last_tower(context.structure)
        path = Path.parse(self.blocks)
        before = self.plan(context)
        try:
            counts = follow(context.view, blocks, path, rule=self.name, step=context.step)
        except Refusal as refusal:
            raise BadInput(f"path: {refusal}") from None
        before.notes.append(f"{sum(counts)} blocks are run through, of {len(blocks)}")
        context.edited()
        return before

    def plan(self, context: Context) -> PassResult:
        blocks = last_tower(context.structure)
        path = Path.parse(self.blocks)
        counts = {i: path.blocks.count(i) for i in range(len(blocks))}
        changed = {i: count for i, count in counts.items() if count != 1}
        return PassResult(sites=block_sites(context.view, blocks, changed))
