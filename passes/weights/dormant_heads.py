"""``dormant-heads``: heads that look at the first token alone go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import Node, View
from ...ir.run.masks import padding_masks
from ...ir.run.statistics import Mean, Stat, Statistics
from ...ir.run.sweep import Results, sweep_together
from ..base import REDEFINED, STORED, Context, Needs, Pass, PassResult
from ..linear_pass import weight_of
from .flap import SHRUNK
from .structured import Place, find_places, learned, take_away


@dataclass(frozen=True, kw_only=True)
class DormantHeads(Pass):
    """Remove heads whose attention rests on the first token, whatever the text.

    Active-dormant heads (Guo et al. 2024, arXiv 2410.13835): on the calibration data the mean
    attention of a dormant head to the first token is near 1, and its output hardly changes. Heads
    with ``threshold`` or more go, and the mean of what they gave the next linear stays as a bias.
    Heads that share keys go where all of them are dormant; one head of keys stays in each place. A
    graph with a key-value cache keeps its heads (see ``flap``). Needs calibration data.
    """

    name: ClassVar[str] = "dormant-heads"
    exact: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(calibration=True, stats=(Stat("mean", at="linear"),))
    provides: ClassVar[tuple[str, ...]] = (SHRUNK, REDEFINED)
    excludes: ClassVar[tuple[str, ...]] = (STORED,)
    threshold: float = 0.95
    """Least mean attention to the first token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise BadInput(f"dormant-heads: threshold={self.threshold} is a share of attention")

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        places = find_places(context, result, ("heads",))
        shares = context.once("attention", lambda: self._shares(context, places))
        kept, going = {}, []
        for place in places:
            kept[place.name] = awake(shares[place.name], place.count, self.threshold)
            if len(kept[place.name]) < place.count:
                going.append(place)
            else:
                most = float(shares[place.name].max())
                reason = f"its heads attend elsewhere: one gives the first token {most:.2f} at most"
                result.refused.append((place.name, reason))
        if going:
            biases = self._biases(context, going, kept)
            repairs = {name: (None, bias) for name, bias in biases.items()}
            take_away(context, kept, places, repairs, result, self.name)
        return result

    def plan(self, context: Context) -> PassResult:
        """No head is known to be dormant before data says so: the forecast is that all stay."""
        result = PassResult()
        places = find_places(context, result, ("heads",))
        result.notes.append(
            f"which of the heads of {len(places)} places are dormant is decided by the data"
        )
        result.edits = len(places)
        return result

    def _shares(self, context: Context, places: Sequence[Place]) -> dict[str, Tensor]:
        nodes = {place.site.node: place.name for place in places if place.site is not None}
        by_node = first_token_shares(context.view, context.calibration, nodes)
        return {nodes[node]: share for node, share in by_node.items()}

    def _biases(
        self, context: Context, places: Sequence[Place], kept: dict[str, list[int]]
    ) -> dict[str, Tensor]:
        def bias(context: Context, place: Place, statistics: Statistics) -> dict[str, Tensor]:
            mean = statistics[Mean].mean
            mean[place.columns(kept[place.name])] = 0
            return {"bias": weight_of(context.view, place.sink).read().double() @ mean}

        by_place = learned(context, self, places, bias, "means")
        return {name: fields["bias"] for name, fields in by_place.items()}


def awake(shares: Tensor, groups: int, threshold: float) -> list[int]:
    """The heads of keys of which a query is not dormant; the least dormant where all are."""
    least = shares.reshape(groups, -1).amin(1)
    stays = [i for i in range(groups) if float(least[i]) < threshold]
    return stays or [int(least.argmin())]


def first_token_shares(
    view: View, batches: Sequence[Any], nodes: Any
) -> dict[Node, Tensor]:
    """Of each ``sdpa`` in ``nodes``, the mean attention of its heads to the first token that they
    may see, f64 ``[heads]``. Queries that see one token alone, and padding, do not count."""
    masks = padding_masks(view, batches)
    shares: dict[Node, Tensor] = {}

    def visit(node: Node, inputs: list[list[Any]], results: list[Results]) -> None:
        order = [view.arguments(node).index(o) for o in view.operands(node)[:2]]
        rest = [view.arguments(node).index(o) for o in view.operands(node)[3:4] if o is not None]
        total, count = torch.zeros(0), 0
        for row, padding in zip(inputs, masks, strict=True):
            q, k = (row[i] for i in order)
            mask = row[rest[0]] if rest else None
            share, queries = _share(q, k, mask, view.attrs(node), padding)
            total, count = (total + share if total.numel() else share), count + queries
        shares[node] = total / max(1, count)

    sweep_together(view, batches, visit, frozenset(nodes), outputs=False)
    return shares


def _share(
    q: Tensor, k: Tensor, mask: Tensor | None, attrs: Any, padding: Sequence[Tensor]
) -> tuple[Tensor, int]:
    """The sum over counted queries of their attention to the first token, ``[heads]``, and how many
    they are."""
    if attrs["gqa"]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = attrs["scale"] if attrs["scale"] is not None else q.shape[-1] ** -0.5
    logits = (q.double() @ k.double().transpose(-1, -2)) * scale
    if attrs["softcap"]:
        logits = attrs["softcap"] * torch.tanh(logits / attrs["softcap"])
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if attrs["causal"]:
        allowed = allowed.tril(k.shape[2] - q.shape[2])
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        logits, allowed = logits + mask, allowed & (mask > torch.finfo(mask.dtype).min / 2)
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
    first = allowed.double().argmax(-1, keepdim=True)
    share = weights.gather(-1, first)[..., 0]
    counts = allowed.sum(-1) > 1
    for padding_mask in padding:
        if padding_mask.shape == (q.shape[0], q.shape[2]):
            counts = counts & padding_mask[:, None]
    counts = counts.expand_as(share)
    return (share * counts).sum((0, 2)), int(counts[:, 0].sum())
