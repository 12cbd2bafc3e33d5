"""A guess at what was not measured: a Gaussian process, by SciPy's linear algebra.

scikit-learn has one, and is no dependency; what is needed here is a page.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist
from scipy.stats import norm

NOISE = 1e-2
"""Variance of what is measured, by that of what is guessed at: Draft & Verify's (arXiv
2309.08168)."""
Array = NDArray[np.float64]


def expected_improvement(points: Array, values: Array, candidates: Array) -> Array:
    """How much lower than the lowest of ``values`` ``[n]``, measured at ``points`` ``[n, d]``, each
    of ``candidates`` ``[m, d]`` is expected to be: ``[m]``.

    The kernel is ``exp(-d^2 / 2 l^2)``, ``l`` the median distance of the points; values are taken
    as standard scores (Jones et al. 1998, Journal of Global Optimization 13).
    """
    spread = float(values.std()) or 1.0
    scaled = (values - values.mean()) / spread
    apart = cdist(points, points)
    reach = float(np.median(apart[apart > 0])) if (apart > 0).any() else 1.0

    def kernel(distance: Array) -> Array:
        return np.exp(-((distance / reach) ** 2) / 2)

    factor = cho_factor(kernel(apart) + NOISE * np.eye(len(points)))
    cross = kernel(cdist(candidates, points))
    mean = cross @ cho_solve(factor, scaled)
    variance = 1 - (cross * cho_solve(factor, cross.T).T).sum(1)
    deviation = np.sqrt(np.maximum(variance, 1e-12))
    gain = scaled.min() - mean
    score = gain / deviation
    improvement: Array = gain * norm.cdf(score) + deviation * norm.pdf(score)
    return improvement
