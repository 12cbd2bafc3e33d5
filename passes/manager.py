"""``optimize``: a recipe on a graph, needs first, then pass by pass with checks and rollback."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.core.given import check_graph
from ..ir.core.view import View
from ..ir.run.batches import as_batches
from ..ir.run.truth import Truth
from ..ir.vocab.targets import find_target
from .base import Pass
from .checked_run import CheckedRun, Progress, Result, Samples
from .checkpoint_store import CheckpointStore
from .checks import as_recipe, check_needs
from .recipe import Recipe
from .rules import check_order


def optimize(
    graph: View,
    recipe: str | Recipe | Pass | Sequence[Pass | str],
    *,
    samples: Samples | None = None,
    calibration: Samples | None = None,
    max_error: float | None = None,
    progress: Progress | None = None,
    checkpoints: CheckpointStore | None = None,
    truth: Truth | None = None,
    target: str | None = None,
    original: View | None = None,
) -> Result:
    """Apply a recipe to a copy of ``graph``; each pass is checked before the next one runs.

    ``samples`` are batches of inputs by name, on which every pass is measured: the graph's own
    (``graph.source``) or random ones where absent; ``calibration`` is what passes that need data
    learn from; both may be one batch, or whatever gives several. ``max_error`` bounds the relative
    L2 of any output against the source graph. ``checkpoints`` keeps what takes long, and gives it
    back to a run of the same recipe on the same graph and data. ``target`` names what the artifact
    is for (``vocab.targets``): what passes leave open, such as ``accuracy_level``, is then as that
    likes it. ``original`` is the model that ``graph`` was compressed from, where somebody else did
    that: passes that compensate then close the gap to it.

    Before the first pass the graph is held against the source itself, where something runs it:
    ``truth`` is what it gave on the samples, if they were already put to it.

    Raises ``BadInput`` for a recipe that does not fit and a source that contradicts itself,
    ``Missing`` for a need that is not met, and ``BoundExceeded`` where the graph is not the
    source's, an exact pass changed numbers or a bound was passed; ``graph`` stays as it is in any
    case.
    """
    check_graph(graph)
    recipe = as_recipe(recipe)
    samples = None if samples is None else as_batches(samples, "samples")
    calibration = None if calibration is None else as_batches(calibration, "calibration")
    check_order(recipe.passes, compressed=original is not None)
    if target is not None:
        recipe = recipe.settled(find_target(target))
    check_needs(recipe, calibrated=bool(calibration))
    run = CheckedRun(
        graph, recipe, samples=samples, calibration=calibration, max_error=max_error,
        progress=progress, checkpoints=checkpoints, truth=truth, original=original,
    )  # fmt: skip
    return run.run()
