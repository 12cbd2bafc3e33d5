"""What a recipe would do and cost, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.canonical.families import canonicalize
from ..ir.core.heap import peak_rss_bytes
from ..ir.core.view import View
from ..ir.core.weights import SPOOLED_BYTES
from ..ir.run.batches import count_samples
from ..ir.structure.cache_slots import has_cache
from ..ir.structure.costs import graph_costs, sample_sizes, weight_bytes
from .base import Context, Pass, PassResult
from .checks import CHECKED_BATCHES, as_recipe, check_packages, require_change
from .original import compressed_sites
from .recipe import Recipe
from .rules import check_order, remarks

SOURCE_SECONDS_PER_BYTE = 2.1e-9
"""Of a run, whatever its recipe: hashing the source's files, a sweep over the source graph as it
was given and one in the vocabulary's words. These and the next figures are of a 0.5B decoder in
bfloat16 on one thread of the reference CPU."""
SWEEP_SECONDS_PER_BYTE = 1.4e-9
"""A checking sweep over a rewritten graph, by bytes of the source: one for each pass, and one for
the step that follows a prompt."""
ARTIFACT_SECONDS_PER_BYTE = 1e-8
"""Writing the artifact and running it in ONNX Runtime, twice, by its bytes in the source's dtype:
bfloat16 is written as float32, and codes are widened by each run."""
REPACKED_UP_TO = 1 << 29
"""Bytes of an artifact up to which its checks let ONNX Runtime repack the weights."""
WIDENING_SECONDS = {True: 2.5e-9, False: 7e-9}
"""By whether it does: for each number that is stored in codes and each run of a check without
rounding, what the runtime takes to make it a float32 again (of decoders of 0.5B, and of 1.5B and
7B)."""
MACS_PER_SECOND = 4e10
"""Of a sweep in float32 on one core of the reference CPU (zoo:minilm: 60 G in 1.4 s)."""
GRAPH_SECONDS = 5.0
"""What a run takes beside loading whatever the size: rules, translation, the report."""


@dataclass
class Plan:
    """What a recipe would do, from shapes alone."""

    passes: list[tuple[str, PassResult]]
    source_bytes: int
    artifact_bytes: int
    peak_rss_bytes: int
    seconds: float


def plan(
    graph: View, recipe: str | Recipe | Pass | Sequence[Pass | str], *, original: View | None = None
) -> Plan:
    """What ``optimize`` would do and cost. No weight is read and the graph stays as it is."""
    recipe = as_recipe(recipe)
    check_packages(recipe)
    view = graph.copy()
    canonicalize(view)
    size = source = weight_bytes(view)
    context = Context(view)
    check_order(recipe.passes, context.structure, compressed=original is not None)
    if original is not None:
        context.planned.update(compressed_sites(view, context.structure))
    planned: list[tuple[str, PassResult]] = []
    seconds, working, coded = 0.0, 0, dict[str, int]()
    for entry, notes in zip(recipe.steps, remarks(recipe.passes), strict=True):
        result = entry.pass_.plan(context)
        require_change(entry.pass_, result)
        result.notes += notes
        context.planned.update({site.name: site for site in result.sites})
        planned.append((str(entry), result))
        if entry.pass_.widened:
            coded.update({site.name: math.prod(site.shape) for site in result.sites})
        size += sum(site.bytes_after - site.bytes_before for site in result.sites)
        seconds += entry.pass_.seconds(result)
        working = max(working, entry.pass_.peak_bytes(result))
    seconds += GRAPH_SECONDS + source * SOURCE_SECONDS_PER_BYTE + size * ARTIFACT_SECONDS_PER_BYTE
    seconds += (len(recipe.steps) + 1) * source * SWEEP_SECONDS_PER_BYTE
    seconds += _checked_macs(view, graph, len(recipe.steps)) / MACS_PER_SECOND
    runs = 4 if has_cache(view) else 2  # with the runtime's optimisation on and off
    seconds += runs * sum(coded.values()) * WIDENING_SECONDS[size <= REPACKED_UP_TO]
    # A pass has ended when what it made is checked.
    peak = peak_rss_bytes() + max(working, _in_use(view)) + SPOOLED_BYTES
    return Plan(planned, source, size, peak, seconds)


def _checked_macs(view: View, graph: View, passes: int) -> int:
    """Multiply-accumulates of a run's checks on the source's own samples: on the first batches the
    source, its graph in two forms and each pass; on all of them source and artifact."""
    own = graph.source.samples or []
    macs = [
        (graph_costs(view, sample_sizes(view, batch)).macs or 0) * count_samples([batch])
        for batch in own
    ]
    return (3 + passes) * sum(macs[:CHECKED_BATCHES]) + 2 * sum(macs)


def _in_use(view: View) -> int:
    """Memory that checks need: the largest weight twice in float32, as it is and as it is
    multiplied; all others are read one at a time."""
    largest = max((weight.numel for weight in view.weights().values()), default=0)
    return 2 * 4 * largest
