"""Knobs that are measured directly: halves of blocks left out, and image tokens dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import View
from ...ir.moves.block_path import Path
from ...ir.moves.bypass_blocks import refusals
from ...ir.structure.costs import graph_costs, sample_sizes
from ...ir.structure.recognize import Structure, last_tower
from ...ir.structure.units import Unit, in_halves
from ...ir.structure.vision import find_image_tokens
from ...passes.base import Context, Pass
from ...passes.depth.path import FollowPath
from ...passes.tokens.diverse import Diverse
from ...passes.tokens.fastervlm import FasterVLM
from ...passes.tokens.token_pass import KeepPass
from .judge import Judge

Progress = Callable[[str, int, int], None]
Batch = Mapping[str, torch.Tensor]
KEEPS = ("75%", "50%", "25%", "12%")
CUTS: tuple[KeepPass, ...] = tuple(
    kind(keep=keep) for keep in KEEPS for kind in (FasterVLM, Diverse)
)


@dataclass(frozen=True)
class Measured:
    """What a pass by itself makes of the model: its costs by measure, and its loss."""

    costs: Mapping[str, float]
    loss: float


def graph_measures(view: View, batch: Batch) -> dict[str, float]:
    """What one sample of a batch costs: ``bytes`` of weights; ``kv`` where keys and values are
    kept."""
    costs = graph_costs(view, sample_sizes(view, batch))
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
    return Measured(graph_measures(copy, judge.batches[0]), judge.mean_of(copy))


def units(view: View, structure: Structure) -> list[Unit]:
    """The halves of the language model's blocks, in order; none where no block is recognised."""
    try:
        return in_halves(last_tower(structure))
    except BadInput:
        return []


def left_out(
    view: View, all_units: Sequence[Unit], judge: Judge, progress: Progress
) -> Iterator[tuple[Unit, Measured]]:
    """Each unit that can be left out, and the model without it."""
    for number, (unit, reason) in enumerate(
        zip(all_units, refusals(view, all_units), strict=True)
    ):
        if reason:
            continue
        progress(f"leaving out {unit.name}", number, len(all_units))
        path = Path.through(other for other in all_units if other is not unit)
        yield unit, measured(view, FollowPath(blocks=str(path)), judge)


def token_cuts(
    view: View, structure: Structure, judge: Judge, progress: Progress
) -> Iterator[tuple[KeepPass, Measured]]:
    """Each pass that drops image tokens and fits the model, and the model behind it."""
    try:
        find_image_tokens(view, structure)
    except Refusal:
        return
    for number, cut in enumerate(CUTS):
        progress(f"dropping image tokens by {cut.name}", number, len(CUTS))
        try:
            yield cut, measured(view, cut, judge)
        except BadInput:
            continue
