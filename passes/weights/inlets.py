"""What passes share that rescale the inputs of linears: which they can, and where it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ...ir.core.view import View
from ...ir.core.weights import Weight
from ...ir.moves import Inlet, find_inlets, rescale
from ...ir.moves.rescale import is_narrow
from ...ir.structure.recognize import Linear, Structure, recognize
from ..base import Context

Names = tuple[str, ...]
"""The linears of an inlet, by name."""


def inlets_of(
    context: Context, chosen: Sequence[Linear], *, divide: bool = False
) -> tuple[list[Inlet], dict[str, str]]:
    """The inlets of which every linear is chosen; for chosen linears of others, the reason.

    From shapes alone: it serves forecasts. ``divide``: see ``find_inlets``.
    """
    candidates, refused = find_inlets(context.view, context.structure, divide=divide)
    reasons, names = dict(refused), {linear.name for linear in chosen}
    known = [
        {inlet.names for inlet in find_inlets(graph, recognize(graph), divide=divide)[0]}
        for graph in context.references()
    ]
    whole = []
    for inlet in candidates:
        others = [name for name in inlet.names if name not in names]
        if not others and all(inlet.names in inlets for inlets in known):
            whole.append(inlet)
            continue
        reason = "in the source graph its input is made otherwise"
        if others:
            reason = f"{others[0]} reads the same input and is kept: choose both or neither"
        reasons.update(dict.fromkeys(inlet.names, reason))
    return whole, {name: reason for name, reason in reasons.items() if name in names}


def allowed(view: View, inlet: Inlet, factors: Tensor) -> Tensor:
    """The nearest factors ``[K]`` f64 that an inlet takes: equal ones where one constant makes
    several features, and powers of two where a constant is in a narrow dtype, which they leave
    exact."""
    shared = inlet.shared(factors)
    return torch.exp2(shared.log2().round()) if is_narrow(view, inlet) else shared


def fold(context: Context, factors: Mapping[Names, Tensor], *, divide: bool = False) -> None:
    """Divide inputs by ``allowed`` factors in the graph and in those that it is compared with.

    Their weights are the same handles as long as no pass has changed them, and stay so.
    """
    weights: dict[tuple[object, Names, str], Weight] = {}

    def change(view: View, structure: Structure) -> None:
        for inlet in find_inlets(view, structure, divide=divide)[0]:
            if inlet.names not in factors:
                continue

            def stored(
                weight: Weight, which: Literal["columns", "rows"],
                rescaled: Callable[[Tensor], Tensor], names: Names = inlet.names,
            ) -> Weight:  # fmt: skip
                key = weight.key, names, which
                if key not in weights:
                    weights[key] = context.spool.store(rescaled(weight.read()))
                return weights[key]

            rescale(view, inlet, factors[inlet.names], stored)

    context.in_all_graphs(change)
