"""Knobs that are measured directly: halves of blocks left out, and image tokens dropped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import View
from ...ir.moves.bypass_blocks import refusals
from ...ir.structure.costs import graph_costs, sample_sizes
from ...ir.structure.recognize import Structure, last_tower, recognize
from ...ir.structure.units import Unit, in_halves
from ...ir.structure.vision import ImageTokens, find_image_tokens
from ...passes.base import Context, Pass
from ...passes.tokens.diverse import Diverse
from ...passes.tokens.fastervlm import FasterVLM
from ...passes.tokens.token_pass import KeepPass, counted
from ...passes.tokens.uniform_tokens import UniformTokens
from .healing import Healing
from .judge import Judge

Progress = Callable[[str, int, int], None]
Batch = Mapping[str, torch.Tensor]
KEEPS = ("75%", "50%", "25%", "12%")
CHOOSERS: tuple[type[KeepPass], ...] = (FasterVLM, Diverse, UniformTokens)
"""What says which image tokens stay. Where all parts of a picture are asked about, no score beats
even distances (``zoo:tiny-llava-details``)."""
CUTS: tuple[KeepPass, ...] = tuple(kind(keep=keep) for keep in KEEPS for kind in CHOOSERS)


PAIRED = 12
"""Halves of blocks that are left out two by two: 66 pairs, each a run over the probed tokens."""


@dataclass(frozen=True)
class Measured:
    """What a pass by itself makes of the model: its costs by measure, and its loss."""

    costs: Mapping[str, float]
    loss: float
    lost: Sequence[str] = ()
    """The linears that are no longer there, where halves of blocks are left out."""


def graph_measures(
    view: View, batch: Batch, structure: Structure | None = None
) -> dict[str, float]:
    """What one sample of a batch costs: ``bytes`` of weights; ``kv`` where keys and values are
    kept."""
    costs = graph_costs(view, sample_sizes(view, batch), structure)
    measures = {"bytes": float(costs.weight_bytes)}
    if costs.kv_bytes:
        measures["kv"] = float(costs.kv_bytes)
    return measures


def measured(view: View, pass_: Pass, judge: Judge) -> Measured:
    """Run one pass on a copy of a canonical graph, and judge it. Raises ``BadInput`` where the pass
    does not fit."""
    copy = view.copy()
    pass_.run(Context(copy))
    copy.drop_unused_weights()
    return measured_graph(copy, judge)


def measured_graph(view: View, judge: Judge) -> Measured:
    """What a graph takes, and how far it is from the source."""
    return Measured(graph_measures(view, judge.batches[0]), judge.mean_of(view))


def units(view: View, structure: Structure) -> list[Unit]:
    """The halves of the language model's blocks, in order; none where no block is recognised."""
    try:
        return in_halves(last_tower(structure))
    except BadInput:
        return []


def may_go(view: View, all_units: Sequence[Unit]) -> list[Unit]:
    """Those of some units that can be left out."""
    reasons = refusals(view, all_units)
    return [unit for unit, reason in zip(all_units, reasons, strict=True) if not reason]


def left_out(
    healing: Healing, judge: Judge, progress: Progress
) -> Iterator[tuple[Unit, Measured]]:
    """Each unit that may be left out, and the model without it, healed or not."""
    for number, unit in enumerate(healing.units):
        progress(f"leaving out {unit.name}", number, len(healing.units))
        copy = healing.without(unit)
        structure = recognize(copy)
        stay = {linear.name for linear in structure.linears}
        lost = [linear.name for linear in healing.structure.linears if linear.name not in stay]
        costs = graph_measures(copy, judge.batches[0], structure)
        yield unit, Measured(costs, judge.mean_of(copy), lost)


def excess_of_pairs(
    healing: Healing, losses: Mapping[str, float], judge: Judge, progress: Progress
) -> Iterator[tuple[tuple[str, str], float]]:
    """How much more two units lose together than their losses add up to, as a share of these: of
    the ``PAIRED`` units that lose least by themselves, in the order of the graph.

    Two that are all of their kind are never left out.
    """
    names = sorted(losses, key=lambda name: losses[name])[:PAIRED]
    paired = [unit for unit in healing.units if unit.name in names]
    alone = {x.name: judge.mean_of(healing.without(x)) for x in paired}
    kinds = Counter(unit.part for unit in units(healing.view, healing.structure))
    pairs = [
        (one, other) for one, other in combinations(paired, 2)
        if one.part != other.part or kinds[one.part] > 2
    ]  # fmt: skip
    for number, (one, other) in enumerate(pairs):
        progress(f"leaving out {one.name} and {other.name}", number, len(pairs))
        both = judge.mean_of(healing.without(one, other))
        added = alone[one.name] + alone[other.name]
        yield (one.name, other.name), both / added - 1 if added > 0 else 0.0


def token_cuts(
    view: View, structure: Structure, judge: Judge, progress: Progress, cache: float | None = None
) -> Iterator[tuple[KeepPass, Measured]]:
    """Each pass that drops image tokens and fits the model, and the model behind it; ``cache`` are
    bytes of one sample's keys and values, for which as many stay as fit in them."""
    try:
        images = find_image_tokens(view, structure)
    except Refusal:
        return
    cuts, known = [*CUTS], dict[KeepPass, Measured]()
    while cuts:
        cut = cuts.pop(0)
        progress(f"dropping image tokens by {cut.name}", len(known), len(CUTS))
        try:
            behind = measured(view, cut, judge)
        except BadInput:
            continue
        if cache is not None and not known:
            left = cut.cuts(view, structure)[0].left
            whole = graph_measures(view, judge.batches[0])
            cuts += _filling(cache, images, left, whole.get("kv", 0.0), behind.costs.get("kv", 0.0))
        known[cut] = behind
        yield cut, behind


def _filling(
    cache: float, images: ImageTokens, left: int, whole: float, behind: float
) -> Iterator[KeepPass]:
    """The cuts that keep as many tokens as a cache of so many bytes takes, by those of the whole
    model and behind a cut that leaves ``left``; none that is one of ``CUTS``."""
    if whole <= cache or whole <= behind:
        return
    gone = math.ceil((whole - cache) * (images.count - left) / (whole - behind) - 1e-6)
    patches = images.count - images.newlines
    stay = (patches - gone) // images.pictures * images.pictures
    taken = (counted(cut.name, cut.keep, patches) for cut in CUTS)
    if 0 < stay < patches and stay not in taken:
        yield from (kind(keep=str(stay)) for kind in CHOOSERS)
