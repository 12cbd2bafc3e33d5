"""Looking before changing: tails of activations, dormant heads, and what few bits would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.run.calibrate import Request, calibrate
from ...ir.run.statistics import Gram, Moments, Stat, Statistics
from ...ir.structure.recognize import Linear, Structure, recognize
from ...passes.weights.dormant_heads import first_token_shares
from ...passes.weights.quantizers import rtn

GROUP, DORMANT = 32, 0.95


@dataclass(frozen=True)
class Tails:
    """What is seen at one linear."""

    name: str
    kurtosis: float
    peak: float
    """Largest magnitude over root mean square."""
    outliers: int
    """Features six times as large as the median one."""
    top_share: float
    massive: int
    forecast: float
    """Relative error of its outputs in few bits, by ranges of weights and sizes of inputs."""
    measured: float
    """The same, of its rounded weights on all the data."""


@dataclass(frozen=True)
class Outlook:
    sites: Sequence[Tails]
    dormant: Mapping[str, Tensor]
    """The mean attention to the first token of each head, by the linear that takes the heads."""
    bits: int
    agreement: float
    """Spearman's rank correlation of forecasts and measured errors over the sites."""


def outlook(view: View, batches: Sequence[Mapping[str, Tensor]], bits: int) -> Outlook:
    """Sweep the data through a canonical graph once for the sites, once for the heads.

    Raises ``BadInput`` where there is no linear with a dense weight.
    """
    structure = recognize(view)
    tails: dict[str, Tails] = {}
    requests = [
        Request(
            linear.name, ((view.tensor(linear.node),),), _STATS,
            partial(_see, view, linear, bits, tails),
        )
        for linear in structure.linears
        if view.op(linear.node) == "linear"
    ]  # fmt: skip
    if not requests:
        raise BadInput("no linear of this model has a dense weight: there is nothing to look at")
    calibrate(view, batches, requests)
    sites = [tails[linear.name] for linear in structure.linears if linear.name in tails]
    agreement = rank_correlation([s.forecast for s in sites], [s.measured for s in sites])
    return Outlook(sites, _heads(view, structure, batches), bits, agreement)


def spreads(outlooks: Sequence[Outlook]) -> dict[str, float]:
    """How much it matters on which data one looks, site by site: the largest less the least of the
    measured errors on several sets, by their mean (the question of arXiv 2405.20835)."""
    errors: dict[str, list[float]] = {}
    for one in outlooks:
        for site in one.sites:
            errors.setdefault(site.name, []).append(site.measured)
    return {n: (max(e) - min(e)) / max(sum(e) / len(e), 1e-300) for n, e in errors.items()}


_STATS = (Stat("moments", at="linear"), Stat("gram", at="linear"))


def _see(
    view: View, linear: Linear, bits: int, tails: dict[str, Tails], statistics: Statistics
) -> None:
    moments, gram = statistics[Moments], statistics[Gram].matrix
    handle = view.weight(linear.weight)
    assert handle is not None
    weight = handle.read().float()
    tails[linear.name] = Tails(
        linear.name, moments.kurtosis, moments.peak, moments.outliers(), moments.top_share,
        moments.massive, forecast(weight, gram, bits), measured(weight, gram, bits),
    )  # fmt: skip


def forecast(weight: Tensor, gram: Tensor, bits: int) -> float:
    """Relative error of a linear's outputs, as if rounding were uniform noise.

    A group of ``GROUP`` inputs of row i that is rounded in steps ``s = 2 max|w| / 2^bits`` gets
    variance ``s^2 / 12`` in each weight, and the output ``sum s^2 / 12 * S_jj``. No weight is
    rounded: a few operations a weight.
    """
    wide = torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP))
    energy = torch.nn.functional.pad(gram.diagonal(), (0, -weight.shape[1] % GROUP))
    groups = wide.reshape(len(weight), -1, GROUP)
    steps = 2 * groups.abs().amax(2).double() / 2**bits
    noise = (steps.square() / 12 * energy.reshape(-1, GROUP).sum(1)).sum()
    return float((noise / _energy(weight, gram)).sqrt())


def measured(weight: Tensor, gram: Tensor, bits: int) -> float:
    """``||D X|| / ||W X||`` of ``D``, what rounding to nearest takes from the weights."""
    gap = weight - rtn(weight, bits, GROUP).dequantized()
    return float((_energy(gap, gram) / _energy(weight, gram)).sqrt())


def _energy(weight: Tensor, gram: Tensor) -> Tensor:
    wide = weight.to(gram.dtype)
    return ((wide @ gram) * wide).sum(dtype=torch.float64).clamp_min(1e-300)


def _heads(
    view: View, structure: Structure, batches: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    nodes = {site.node: site.o or view.name(site.node) for site in structure.attentions}
    nodes = {n: name for n, name in nodes.items() if view.type(view.tensor(n)).rank == 4}
    if not nodes:
        return {}
    shares = first_token_shares(view, batches, nodes)
    return {nodes[node]: share for node, share in shares.items()}


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing the mean of theirs."""
    x, y = (_ranks(torch.tensor(values, dtype=torch.float64)) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else float("nan")


def _ranks(values: Tensor) -> Tensor:
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    ranks: Tensor = below + (equal - 1) / 2
    return ranks
