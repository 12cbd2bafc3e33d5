"""The factor of an inverse Hessian by which rounding and pruning pass their errors on."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.run.statistics import Gram

DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it."""
TRIES = 3
"""How often damping is raised tenfold where the matrix is not positive: up to the mean itself."""

_FACTORS: WeakKeyDictionary[Gram, Tensor] = WeakKeyDictionary()


def inverse_factor(gram: Gram) -> Tensor:
    """``U`` f32 ``[n, n]``, upper, with ``U^T U = (X^T X + damping)^-1``, once for each ``gram``.

    An input that was always 0 gets 1 on the diagonal, as in GPTQ (Frantar et al. 2022, arXiv
    2210.17323). What is computed from it does not depend on the Gram matrix's scale. It is computed
    in the dtype of the Gram matrix. Raises ``BadInput`` where no damping makes it positive.
    """
    if gram not in _FACTORS:
        _FACTORS[gram] = _factor(gram.matrix)
    return _FACTORS[gram]


def _factor(gram: Tensor) -> Tensor:
    diagonal = gram.diagonal().clone()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean())
    for attempt in range(TRIES):
        damped = gram.clone()
        damped.diagonal().copy_(diagonal + DAMPING * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(torch.isfinite(upper).all()):
            found: Tensor = upper.float()
            return found
    raise BadInput(
        "the inputs' Gram matrix has no inverse, whatever is added to its diagonal: check the "
        "calibration data"
    )
