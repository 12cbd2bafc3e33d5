"""What blocks do, told without running a path: several scores, and the paths that a mix of them
would take first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import torch

from .crash import cka
from .path_runner import PathRunner, Places

SCORES = ("influence", "size", "unlikeness", "alone")
"""How far a block turns the stream (arXiv 2403.03853), how much it adds beside it, how unlike it
leaves the samples' states to each other (1 - linear CKA, arXiv 2310.15477), and how far the outputs
move without it."""


def cheap_scores(runner: PathRunner, blocks: int) -> torch.Tensor:
    """Each score of each block, ``[scores, blocks]`` f64, as standard scores over the blocks: what
    is cheap to leave out has the lowest.

    Takes the streams of one run, and for the last score the rest of a run behind each block.
    """
    whole = tuple(range(blocks))
    rows = []
    before = runner.tokens(())
    for place in whole:
        after = runner.tokens(whole[: place + 1])
        added, norm = after - before, before.norm(dim=-1).clamp(min=1e-30)
        turned = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)
        rows.append([
            float(turned.mean()), float((added.norm(dim=-1) / norm).mean()),
            1 - cka(before, after), runner.without(whole, place),
        ])  # fmt: skip
        before = after
    scores = torch.tensor(rows, dtype=torch.float64).T
    spread = scores.std(1, keepdim=True).clamp(min=1e-30)
    return (scores - scores.mean(1, keepdim=True)) / spread


def cheapest_first(worth: Sequence[float], length: int) -> Iterator[Places]:
    """All paths of ``length`` different blocks, in the order of what they leave out together: first
    that without the blocks of least worth."""
    order = sorted(range(len(worth)), key=lambda i: (worth[i], i))
    count = len(worth) - length
    first = tuple(range(count))
    queue, known = [(sum(worth[order[i]] for i in first), first)], {first}
    while queue:
        total, places = heapq.heappop(queue)
        gone = {order[i] for i in places}
        yield tuple(i for i in range(len(worth)) if i not in gone)
        for slot, place in enumerate(places):
            nearest = places[slot + 1] if slot + 1 < count else len(order)
            if place + 1 == nearest:
                continue
            moved = (*places[:slot], place + 1, *places[slot + 1 :])
            if moved not in known:
                known.add(moved)
                change = worth[order[place + 1]] - worth[order[place]]
                heapq.heappush(queue, (total + change, moved))
