"""``tree-mask``: one call may read a tree of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput
from ...ir.structure.cache_slots import has_cache, has_states
from ...ir.structure.tree_input import TREE, TREE_KEY
from ..base import Context, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class TreeMask(Pass):
    """Give the artifact the optional input ``tree_mask``, by which one call reads many candidates
    of what comes next (the tree attention of SpecInfer, arXiv 2305.09781): exact.

    ``generate --draft recycle`` drafts by it. ``tree_mask``, bool ``[new tokens, all tokens]``, is
    False where a token does not see one before it; left out, nothing changes. A token's place
    follows: it stands behind those that it sees. What else hides keys must be padding and causality
    alone: windows and biases that count distances in memory are refused when the artifact is
    written.
    """

    name: ClassVar[str] = "tree-mask"
    exact: ClassVar[bool] = True

    def run(self, context: Context) -> PassResult:
        result = self.plan(context)
        context.view.metadata()[TREE_KEY] = "true"
        return result

    def plan(self, context: Context) -> PassResult:
        if not has_cache(context.view):
            raise BadInput(
                "tree-mask: candidates are read behind a key-value cache, and the graph has none: "
                "load the model with its cache (without --no-cache)"
            )
        if has_states(context.view):
            raise BadInput(
                "tree-mask: candidates that are wrong are taken back, and this model has layers "
                "whose state holds every token that was read (past.N.recurrent, past.N.conv)"
            )
        return PassResult(edits=1, notes=[f"the artifact takes the optional input {TREE}"])
