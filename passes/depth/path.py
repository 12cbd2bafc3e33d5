"""``path``: run the residual stream through chosen blocks, some of them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.moves import Path
from ...ir.structure.recognize import last_tower
from ..base import Context, Needs, PassResult
from .path_pass import PathPass


@dataclass(frozen=True, kw_only=True)
class FollowPath(PathPass):
    """Freeze one path through the blocks of the (language) model into the graph.

    ``blocks=0-3,3,5.attn,7-11`` runs block 3 twice, leaves out blocks 4 and 6, and of block 5 its
    feed-forward layers (``.mlp`` leaves out its attention). Repeated blocks share their weights.
    Such paths are what CoLa searches for (Li et al. 2025, arXiv 2507.07996), one for each input;
    this pass takes one for all. Halves are what Draft & Verify leaves out (Zhang et al. 2023, arXiv
    2309.08168). The path of every block once, in order, is the identity.
    """

    name: ClassVar[str] = "path"
    blocks: str
    """The blocks in order, as 0-3,3,5-11."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Path.parse(self.blocks)

    def requires(self) -> Needs:
        return Needs(stats=self.heal_stats())

    def run(self, context: Context) -> PassResult:
        result, path = PassResult(), Path.parse(self.blocks)
        blocks = last_tower(context.structure)
        self.follow(context, path, result)
        result.notes.append(f"path {path}, of {len(blocks)} blocks")
        return result

    def plan(self, context: Context) -> PassResult:
        return PassResult(sites=self.sites(context, Path.parse(self.blocks)))
