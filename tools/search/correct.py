"""What measured recipes say of the forecasts: a factor for each kind of candidate."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from .problem import Choice

TRUST = 0.1
"""Of a kind's own factor against the common one: a measured recipe counts 1 where the factor
differs by all of itself."""
LEAST = 0.25
"""Of the common factor, for any kind: at 0 its candidates are free and taken everywhere. (Of
zoo:tiny-vit at 15 % of its bytes such a recipe was forecast .001 %, and measured 250 %.)"""


def by_kind(choice: Choice) -> dict[str, float]:
    """The uncorrected forecast loss of a choice, by kind of candidate."""
    sums: dict[str, float] = {}
    for option in choice.options:
        sums[option.kind] = sums.get(option.kind, 0.0) + option.uncorrected
    return sums


def corrections(
    measured: Sequence[tuple[Choice, float]], kinds: Collection[str]
) -> dict[str, float]:
    """Factors of the kinds' forecasts, by least squares of relative errors.

    First one for all, the geometric mean of what was measured over what was forecast; then one of
    each kind, drawn to that one as strongly as ``TRUST`` says, and never below ``LEAST`` of it.
    """
    from scipy.optimize import lsq_linear

    forecasts = [by_kind(choice) for choice, _ in measured]
    rows = [
        (row, loss) for row, (_, loss) in zip(forecasts, measured, strict=True)
        if sum(row.values()) > 0 and loss > 0
    ]  # fmt: skip
    if not rows:
        return {}
    common = math.exp(sum(math.log(loss / sum(row.values())) for row, loss in rows) / len(rows))
    columns = sorted({kind for row, _ in rows for kind, loss in row.items() if loss})
    table = np.array(
        [[row.get(kind, 0.0) * common / loss for kind in columns] for row, loss in rows]
    )
    pull = TRUST * np.eye(len(columns))
    sums = np.concatenate((np.ones(len(rows)), np.full(len(columns), TRUST)))
    factors = common * lsq_linear(np.vstack((table, pull)), sums, bounds=(LEAST, np.inf)).x
    own_factors: Mapping[str, float] = dict(zip(columns, map(float, factors), strict=True))
    return {kind: own_factors.get(kind, common) for kind in sorted(kinds)}
