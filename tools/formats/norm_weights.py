"""Weights of norms as checkpoints have them: Gemma's kind multiplies by ``1 + w`` and stores ``w``.

A graph holds the sum, folded to one constant without the parameter's name. Its scope names the
module, and the module itself says what it adds: its result is ``(added + w) normed(x)``, so two
weights of it give ``added = y(0) / (y(1) - y(0))``.
"""

from __future__ import annotations

import copy

import torch

from ...ir.core.view import View
from ...ir.core.weights import ComputedWeight, Weight

_PROBE = (1.0, -2.0, 3.0, -4.0)
"""Numbers to norm, none of which is its mean or 0."""


def norm_weights(view: View) -> dict[str, Weight]:
    """What each ``rms_norm`` multiplies by, by the module that made it, where it has one alone."""
    by_scope: dict[str, list[Weight]] = {}
    for node in view.nodes():
        if view.op(node) != "rms_norm":
            continue
        weight = view.weight(view.operands(node)[1])
        if weight is not None:
            by_scope.setdefault(view.scope(node), []).append(weight)
    return {scope: weights[0] for scope, weights in by_scope.items() if len(weights) == 1}


def parameter_of(module: torch.nn.Module, multiplied: Weight) -> Weight | None:
    """The parameter of a norm that multiplies by ``multiplied``; ``None`` where the module does
    something else with it. The module may be on the meta device."""
    added = _added(module)
    if added is None:
        return None
    if added == 0:
        return multiplied
    return ComputedWeight(
        lambda: multiplied.read() - added, multiplied.shape, multiplied.dtype,
        (multiplied.key, added),
    )  # fmt: skip


def _added(module: torch.nn.Module) -> float | None:
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    x = torch.tensor(_PROBE)
    none, one = (_normed(module, x, fill) for fill in (0.0, 1.0))
    if none.shape != x.shape or bool(((one - none) == 0).any()):
        return None
    ratios = none / (one - none)
    added = float(ratios[0].round())
    return added if torch.allclose(ratios, torch.tensor(added), atol=1e-5) else None


def _normed(module: torch.nn.Module, x: torch.Tensor, fill: float) -> torch.Tensor:
    """What the module makes of ``x`` with a weight of one number in all places."""
    small = copy.copy(module)
    weight = torch.nn.Parameter(torch.full_like(x, fill), requires_grad=False)
    small._parameters = {"weight": weight}
    with torch.no_grad():
        return small(x)  # type: ignore[no-any-return]
