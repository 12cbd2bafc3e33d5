"""What passes that change a model's depth share: which blocks there are, and what they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...ir.core.view import Node, View
from ...ir.moves.bypass_blocks import bodies
from ...ir.structure.recognize import Block
from ..base import Site


def block_sites(view: View, blocks: Sequence[Block], copies: Mapping[int, int]) -> list[Site]:
    """What becomes of blocks, by their indices, that the stream runs through so many times."""
    sizes = [_own_bytes(view, body) for body in bodies(view, [blocks[i] for i in copies])]
    return [
        Site(
            name=f"block {index}", kind="block", shape=(count,), bytes_before=size,
            bytes_after=size if count else 0,
        )
        for (index, count), size in zip(copies.items(), sizes, strict=True)
    ]  # fmt: skip


def _own_bytes(view: View, body: Sequence[Node]) -> int:
    """Bytes of the weights that only these nodes read."""
    members = set(body)
    sizes = {}
    for node in body:
        for value in view.arguments(node):
            weight = view.weight(value)
            if weight is not None and members.issuperset(view.users(value)):
                sizes[weight.key] = weight.nbytes
    return sum(sizes.values())
