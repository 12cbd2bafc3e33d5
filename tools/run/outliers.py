"""Looking before changing: tails of activations, dormant heads, and what passes would cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.core.weights import Spool
from ...ir.run.calibrate import Request, calibrate
from ...ir.run.statistics import Gram, Moments, Stat, Statistic, Statistics
from ...ir.structure.recognize import Linear, Structure, recognize
from ...passes.base import Context
from ...passes.foreseen import Foreseen
from ...passes.learning import PutAway
from ...passes.linear_pass import LinearPass
from ...passes.recipe import Recipe
from ...passes.weights.dormant_heads import first_token_shares

DORMANT = 0.95
Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Cost:
    """What a pass takes from a linear's outputs, relative to them."""

    forecast: float
    """By its formula, on the first set of data."""
    measured: float
    """Of what it makes of the weight, fitted to the first set and judged on it."""
    spread: float | None
    """Fitted to each of several sets and judged on all of them: the largest less the least error,
    by their mean. How much it matters on which data one calibrates (the question of arXiv
    2405.20835)."""


@dataclass(frozen=True)
class Tails:
    """What is seen at one linear, on the first set of data."""

    name: str
    kurtosis: float
    peak: float
    """Largest magnitude over root mean square."""
    outliers: int
    """Features six times as large as the median one."""
    top_share: float
    massive: int
    costs: Mapping[str, Cost] = field(default_factory=dict)
    """By the pass as it was written; without those that leave the linear as it is."""


@dataclass(frozen=True)
class Outlook:
    sites: Sequence[Tails]
    dormant: Mapping[str, Tensor]
    """The mean attention to the first token of each head, by the linear that takes the heads."""
    agreement: Mapping[str, float]
    """Spearman's rank correlation of forecasts and measured errors over the sites, by pass."""
    overall: float
    """The same over all sites and passes together."""


@dataclass(frozen=True)
class Candidate:
    """A pass whose cost is asked for."""

    text: str
    pass_: LinearPass
    by: Foreseen

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Raises ``BadInput`` for what is not one pass, or one whose cost has no formula."""
        steps = Recipe.parse(text).steps
        pass_ = steps[0].pass_
        if len(steps) > 1 or not (isinstance(pass_, LinearPass) and isinstance(pass_, Foreseen)):
            raise BadInput(
                f"the cost of {text} has no formula: it takes one pass that rounds, masks or cuts "
                "each linear by itself, such as quantize, gptq, awq, wanda or low-rank"
            )
        return cls(str(steps[0]), pass_, pass_)

    def chosen(self, context: Context) -> list[Linear]:
        """The linears that it would change."""
        linears = self.pass_.select(context.structure)
        return [x for x in linears if self.pass_.reason_against(context, x) is None]


def outlook(view: View, sets: Sequence[Batches], passes: Sequence[str]) -> Outlook:
    """Sweep each set of data through a canonical graph, and the first one through its heads.

    Raises ``BadInput`` where there is no linear with a dense weight.
    """
    structure = recognize(view)
    linears = [linear for linear in structure.linears if view.op(linear.node) == "linear"]
    if not linears:
        raise BadInput("no linear of this model has a dense weight: there is nothing to look at")
    candidates = [Candidate.parse(text) for text in passes]
    context = Context(view, structure=structure)
    chosen = {c.text: {linear.name for linear in c.chosen(context)} for c in candidates}
    swept = [_swept(view, batches, linears, _stats(candidates)) for batches in sets]
    sites = []
    for linear, statistics in zip(linears, zip(*swept, strict=True), strict=True):
        own = [c for c in candidates if linear.name in chosen[c.text]]
        sites.append(_tails(view, linear, own, statistics))
    agreement = {c.text: _agreement(sites, [c.text]) for c in candidates}
    overall = _agreement(sites, [c.text for c in candidates])
    return Outlook(sites, _heads(view, structure, sets[0]), agreement, overall)


def _stats(candidates: Sequence[Candidate]) -> list[Stat]:
    """One of each kind that is asked for."""
    asked = [stat for c in candidates for stat in c.pass_.requires().stats]
    own = [Stat("moments", at="linear"), Stat("gram", at="linear")]
    return list({stat.name: stat for stat in (*asked, *own)}.values())


def _swept(
    view: View, batches: Batches, linears: Sequence[Linear], stats: Sequence[Stat]
) -> Iterator[Statistics]:
    """The statistics of each linear's input; those of linears with one input are the same."""
    spool = Spool()
    stored: WeakKeyDictionary[Statistic, PutAway] = WeakKeyDictionary()
    by_name: dict[str, list[PutAway]] = {}

    def put_away(name: str, statistics: Statistics) -> None:
        for item in statistics.values():
            if item not in stored:
                stored[item] = PutAway(item, spool)
        by_name[name] = [stored[item] for item in statistics.values()]

    requests = [
        Request(x.name, ((view.tensor(x.node),),), tuple(stats), partial(put_away, x.name))
        for x in linears
    ]
    calibrate(view, batches, requests)
    held = Statistics()
    for linear in linears:
        # What is held is not read again.
        held = Statistics([item.read() for item in by_name[linear.name]])
        yield held


def _tails(
    view: View, linear: Linear, candidates: Sequence[Candidate], sets: Sequence[Statistics]
) -> Tails:
    moments = sets[0][Moments]
    handle = view.weight(linear.weight)
    assert handle is not None
    weight = handle.read().float()
    costs = {c.text: _cost(c.by, linear, weight, sets) for c in candidates}
    return Tails(
        linear.name, moments.kurtosis, moments.peak, moments.outliers(), moments.top_share,
        moments.massive, costs,
    )  # fmt: skip


def _cost(by: Foreseen, linear: Linear, weight: Tensor, sets: Sequence[Statistics]) -> Cost:
    first = sets[0][Gram].matrix
    energy = _energy(weight, first)
    matrices = [by.stand_in(linear, weight, statistics) for statistics in sets]
    forecast = by.expected_loss(linear, weight, sets[0])
    measured = _energy(weight - matrices[0], first)
    spread = _spread(weight, matrices, sets) if len(sets) > 1 else None
    return Cost(math.sqrt(forecast / energy), math.sqrt(measured / energy), spread)


def _spread(weight: Tensor, matrices: Sequence[Tensor], sets: Sequence[Statistics]) -> float:
    grams = (statistics[Gram] for statistics in sets)
    whole = torch.stack([gram.matrix.double() / gram.count for gram in grams]).sum(0)
    errors = [math.sqrt(_energy(weight - matrix, whole)) for matrix in matrices]
    return (max(errors) - min(errors)) * len(errors) / max(sum(errors), 1e-300)


def _energy(matrix: Tensor, gram: Tensor) -> float:
    """``tr(D S D^T)``, above 0."""
    wide = matrix.to(gram.dtype)
    return max(float(((wide @ gram) * wide).sum(dtype=torch.float64)), 1e-300)


def _heads(
    view: View, structure: Structure, batches: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    nodes = {site.node: site.o or view.name(site.node) for site in structure.attentions}
    nodes = {n: name for n, name in nodes.items() if view.type(view.tensor(n)).rank == 4}
    if not nodes:
        return {}
    shares = first_token_shares(view, batches, nodes)
    return {nodes[node]: share for node, share in shares.items()}


def _agreement(sites: Sequence[Tails], passes: Sequence[str]) -> float:
    costs = [site.costs[text] for site in sites for text in passes if text in site.costs]
    return rank_correlation([c.forecast for c in costs], [c.measured for c in costs])


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; NaN where either holds one value alone."""
    from scipy.stats import spearmanr

    if min(len(set(a)), len(set(b))) < 2:
        return math.nan
    return float(spearmanr(a, b).statistic)
