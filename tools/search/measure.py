"""What is measured of one recipe: on a worker as well as here, so that it gives numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...passes.manager import optimize
from ...passes.recipe import Recipe
from .judge import Batch, Judge
from .skips import graph_measures


def measured(graph: View, judge: Judge, fit: Sequence[Batch], recipe: Recipe) -> dict[str, Any]:
    """The costs of a recipe's graph, fitted to ``fit``, and its loss with both ends; or under
    ``refused`` why the recipe does not run: the search goes on without it."""
    sample = {name: tensor[:1] for name, tensor in judge.batches[0].items()}
    try:
        result = optimize(graph, recipe, samples=[sample], calibration=fit).graph
    except BadInput as error:
        return {"refused": str(error)}
    loss = judge.of(result)
    return {
        "costs": graph_measures(result, judge.batches[0]),
        "loss": [loss.value, loss.low, loss.high],
    }
