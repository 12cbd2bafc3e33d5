"""``flap``: heads and units whose inputs hardly vary go; their mean stays as a bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.run.statistics import Gram, Mean, Square, Stat, Statistics
from ..base import REDEFINED, STORED, Context, Needs, Pass, PassResult
from ..linear_pass import weight_of
from .structured import (
    Place,
    Repair,
    find_places,
    learned,
    shrunk_sites,
    staying,
    take_away,
)

SHRUNK = "fewer channels"
DAMPING = 1e-2
"""Share of the mean variance that is added to each before covariances are inverted."""


@dataclass(frozen=True, kw_only=True)
class FLAP(Pass):
    """Remove whole heads and feed-forward units whose contribution fluctuates least.

    FLAP (An et al. 2023, arXiv 2312.11983): of input j of the linear that takes them up (``o``,
    ``down``), ``score_j = Var(x_j) ||W_:,j||^2``, a head's the mean of its inputs'; scores are
    standardised in each linear and compared over the whole model, and the lowest go until a share
    ``ratio`` of the weights of all these places is gone; with ``across=place`` each place loses
    that share. The paper's other scores are ``ifv``, ``Var(x_j)`` alone, and ``wifn``, ``rms(x_j)``
    times the mean ``|W_ij|``. Compared over the model a few places may lose nearly all: on the
    zoo's tiny-llama at a tenth perplexity is 41.9, and 35.4 with ``across=place``, 35.9 with
    ``wifn`` (source 35.1; one block less 39.5). What goes leaves its mean behind: ``b += sum_j
    W_:,j mu_j``. With ``repair=regression`` (not the paper's) the inputs that stay predict what
    goes: ``W_K += W_R C_RK (C_KK + damping)^-1`` of their covariance, and the bias is of what is
    left. ``repair=none`` leaves the bias as it is. Heads that share keys go together; at least one
    head and one unit stay in each place. ``parts`` are ``heads``, ``units`` or both, ``include``
    globs of the linears that take them up. (The published code squares the scores of ``o``; the
    paper and this do not.)

    A graph with a key-value cache keeps its heads: the cache would change its shape; ``--no-cache``
    makes one without. What the passes behind compensate is the gap to the smaller model. Needs
    calibration data.
    """

    name: ClassVar[str] = "flap"
    exact: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = (SHRUNK, REDEFINED)
    excludes: ClassVar[tuple[str, ...]] = (STORED,)
    ratio: float = 0.2
    """Share of all heads and units that goes."""
    score: Literal["wifv", "ifv", "wifn"] = "wifv"
    """By what heads and units are chosen."""
    across: Literal["model", "place"] = "model"
    """Where the share is counted."""
    parts: tuple[str, ...] = ("heads", "units")
    """What may go."""
    include: tuple[str, ...] = ()
    """Globs of o, down and fc2 to work on; or all."""
    repair: Literal["bias", "regression", "none"] = "bias"
    """What stands in for what goes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1:
            raise BadInput(f"flap: ratio={self.ratio} must be above 0 and below 1")
        unknown = [part for part in self.parts if part not in ("heads", "units")]
        if unknown or not self.parts:
            raise BadInput(f"flap: parts={' '.join(self.parts)} are heads, units or both")

    def requires(self) -> Needs:
        second = "gram" if self.repair == "regression" else "square"
        stats = (Stat("mean", at="linear"), Stat(second, at="linear"))
        return replace(self.needs, stats=stats)

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        places = find_places(context, result, self.parts, self.include)
        if not places:
            return result
        kept, repairs = (
            self._over_model(context, places) if self.across == "model"
            else self._in_places(context, places)
        )  # fmt: skip
        take_away(context, kept, places, repairs, result, self.name)
        result.notes.append(_note(places, kept))
        return result

    def _over_model(
        self, context: Context, places: Sequence[Place]
    ) -> tuple[dict[str, list[int]], dict[str, Repair]]:
        """What stays of each place, and what stands in for the rest: by a sweep for the scores and,
        where these are known of all places, one for the repairs."""

        def scored(context: Context, place: Place, statistics: Statistics) -> dict[str, Any]:
            return {"scores": self._scores(context.view, place, statistics)}

        def repaired(context: Context, place: Place, statistics: Statistics) -> dict[str, Any]:
            sink, bias = self._repaired(context.view, place, statistics, kept[place.name])
            return {"sink": sink, "bias": bias}

        scores = learned(context, self, places, scored, "scores")
        own = {name: fields["scores"] for name, fields in scores.items()}
        kept = chosen(places, own, self.ratio)
        if self.repair == "none":
            return kept, {}
        shrinking = [p for p in places if len(kept[p.name]) < p.count]
        by_place = learned(context, self, shrinking, repaired, "repair")
        return kept, {name: (f["sink"], f["bias"]) for name, f in by_place.items()}

    def _in_places(
        self, context: Context, places: Sequence[Place]
    ) -> tuple[dict[str, list[int]], dict[str, Repair]]:
        """The same in one sweep: each place loses its own share."""

        def fit(context: Context, place: Place, statistics: Statistics) -> dict[str, Any]:
            kept, (sink, bias) = self.at_place(context.view, place, statistics)
            return {"kept": kept, "sink": sink, "bias": bias}

        fits = learned(context, self, places, fit, "places")
        kept = {name: f["kept"] for name, f in fits.items()}
        return kept, {name: (f["sink"], f["bias"]) for name, f in fits.items()}

    def plan(self, context: Context) -> PassResult:
        """What goes is decided by data: the forecast takes the same share of each place."""
        result = PassResult()
        for place in find_places(context, result, self.parts, self.include):
            remaining = staying(place.count, self.ratio)
            if remaining < place.count:
                result.sites += shrunk_sites(context, place, remaining)
        result.notes.append("which heads and units go is decided by the calibration data")
        return result

    def at_place(
        self, view: View, place: Place, statistics: Statistics
    ) -> tuple[list[int], Repair]:
        """Which heads or units of a place stay, where it loses the share itself, and what stands in
        for the rest; by the statistics of its sink."""
        scores = {place.name: self._scores(view, place, statistics)}
        kept = chosen([place], scores, self.ratio)[place.name]
        if self.repair == "none" or len(kept) == place.count:
            return kept, (None, None)
        return kept, self._repaired(view, place, statistics, kept)

    def _scores(self, view: View, place: Place, statistics: Statistics) -> Tensor:
        weight = weight_of(view, place.sink).read().double()
        second = (
            statistics[Gram].matrix.diagonal().double() if self.repair == "regression"
            else statistics[Square].total
        )  # fmt: skip
        mean = statistics[Mean]
        by_column = score_of(self.score, weight, mean.mean, second / mean.count)
        by_place: Tensor = by_column.reshape(place.count, place.each).mean(1)
        return by_place

    def _repaired(
        self, view: View, place: Place, statistics: Statistics, kept: Sequence[int]
    ) -> Repair:
        weight, mean = weight_of(view, place.sink).read(), statistics[Mean].mean
        stays = place.columns(kept)
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[stays] = False
        wide = weight.double()
        if self.repair == "bias":
            return None, wide[:, gone] @ mean[gone]
        gram = statistics[Gram]
        columns = regressed(wide, gram.matrix.double() / gram.count, mean, stays, gone)
        bias = wide @ mean - columns @ mean[stays]
        return columns.to(weight.dtype), bias


def score_of(score: str, weight: Tensor, mean: Tensor, second: Tensor) -> Tensor:
    """What each input of a weight ``[out, in]`` counts, by its mean and second moment ``[in]``."""
    if score == "wifn":
        return second.sqrt() * weight.abs().mean(0)
    variance = (second - mean.square()).clamp_min(0)
    return variance if score == "ifv" else variance * weight.square().sum(0)


def regressed(
    weight: Tensor, second: Tensor, mean: Tensor, stays: Tensor, gone: Tensor
) -> Tensor:
    """``W_K + W_R C_RK C_KK^-1`` f64, with C of the second moments and the mean."""
    covariance = second - mean[:, None] * mean
    inner = covariance[stays][:, stays]
    inner = inner + DAMPING * inner.diagonal().mean().clamp_min(1e-30) * torch.eye(len(stays))
    pull = torch.linalg.solve(inner, covariance[stays][:, gone] @ weight[:, gone].T)
    columns: Tensor = weight[:, stays] + pull.T
    return columns


def chosen(
    places: Sequence[Place], scores: Mapping[str, Tensor], ratio: float
) -> dict[str, list[int]]:
    """Which heads and units stay, ascending, by place: the highest standardised scores, until the
    rest has a share ``ratio`` of the weights of all places; the highest of each place stays."""
    total = sum(place.cost * place.count for place in places)
    entries = []
    for place in places:
        own = scores[place.name]
        spread = float(own.std()) if len(own) > 1 else 0.0
        level = (own - own.mean()) / spread if spread > 0 else torch.zeros_like(own)
        best = int(level.argmax())
        entries += [
            (float(level[i]), place.name, i, place.cost) for i in range(place.count) if i != best
        ]
    gone: dict[str, set[int]] = {place.name: set() for place in places}
    budget = ratio * total
    for _, name, i, cost in sorted(entries):
        if cost / 2 > budget:  # closest to what is asked
            continue
        gone[name].add(i)
        budget -= cost
    return {p.name: [i for i in range(p.count) if i not in gone[p.name]] for p in places}


def _note(places: Sequence[Place], kept: Mapping[str, Sequence[int]]) -> str:
    total = sum(place.cost * place.count for place in places)
    remaining = sum(place.cost * len(kept[place.name]) for place in places)
    where = "1 place" if len(places) == 1 else f"{len(places)} places"
    return f"{1 - remaining / total:.1%} of the weights of {where} are gone"
