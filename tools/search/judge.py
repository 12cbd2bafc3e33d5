"""How far a graph's outputs are from the source's, on data that nothing was fitted to."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Node, Value, View
from ...ir.moves.upstream import upstream
from ...ir.run.masks import padding_masks
from ...ir.run.sweep import bound, run_part
from ...ir.structure.cache_slots import answers
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import find_image_tokens
from ..evaluate.stats import bootstrap

NUMBERS = 1 << 26
"""Numbers of the source's outputs that are kept, at most: 256 MiB."""
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """What was measured on all rows. Both ends are of a 95 % interval, by bootstrap over rows."""

    value: float
    low: float
    high: float


class Judge:
    """The source's outputs on some batches, and how far others are from them.

    Where the model has a head over words or classes, the loss is how much the perplexity of what
    the source would write grows: ``exp(KL) - 1``, of the mean KL divergence of the distributions in
    nats. Else it is the squared error of the first output over its energy. Both grow with the
    square of small errors, so that those of many sites add up. Of a vision-language model only what
    follows the image is compared, so that graphs that drop tokens of it can be judged as well.

    Raises ``BadInput`` where the graph returns no numbers.
    """

    def __init__(self, view: View, structure: Structure, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.over_words = any(linear.role == "head" for linear in structure.linears)
        self.output = _output_name(view)
        source = outputs(view, self.output, batches)
        self.masks = padding_masks(view, batches)
        self._counts = self._chosen(view, structure, source)
        kept = [_tail(out, count) for out, count in zip(source, self._counts, strict=True)]
        self._source = [x.softmax(-1) if self.over_words else x for x in kept]
        self._crossed = [_cross_entropy(p, x) for p, x in zip(self._source, kept, strict=True)]

    def of(self, view: View) -> Loss:
        """The loss of a graph, in the vocabulary's words or not."""
        return self.loss(outputs(view, self.output, self.batches))

    def mean_of(self, view: View) -> float:
        """The ``mean`` of a graph."""
        return self.mean(outputs(view, self.output, self.batches))

    def loss(self, tensors: Sequence[Tensor]) -> Loss:
        """The loss of the outputs that some graph gave on the batches."""
        sums = self.sums(tensors)
        total = sums.sum(axis=1)
        ends = bootstrap(sums, lambda s: self._figure(s[0] / s[1]))
        value = float(self._figure(total[0] / total[1]))
        low, high = ends or (value, value)
        return Loss(value, low, high)

    def mean(self, tensors: Sequence[Tensor]) -> float:
        """The mean KL divergence or relative squared error itself: what adds up over sites."""
        total = self.sums(tensors).sum(axis=1)
        return float(total[0] / total[1])

    def additive(self, loss: float) -> float:
        """What ``mean`` would be at a loss."""
        return math.log1p(loss) if self.over_words else loss

    def figure(self, mean: float) -> float:
        """The loss at a ``mean``."""
        return float(self._figure(np.float64(mean)))

    def _chosen(self, view: View, structure: Structure, source: Sequence[Tensor]) -> list[Tensor]:
        """For each batch which positions of the output are compared, bool ``[rows, positions]``; of
        one without positions, its rows. Where they are many, they are evenly spread."""
        counts = []
        text = _behind_images(view, structure, self.batches)
        for out, masks, follows in zip(source, self.masks, text, strict=True):
            shape = out.shape[:2] if out.dim() > 2 else (out.shape[0], 1)
            fits = [mask for mask in masks if mask.shape == shape]
            count = fits[0].clone() if fits else torch.ones(shape, dtype=torch.bool)
            counts.append(count & follows if follows is not None else count)
        wide = max(out[0].numel() // count.shape[1]
                   for out, count in zip(source, counts, strict=True))  # fmt: skip
        step = max(1, -(-sum(int(count.sum()) for count in counts) * wide // NUMBERS))
        for count in counts:
            places = count.flatten().nonzero()[:, 0]
            dropped = places[torch.arange(len(places)) % step != step - 1]
            count.view(-1)[dropped] = False
        return counts

    def _figure(self, mean: np.float64) -> np.float64:
        return np.expm1(mean) if self.over_words else mean

    def sums(self, tensors: Sequence[Tensor]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """``[2, rows]``: divergence and tokens, or squared error and energy, of each row."""
        table = []
        known = zip(self._source, self._crossed, self._counts, strict=True)
        for out, (source, crossed, count) in zip(tensors, known, strict=True):
            tail, rows = _tail(out, count), count.sum(1).tolist()
            if self.over_words:
                amounts = (_cross_entropy(source, tail) - crossed).double()
                of = torch.ones_like(amounts)
            else:
                amounts = (tail - source).double().square().flatten(1).sum(1)
                of = source.double().square().flatten(1).sum(1)
            pairs = zip(torch.split(amounts, rows), torch.split(of, rows), strict=True)
            table += [[float(a.sum()), float(b.sum())] for a, b in pairs if len(a)]
        return np.array(table, dtype=np.float64).T


def _cross_entropy(source: Tensor, logits: Tensor) -> Tensor:
    """``-sum p log softmax(z)`` of each row; that of the source's own logits is its entropy."""
    return logits.logsumexp(-1) - torch.einsum("nk,nk->n", source, logits)


def value_of(view: View, output: str) -> Value:
    """What a graph returns under a name."""
    return dict(zip(view.output_names(), view.outputs(), strict=True))[output]


def needed(view: View, values: Collection[Value]) -> list[Node]:
    """The nodes that some values are computed by, in the order of the graph."""
    nodes = upstream(view, *values)
    return [node for node in view.nodes() if node in nodes]


def outputs(view: View, name: str, batches: Sequence[Batch]) -> list[Tensor]:
    """One output of a graph on each batch; no other is computed."""
    value = value_of(view, name)
    return run_part(view, needed(view, [value]), bound(view, batches), {value})[value]


def _output_name(view: View) -> str:
    named = dict(zip(view.output_names(), view.outputs(), strict=True))
    for name, value in answers(named).items():
        dtype = view.type(value).dtype
        if dtype is not None and dtype.is_floating_point:
            return name
    raise BadInput("the model returns no numbers that could be compared: there is no loss")


def _behind_images(
    view: View, structure: Structure, batches: Sequence[Batch]
) -> Sequence[Tensor | None]:
    """Of a vision-language model, the positions behind each prompt's image."""
    try:
        marked = find_image_tokens(view, structure, 0).placeholders
    except Refusal:
        return [None] * len(batches)
    masks = run_part(view, needed(view, [marked]), bound(view, batches), {marked})[marked]
    return [mask.flip(1).cumsum(1).flip(1) == 0 for mask in masks]


def _tail(out: Tensor, count: Tensor) -> Tensor:
    """The compared positions ``[n, K]`` f32. An output that is shorter than the source's has lost
    positions before them: it is aligned at its end."""
    if out.dim() < 3:
        return out[count[:, 0]].float()
    return out[count[:, count.shape[1] - out.shape[1] :]].float()
