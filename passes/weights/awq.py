"""``awq``: active features in finer units, by factors folded into what makes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...ir.moves import Inlet
from ...ir.run.statistics import AbsMean, Gram, Stat, Statistics, Tokens
from ...ir.structure.recognize import Linear
from ..base import Context, Needs, PassResult
from ..foreseen import Foreseen
from ..linear_pass import weight_of
from ..stored import Shelved, Stored, relative_error
from .expected import energies, least_of, rounding_loss
from .inlets import allowed, fold, inlets_of
from .quantizers import rounded, rtn
from .table_pass import TablePass

TOKENS = 512
"""Tokens of the data on which factors and ranges are judged, as in the authors' code. Of all tokens
together (a sketch of the Gram matrix) the few with massive activations decide: KL to the source
0.0918 instead of 0.0884 on tiny-llama at 3 bits."""
EXPONENTS = [i / 20 for i in range(20)]
SHRINKAGES = [1 - i / 20 for i in range(10)]
DISTINCT_RANGES = 3
"""Of those, as many as round a group independently: near ones round alike (for forecasts)."""
_UNCLIPPED = frozenset({"q", "k", "qkv"})


@dataclass(frozen=True, kw_only=True)
class AWQ(TablePass, Foreseen):
    """Scale the inputs of linears by how active they are, clip ranges, then round to nearest.

    AWQ (Lin et al. 2023, arXiv 2306.00978): ``s = (mean |x|)^a``, over the root of its greatest
    times its least value, ``a`` the one of 0, 1/20, ... 19/20 with which ``Q(W diag(s)) (x / s)``
    comes nearest to ``W x`` on 512 tokens, summed over all linears that read x (the paper takes
    the output of the whole attention, or of the feed-forward part). ``x / s`` is folded into what
    makes x, as ``smooth`` does; with ``a = 0`` nothing is scaled. Where x cannot be scaled, the
    linears that read it are rounded in the units that they have, and their sites say why. Then
    ``clip`` shrinks the range of each group to the fraction 1, 0.95, ... 0.55 with the least error
    of the group's share of the output, but for q and k. ``symmetric`` as in ``quantize``.

    It takes its data from the graph as it is. Needs calibration data. Weights that are not finite
    are refused. Low-rank paths behind it compensate what rounding did, in the scaled units.
    """

    name: ClassVar[str] = "awq"
    rebases: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(
        stats=(Stat("absmean", at="linear"), Stat("tokens", at="linear",
                                                  options=(("most", TOKENS),)))
    )  # fmt: skip
    symmetric: bool = False
    """Fix the zero point at the middle; else one a group."""
    scale: bool = True
    """Search scales of features."""
    clip: bool = True
    """Search the range of each group."""

    def run_linears(self, context: Context) -> PassResult:
        result = PassResult()
        chosen = self.choose(context, result)
        inlets, reasons = inlets_of(context, chosen) if self.scale else ([], {})
        inlet_of = {name: inlet for inlet in inlets for name in inlet.names}
        factors: dict[tuple[str, ...], Tensor] = {}

        def fit(linear: Linear, statistics: Statistics) -> Tensor:
            """How far each group's range is shrunk [N, groups]; the input's factors before it."""
            inlet = inlet_of.get(linear.name)
            if inlet is not None and inlet.names not in factors:
                factors[inlet.names] = context.once(
                    f"factors {inlet.names[0]}",
                    lambda: self._factors(context, inlet, statistics),
                )
            scale = torch.ones(1) if inlet is None else factors[inlet.names].float()

            def fractions() -> Tensor:
                weight = self._read(context, linear).float() * scale
                x = statistics[Tokens].rows.float()
                return self._clipped(weight, x / scale, linear)

            return context.once(f"site {linear.name}", fractions)

        fits = self.fit_all(context, chosen, fit)
        by_name = {linear.name: linear for linear in chosen}
        groups = self.groups(context.view, chosen)
        fold(context, factors)
        forms: dict[str, Shelved] = {}
        for first, *others in groups:
            note = f"not scaled: {reasons[first]}" if first in reasons else ""
            stored = self._stored(self._read(context, by_name[first]), fits[first], first, note)
            forms.update(dict.fromkeys((first, *others), Shelved.of(stored, context.spool)))
        self.put_all(context, chosen, forms, result)
        return result

    def _read(self, context: Context, linear: Linear) -> Tensor:
        return weight_of(context.view, linear).read()

    # --- factors -----------------------------------------------------------------------------

    def _factors(self, context: Context, inlet: Inlet, statistics: Statistics) -> Tensor:
        """The best of the factors that the exponents give ``[K]`` f64."""
        weights = [self._read(context, linear).float() for linear in inlet.linears]
        grid = (allowed(context.view, inlet, scale) for scale in _grid(statistics[AbsMean].mean))
        return self._best(grid, weights, statistics[Tokens].rows.float(), inlet.names[0])

    def _best(
        self, grid: Iterable[Tensor], weights: Sequence[Tensor], x: Tensor, name: str
    ) -> Tensor:
        best: tuple[float, Tensor] | None = None
        for scale in grid:
            narrow = scale.float()
            loss = 0.0
            for weight in weights:
                gap = self._rounded(weight * narrow, name) / narrow - weight
                loss += float((x @ gap.T).square().sum())
            if best is None or loss < best[0]:
                best = loss, scale
        assert best is not None
        return best[1]

    def _rounded(self, weight: Tensor, name: str) -> Tensor:
        return rounded(
            weight, self.bits, self.group, self.symmetric, scale_dtype=self.scale_dtype, name=name
        )

    # --- ranges ------------------------------------------------------------------------------

    def _clipped(self, weight: Tensor, x: Tensor, linear: Linear) -> Tensor:
        """The fraction of each group's range ``[N, groups]`` that errs least on its inputs."""
        groups = self._grouped(weight)
        fractions = torch.ones(groups.shape[:2])
        if not self.clip or linear.role in _UNCLIPPED:
            return fractions
        inputs = self._grouped(x).transpose(0, 1)
        least = torch.full(groups.shape[:2], torch.inf)
        for fraction in SHRINKAGES:
            clipped = self._clamped(weight, fractions.new_full((1, 1), fraction))
            gap = self._grouped(self._rounded(clipped, linear.name) - weight)
            loss = _energy(gap.transpose(0, 1), inputs).T
            fractions = torch.where(loss < least, fraction, fractions)
            least = torch.minimum(loss, least)
        return fractions

    def _clamped(self, weight: Tensor, fractions: Tensor) -> Tensor:
        """``weight`` with each group's magnitudes cut to a share of the greatest."""
        groups = self._grouped(weight)
        most = groups.abs().amax(-1, keepdim=True) * fractions.unsqueeze(-1)
        return groups.clamp(-most, most).flatten(1)[:, : weight.shape[1]]

    def _grouped(self, matrix: Tensor) -> Tensor:
        """[N, K] as [N, groups, B], the last group filled with zeros."""
        size = self.group or matrix.shape[1]
        missing = -matrix.shape[1] % size
        return torch.nn.functional.pad(matrix, (0, missing)).reshape(len(matrix), -1, size)

    def _stored(self, weight: Tensor, fractions: Tensor, name: str, note: str) -> Stored:
        quantized = rtn(
            self._clamped(weight.float(), fractions), self.bits, self.group, self.symmetric,
            scale_dtype=self.scale_dtype, name=name,
        )  # fmt: skip
        error = relative_error(weight, quantized.dequantized())
        return self.stored(replace(quantized, rel_l2=error), note)

    # --- one linear by itself ----------------------------------------------------------------

    def expected_loss(self, linear: Linear, weight: Tensor, statistics: Statistics) -> float:
        """With the best factors of the grid, as if the linear alone read its input; of the ranges
        that are tried, each group then takes the one whose errors happen to cancel best."""
        gram, x = statistics[Gram], statistics[Tokens].rows.float()
        costs = energies(gram)
        if self.clip and linear.role not in _UNCLIPPED:
            # It cancels on the tokens that are looked at, and nowhere else.
            looked_at = x.double().square().sum(0) * (gram.count / len(x))
            alike = looked_at * least_of(DISTINCT_RANGES, x, self.group)
            costs = alike + (costs - looked_at).clamp_min(0)
        grid = _grid(statistics[AbsMean].mean) if self.scale else [torch.ones(1)]
        return min(
            rounding_loss(
                weight * scale.float(), costs / scale.square(), self.bits, self.group,
                middle=self.symmetric,
            )
            for scale in grid
        )  # fmt: skip

    def stand_in(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Tensor:
        scale, x = torch.ones(1), statistics[Tokens].rows.float()
        if self.scale:
            grid = _grid(statistics[AbsMean].mean)
            scale = self._best(grid, [weight], x, linear.name).float()
        fractions = self._clipped(weight * scale, x / scale, linear)
        return self._rounded(self._clamped(weight * scale, fractions), linear.name) / scale

    def zero_points(self) -> Literal["none", "integer", "real"]:
        return "none" if self.symmetric else "integer"


def _grid(mean: Tensor) -> Iterator[Tensor]:
    """The factors f64 ``[K]`` that are tried, by the inputs' mean magnitudes."""
    alive = mean[mean > 0]
    least = float(alive.min()) if len(alive) else 1.0
    for exponent in EXPONENTS:
        scale = mean.clamp_min(least).pow(exponent).clamp_min(1e-4)
        yield scale / (scale.max() * scale.min()).sqrt()


def _energy(gaps: Tensor, inputs: Tensor) -> Tensor:
    """``sum over tokens of (gap . x)^2``: gaps [G, N, B], inputs [G, T, B] to [G, N]."""
    if inputs.shape[1] < inputs.shape[2]:
        return torch.bmm(gaps, inputs.transpose(1, 2)).square().sum(-1)
    gram = torch.bmm(inputs.transpose(1, 2), inputs)
    return (torch.bmm(gaps, gram) * gaps).sum(-1)
