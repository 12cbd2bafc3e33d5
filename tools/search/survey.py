"""One sweep over the calibration data: the output error of every candidate at every linear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ...ir.core.view import View
from ...ir.run.calibrate import Request, calibrate
from ...ir.run.statistics import Gram, Stat, Statistics, Tokens
from ...ir.structure.recognize import Linear
from ...ir.vocab import spec
from ...ir.vocab.targets import Target
from ...passes.linear_pass import StoringPass, weight_of
from ...passes.stored import Stored
from ...passes.weights.low_rank import Whitening
from .forms import FAST, PATHS, Form, Path
from .probe import Gap

Progress = Callable[[str, int, int], None]
ROUNDING = "quantize"
"""The method whose errors differ from rows to rows by nothing but the rows."""
RANKS = sorted({path.rank for path in PATHS})
LEAST_LEFT = 1e-6
"""Of a share that others are divided by."""
SAMPLE, ROUNDED_INPUTS = 512, 128
"""Tokens that stand for all where Gram matrices would take too long, and of these so many where
inputs are rounded."""
PROBED = (Form("quantize", 3, 32), Form("gptq", 3, 32))
"""By method, the form whose error the loss is asked about. Errors of one size do not hurt alike:
feedback moves them to where the mean over tokens does not see them. On zoo:tiny-vit, whose answer
hangs on one token of 65, the loss minds those of ``gptq`` .4 to 8.6 times as much as those of
rounding, by linear."""
FACTOR_ERROR = {None: 0.0, 4: 0.012, 8: 1e-4}
"""Share of a path's energy that rounding its two factors to so many bits takes, in groups of 32:
twice the relative squared error of a Gaussian row."""


@dataclass(frozen=True)
class Errors:
    """What was found at one linear: mean squared errors of its outputs, by a token of the data."""

    by_form: Mapping[Form, float]
    """Of the weights alone; of samples, all of it."""
    by_inputs: Mapping[Form, float]
    """Of rounding the inputs to 8 bits, where the form does: no path undoes it. Of samples 0."""
    nbytes: Mapping[Form, int]
    """What each takes as it is stored: scales that float16 does not hold are wider than others."""
    shares: Mapping[str, Tensor]
    """By method: the share of the error that is left behind a path of each rank, f64 ``[k + 1]``.
    It hardly depends on the bits: rounding errors are noise of one shape."""
    gaps: Mapping[str, Gap]
    """By method: what the form that is asked about takes from the weight, in f16."""
    drift: Mapping[str, float] = field(default_factory=dict)
    """How many times as large errors are on other rows: by method, and of what a path of some rank
    leaves of them, under ``gptq 32``. None, where that is not known."""

    def listed(self) -> list[Any]:
        """As a checkpoint keeps it: ``of_list`` reads it."""
        by_form = (self.by_form, self.by_inputs, self.nbytes)
        gaps = {method: [gap.whole, gap.directions] for method, gap in self.gaps.items()}
        return [*([*numbers.values()] for numbers in by_form), dict(self.shares), gaps]

    @classmethod
    def of_list(
        cls, forms: Sequence[Form], errors: Sequence[float], by_inputs: Sequence[float],
        nbytes: Sequence[int], shares: Mapping[str, Tensor],
        gaps: Mapping[str, tuple[Tensor, Tensor]],
    ) -> Errors:  # fmt: skip
        return cls(
            dict(zip(forms, errors, strict=True)), dict(zip(forms, by_inputs, strict=True)),
            dict(zip(forms, nbytes, strict=True)), shares,
            {method: Gap(*gap) for method, gap in gaps.items()},
        )  # fmt: skip

    def drifts(self, met: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """``drift``, by the errors that the forms which were asked about make on other rows, by
        method, and what each of their directions takes back there.

        Feedback hides errors in directions that its own rows do not take: by 8 texts of 512 tokens
        those of ``gptq`` on others are 1.4 to 3.6 times as large as on these, by linear, whatever
        the bits (zoo:minilm), and those of rounding .8 to 1.1 times. Paths fit their rows too: what
        one of rank 32 leaves of rounding is 1.1 to 2.6 times as much there.
        """
        drift: dict[str, float] = {}
        for form in asked(self.by_form):
            error, *taken = met.get(form.method, [0.0])
            own = self.by_form[form]
            if not own or not error:
                continue
            drift[form.method] = error / own
            shares = self.shares.get(form.method)
            if shares is None or not taken:
                continue
            for rank in RANKS:
                left = max(LEAST_LEFT, 1 - sum(taken[:rank]) / error)
                drift[f"{form.method} {rank}"] = left / max(LEAST_LEFT, _left(shares, rank))
        return drift

    def of(self, form: Form, path: Path) -> float:
        """The error of a form with a path beside it."""
        rows = self.drift.get(ROUNDING, 1.0)
        alone = self.by_form[form] * self.drift.get(form.method, rows)
        inputs = self.by_inputs[form] * rows
        shares = self.shares.get(form.method)
        if shares is None or not path.rank:
            return alone + inputs
        drift = self.drift.get(f"{form.method} {path.rank}", 1.0)
        share = min(1.0, _left(shares, path.rank) * drift)
        return alone * (share + (1 - share) * FACTOR_ERROR[path.bits]) + inputs


def _left(shares: Tensor, rank: int) -> float:
    return float(shares[min(rank, len(shares) - 1)])


def survey(
    view: View, batches: Sequence[Mapping[str, Tensor]], groups: Sequence[Sequence[Linear]],
    forms: Sequence[Form], target: Target, progress: Progress, *, ranks: bool, sampled: bool,
) -> dict[str, Errors]:  # fmt: skip
    """Fit every form at every linear, those that share a weight together, and take ``||D X||^2`` of
    what each takes from the weight; with ``ranks`` also what low-rank paths leave of it: by the
    name of the first one of each group.

    ``X`` are all inputs, by their Gram matrix, or, ``sampled``, some of them: forms that learn
    from a Gram matrix, and ranks, then cannot be asked for. One sweep; in memory are the statistics
    of one input and one weight at a time.
    """
    errors: dict[str, Errors] = {}
    assert not (sampled and ranks)

    def done(linear: Linear, statistics: Statistics) -> None:
        progress(f"fitting {linear.name}", len(errors), len(groups))
        known = _Known(weight_of(view, linear).read(), statistics, sampled)
        errors[linear.name] = _errors(linear, known, forms, target, ranks=ranks)

    sample = Stat("tokens", at="linear", options=(("most", SAMPLE),))
    stats = (sample, *(() if sampled else (Stat("gram", at="linear"),)))
    requests = [
        Request(
            group[0].name, tuple((view.tensor(x.node),) for x in group), stats,
            partial(done, group[0]),
        )
        for group in groups
    ]  # fmt: skip
    calibrate(view, batches, requests)
    return errors


def _errors(
    linear: Linear, known: _Known, forms: Sequence[Form], target: Target, *, ranks: bool
) -> Errors:
    whitening, statistics = known.whitening, known.statistics
    by_form: dict[Form, float] = {}
    by_inputs: dict[Form, float] = {}
    nbytes: dict[Form, int] = {}
    shares: dict[str, Tensor] = {}
    gaps: dict[str, Gap] = {}
    about = asked(forms)
    for form in forms:
        held = stored(form, known.weight, known.statistics, linear, target)
        nbytes[form] = held.nbytes
        if whitening is None:
            by_form[form], by_inputs[form] = known.sampled_error(held), 0.0
            continue
        matrix = dense(held)
        gap = known.weight.float() - matrix
        by_form[form] = max(0.0, whitening.energy(gap)) / statistics[Gram].count
        by_inputs[form] = known.input_error(held, matrix)
        directions = gap[:0]
        if form not in about:
            continue
        if ranks:
            shares[form.method], directions = left_by_rank(gap, whitening)
        gaps[form.method] = Gap(gap.half(), directions.half())
    return Errors(by_form, by_inputs, nbytes, shares, gaps)


def asked(forms: Iterable[Form]) -> list[Form]:
    """Of each method the form that the loss is asked about: of ``PROBED``, or else the first."""
    by_method: dict[str, Form] = {}
    for form in forms:
        if form != FAST and (form in PROBED or form.method not in by_method):
            by_method[form.method] = form
    return [*by_method.values()]


class _Known:
    """A linear's weight and the statistics of its inputs, by which errors of outputs are taken."""

    def __init__(self, weight: Tensor, statistics: Statistics, sampled: bool) -> None:
        self.weight, self.statistics = weight, statistics
        self.whitening = None if sampled else Whitening(statistics[Gram].matrix)
        """Of the inputs, where their Gram matrix is known."""

    @cached_property
    def _outputs(self) -> Tensor:
        return self.statistics[Tokens].rows.float() @ self.weight.float().T

    def sampled_error(self, held: Stored) -> float:
        """The mean squared error of outputs for a form, rounded inputs included."""
        rows = self.statistics[Tokens].rows.float()
        return _mean_energy(held.outputs(rows, None) - self._outputs)

    def input_error(self, held: Stored, matrix: Tensor) -> float:
        """The mean squared error of outputs where a form rounds its inputs; 0 where it does not."""
        if not (spec(held.op).rounds or held.attrs.get("accuracy_level") == 4):
            return 0.0
        rows = self.statistics[Tokens].rows  # in the order of the data
        rows = rows[:: max(1, len(rows) // ROUNDED_INPUTS)].float()
        return _mean_energy(held.outputs(rows, None) - rows @ matrix.T)


def _mean_energy(rows: Tensor) -> float:
    """``|x|^2`` of a row, on the average."""
    return float(rows.square().sum(dtype=torch.float64)) / len(rows)


def stored(
    form: Form, weight: Tensor, statistics: Statistics, linear: Linear, target: Target
) -> Stored:
    """What a form holds in the place of ``weight``, fitted to the statistics of a linear."""
    by = form.pass_((), target).at(linear)
    assert isinstance(by, StoringPass)
    return by.fit(weight, statistics, linear.name)


def dense(held: Stored) -> Tensor:
    """The matrix f32 ``[out, in]`` that a form multiplies by."""
    matrix = spec(held.op).dense
    assert matrix is not None
    return matrix(held.attrs["in_features"], [*held.operands.values()], held.attrs)


def left_by_rank(gap: Tensor, whitening: Whitening) -> tuple[Tensor, Tensor]:
    """``sum(sigma[r:]^2) / sum(sigma^2)`` for r from 0 to the last of ``RANKS``, of the singular
    values of ``D P``, f64; and ``U^T D`` f64 ``[r, in]`` of the first left singular vectors, which
    is what paths take back.

    They are the eigenvectors of ``D S D^T``, or follow from those of ``P^T D^T D P`` where that is
    smaller.
    """
    wide = gap.double()
    if len(gap) <= gap.shape[1]:
        values, vectors = _leading(whitening.correlate(wide) @ wide.T)
        directions = vectors.T @ wide
    else:
        moved = whitening.apply(gap)
        values, vectors = _leading(moved.T @ moved)
        there = values > 1e-20 * values[0]  # of the others no direction of the output is known
        left = moved @ vectors[:, there] / values[there].sqrt()
        directions = left.T @ wide
    total = max(whitening.energy(wide), 1e-300)
    gone = torch.cat((torch.zeros(1, dtype=torch.float64), values.cumsum(0)))
    return (1 - gone / total).clamp(0, 1), directions


def _leading(product: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix, and their vectors as columns."""
    values, vectors = torch.linalg.eigh(product)
    return values.flip(0)[: RANKS[-1]].clamp_min(0), vectors.flip(1)[:, : RANKS[-1]]
