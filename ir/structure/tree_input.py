"""The optional input by which one call of a decoder reads a tree of tokens instead of a line."""

from __future__ import annotations

from collections.abc import Sequence

import torch

TREE = "tree_mask"
"""The input, bool ``[new tokens, all tokens]``: False where a token does not see one that comes
before it. Left out, it is True for all: each token sees those before it, as ever. A token stands as
many places farther to the front as there are tokens that it does not see."""
TREE_KEY = "graphwright.tree_mask"
"""Metadata: there where an artifact is to have, or has, that input."""


def tree_mask(parents: Sequence[int], held: int) -> torch.Tensor:
    """The mask of a call that reads a root and a tree below it behind ``held`` tokens of a cache.

    ``parents`` says of each token below the root which row of the call its parent is, 0 the root;
    parents come first. Bool ``[1 + len(parents), held + 1 + len(parents)]``.
    """
    count = 1 + len(parents)
    visible = torch.eye(count, dtype=torch.bool)
    for row, parent in enumerate(parents, 1):
        visible[row] |= visible[parent]
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    return torch.cat([torch.ones(count, held, dtype=torch.bool), visible | later], 1)
