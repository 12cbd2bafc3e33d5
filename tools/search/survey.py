"""One sweep over the calibration data: the output error of every candidate at every linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ir.core.view import View
from ...ir.ops.pack import dequantize
from ...ir.run.calibrate import Request, calibrate
from ...ir.run.statistics import Gram, Stat, Statistics, Tokens
from ...ir.structure.recognize import Linear
from ...ir.vocab.targets import Target
from ...passes.linear_pass import StoringPass, weight_of
from ...passes.weights.low_rank import Whitening
from .forms import Form, Path

Progress = Callable[[str, int, int], None]
SAMPLE = 512
"""Tokens that stand for all where Gram matrices would take too long."""
FACTOR_ERROR = {None: 0.0, 4: 0.012, 8: 1e-4}
"""Share of a path's energy that rounding its two factors to so many bits takes, in groups of 32:
twice the relative squared error of a Gaussian row."""


@dataclass(frozen=True)
class Errors:
    """What was found at one linear: mean squared errors of its outputs, by a token of the data."""

    by_form: Mapping[Form, float]
    nbytes: Mapping[Form, int]
    """What each takes as it is stored: scales that float16 does not hold are wider than others."""
    shares: Mapping[str, Tensor]
    """By method: the share of the error that is left behind a path of each rank, f64 ``[k + 1]``.
    It hardly depends on the bits: rounding errors are noise of one shape."""

    def listed(self) -> list[Any]:
        """As a checkpoint keeps it: ``of_list`` reads it."""
        return [[*self.by_form.values()], [*self.nbytes.values()], dict(self.shares)]

    @classmethod
    def of_list(
        cls, forms: Sequence[Form], errors: Sequence[float], nbytes: Sequence[int],
        shares: Mapping[str, Tensor],
    ) -> Errors:  # fmt: skip
        return cls(
            dict(zip(forms, errors, strict=True)), dict(zip(forms, nbytes, strict=True)), shares
        )

    def of(self, form: Form, path: Path) -> float:
        """The error of a form with a path beside it."""
        alone = self.by_form[form]
        shares = self.shares.get(form.method)
        if shares is None or not path.rank:
            return alone
        share = float(shares[min(path.rank, len(shares) - 1)])
        return alone * (share + (1 - share) * FACTOR_ERROR[path.bits])


def survey(
    view: View, batches: Sequence[Mapping[str, Tensor]], linears: Sequence[Linear],
    forms: Sequence[Form], target: Target, progress: Progress, *, ranks: bool, sampled: bool,
) -> dict[str, Errors]:  # fmt: skip
    """Fit every form at every linear, and take ``||D X||^2`` of what each takes from the weight;
    with ``ranks`` also what low-rank paths leave of it.

    ``X`` are all inputs, by their Gram matrix, or, ``sampled``, some of them: forms that learn
    from a Gram matrix, and ranks, then cannot be asked for. One sweep; in memory are the statistics
    of one input and one weight at a time.
    """
    errors: dict[str, Errors] = {}
    assert not (sampled and ranks)

    def done(linear: Linear, statistics: Statistics) -> None:
        progress(f"fitting {linear.name}", len(errors), len(linears))
        errors[linear.name] = _errors(view, linear, statistics, forms, target, ranks=ranks)

    sample = Stat("tokens", at="linear", options=(("most", SAMPLE),))
    stats = (sample if sampled else Stat("gram", at="linear"),)
    requests = [
        Request(x.name, ((view.tensor(x.node),),), stats, partial(done, x)) for x in linears
    ]
    calibrate(view, batches, requests)
    return errors


def _errors(
    view: View, linear: Linear, statistics: Statistics, forms: Sequence[Form], target: Target, *,
    ranks: bool,
) -> Errors:  # fmt: skip
    weight = weight_of(view, linear).read()
    mean_error, whitening = _measure(statistics)
    by_form: dict[Form, float] = {}
    nbytes: dict[Form, int] = {}
    shares: dict[str, Tensor] = {}
    for form in forms:
        rounded, nbytes[form] = stored(form, weight, statistics, linear, target)
        gap = weight.float() - rounded
        by_form[form] = mean_error(gap)
        if ranks and whitening is not None and form.method not in shares:
            shares[form.method] = left_by_rank(gap, whitening)
    return Errors(by_form, nbytes, shares)


def _measure(statistics: Statistics) -> tuple[Callable[[Tensor], float], Whitening | None]:
    """What gives the mean squared error of outputs for a gap ``[out, in]``, and the inputs'
    whitening where their Gram matrix is known."""
    known = next(iter(statistics.values()))
    if isinstance(known, Tokens):
        rows = known.rows.float()
        return lambda gap: float((rows @ gap.T).square().sum(dtype=torch.float64)) / len(rows), None
    gram = statistics[Gram]
    whitening = Whitening(gram.matrix)
    return lambda gap: max(0.0, whitening.energy(gap)) / gram.count, whitening


def stored(
    form: Form, weight: Tensor, statistics: Statistics, linear: Linear, target: Target
) -> tuple[Tensor, int]:
    """The matrix f32 ``[out, in]`` that a form holds in the place of ``weight``, and its bytes."""
    by = form.pass_((), target).at(linear)
    assert isinstance(by, StoringPass)
    quantized = by.fit(weight, statistics, linear.name)
    codes, scales, zeros = quantized.operands.values()
    assert codes is not None and scales is not None
    matrix = dequantize(
        codes, scales, zeros, bits=by.bits, group=by.group, in_features=weight.shape[1]
    )
    return matrix, quantized.nbytes


def left_by_rank(gap: Tensor, whitening: Whitening) -> Tensor:
    """``sum(sigma[r:]^2) / sum(sigma^2)`` for r from 0, of the singular values of ``D P``.

    They are the roots of the eigenvalues of ``D S D^T``, or of ``P^T D^T D P`` where that is
    smaller: no singular vectors are needed.
    """
    wide = gap.double()
    if len(gap) <= gap.shape[1]:
        product = whitening.correlate(wide) @ wide.T
    else:
        product = whitening.apply(gap)
        product = product.T @ product
    values = torch.linalg.eigvalsh(product).flip(0).clamp_min(0)
    gone = values.cumsum(0)
    total = gone[-1].clamp_min(1e-300)
    return torch.cat((torch.ones(1, dtype=torch.float64), 1 - gone / total)).clamp(0, 1)
