"""What passes that change a model's depth share: which blocks there are, and how much each does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import Node, Value, View
from ...ir.moves.bypass_blocks import bodies
from ...ir.run.statistics import token_masks
from ...ir.run.sweep import sweep_together
from ...ir.structure.recognize import Block
from ..base import Context, Site

Batches = Sequence[Mapping[str, Tensor]]


def decoder_blocks(context: Context) -> list[Block]:
    """The blocks of the last tower: of a vision-language model, those of its language model.

    They are numbered from 0 in the tower. Raises ``BadInput`` where no block is recognised.
    """
    blocks = context.structure.blocks
    if not blocks:
        raise BadInput(
            "no block is recognised in this model: there is no residual stream with attention. "
            "`optimize-model inspect MODEL` shows what is"
        )
    return [block for block in blocks if block.tower == blocks[-1].tower]


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


def block_influence(view: View, blocks: Sequence[Block], batches: Batches) -> list[float]:
    """``BI = 1 - mean over tokens of cos(h_before, h_behind)`` of each block.

    ShortGPT (Men et al. 2024, arXiv 2403.03853). Masked tokens do not count.
    """
    masks = token_masks(batches)
    found: list[float] = []

    def compare(before: list[Tensor], behind: list[Tensor]) -> float:
        total, count = 0.0, 0
        for a, b, mask in zip(before, behind, masks, strict=True):
            cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
            if mask is not None and mask.shape == cosine.shape:
                cosine = cosine[mask]
            total, count = total + float(cosine.sum()), count + cosine.numel()
        return 1 - total / max(1, count)

    states = _states(view, blocks, batches, lambda tensors: tensors)
    for block in blocks:
        found.append(compare(states[block.entry], states[block.exit]))
    return _finite(found)


def angular_distances(
    view: View, blocks: Sequence[Block], batches: Batches, count: int
) -> list[float]:
    """``arccos(cos(h_l, h_(l+count))) / pi`` on the last token, of each start ``l``.

    Gromov et al. 2024, arXiv 2403.17887: the mean over samples; runs that hold the last block are
    left out. Only one vector a sample and boundary is kept.
    """
    masks = token_masks(batches)

    def last(tensors: list[Tensor]) -> list[Tensor]:
        return [_last_tokens(t, mask) for t, mask in zip(tensors, masks, strict=True)]

    states = _states(view, blocks, batches, last)
    found = []
    for start in range(len(blocks) - count):
        a = torch.cat(states[blocks[start].entry]).double()
        b = torch.cat(states[blocks[start + count - 1].exit]).double()
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1)
        found.append(float(cosine.arccos().mean()) / math.pi)
    return _finite(found)


def _last_tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """The last token that counts of each sample: ``[batch, width]``."""
    if mask is None or mask.shape != states.shape[:-1]:
        return states[:, -1]
    place = torch.arange(mask.shape[1]).expand_as(mask).masked_fill(~mask, -1).amax(1)
    return states[torch.arange(len(states)), place]


def _states(
    view: View, blocks: Sequence[Block], batches: Batches, keep: Any
) -> dict[Value, list[Tensor]]:
    """What ``keep`` takes of the stream at every boundary of the blocks."""
    wanted: dict[Value, None] = {}
    for block in blocks:
        wanted |= {block.entry: None, block.exit: None}
    makers = {view.producer(value) for value in wanted}
    found: dict[Value, list[Tensor]] = {
        value: keep([batch[name] for batch in batches])
        for name, value in zip(view.input_names(), view.inputs(), strict=True)
        if value in wanted
    }

    def visit(node: Node, given: list[list[Any]], results: list[tuple[Any, ...]]) -> None:
        for i, value in enumerate(view.results(node)):
            if value in wanted:
                found[value] = keep([row[i] for row in results])

    stops = frozenset(m for m in makers if m is not None)
    sweep_together(view, batches, visit, stops, outputs=False)
    return found


def _finite(scores: list[float]) -> list[float]:
    if not all(map(math.isfinite, scores)):
        raise BadInput(
            "the residual stream is NaN or infinite on the calibration data: blocks cannot be told "
            "apart. Check the data and the passes before"
        )
    return scores
