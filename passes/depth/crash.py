"""``crash``: one block for each cluster of blocks whose states are alike."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.moves.block_path import Path
from ...ir.run.masks import mask_of, padding_masks
from ...ir.structure.recognize import last_tower
from ...ir.structure.units import whole
from ..base import Context, Needs, PassResult
from .path_pass import PathPass
from .path_runner import PathRunner


@dataclass(frozen=True, kw_only=True)
class CRaSh(PathPass):
    """Cluster neighbouring blocks by their states, keep the middle one of each cluster (CRaSh,
    Zhang et al. 2023, arXiv 2310.15477).

    Two clusters are merged, as long as there are more than ``clusters``, where the last state of
    the left one and the first of the right one have the highest linear CKA, ``|Y^T X|^2 /
    (|X^T X| |Y^T Y|)`` of centred states ``[samples, width]``, each the mean over a sample's tokens
    weighted by their places. ``rest=remove`` leaves the other blocks out; ``rest=share`` runs the
    nearest staying one in the place of each (the left one only where it is strictly nearer), which
    saves weights and neither time nor cache. The paper makes emulators for tuning elsewhere, and
    says that such a model alone is poor.
    """

    name: ClassVar[str] = "crash"
    clusters: int
    """Blocks that are staying."""
    rest: Literal["remove", "share"] = "remove"
    """What becomes of the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 1:
            raise BadInput(f"crash: clusters={self.clusters} must be at least 1")

    def requires(self) -> Needs:
        return Needs(calibration=True, stats=self.heal_stats())

    def run(self, context: Context) -> PassResult:
        units, result = whole(last_tower(context.structure)), PassResult()
        self._check(len(units))

        def measure() -> list[float]:
            view, batches = context.view, context.calibration
            runner = PathRunner(view, context.structure, units, batches)
            masks = padding_masks(view, batches)
            states = []
            for last in range(len(units)):
                stream = runner.behind(tuple(range(last + 1)))
                pairs = zip(stream, masks, strict=True)
                states.append(torch.cat([_pooled(x, fitting) for x, fitting in pairs]))
            if len(states[0]) < 2:
                raise BadInput("crash: the calibration data is one sample: nothing varies")
            # Of neighbours alone: clusters are runs of blocks, compared where they meet.
            return [cka(a, b) for a, b in itertools.pairwise(states)]

        alike = context.once("alike", measure)
        staying = centres(alike, self.clusters)
        listed = " ".join(f"{i}-{i + 1}:{value:.4f}" for i, value in enumerate(alike))
        result.notes.append(f"CKA of neighbours: {listed}")
        places = staying if self.rest == "remove" else shared(staying, len(units))
        self.follow(context, Path.of(places), result)
        result.notes.append(f"path {Path.of(places)}, of {len(units)} blocks")
        return result

    def plan(self, context: Context) -> PassResult:
        count = len(last_tower(context.structure))
        self._check(count)
        places = centres([0.0] * (count - 1), self.clusters)
        path = Path.of(places if self.rest == "remove" else shared(places, count))
        note = "which blocks are staying is decided by the calibration data"
        return PassResult(sites=self.sites(context, path), notes=[note])

    def _check(self, count: int) -> None:
        if self.clusters >= count:
            raise BadInput(f"crash: clusters={self.clusters} of {count} blocks leaves none out")


def centres(alike: list[float], clusters: int) -> list[int]:
    """The middle block of each cluster; ``alike`` is the likeness of neighbours."""
    groups = [[i] for i in range(len(alike) + 1)]
    while len(groups) > clusters:
        place = max(range(len(groups) - 1), key=lambda i: alike[groups[i][-1]])
        groups[place : place + 2] = [groups[place] + groups[place + 1]]
    return [group[len(group) // 2] for group in groups]


def shared(staying: list[int], count: int) -> list[int]:
    """For each block the nearest staying one; of two as near, the right one."""
    return [min(staying, key=lambda k: (abs(k - i), -k)) for i in range(count)]


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two sets of states, each f64 ``[samples, width]``."""
    x, y = x - x.mean(0), y - y.mean(0)
    # |Y^T X|^2 = sum (X X^T) (Y Y^T): samples are fewer than features.
    a, b = x @ x.T, y @ y.T
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-30))


def _pooled(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The mean over tokens that count, ``[rows, seq, width]`` to f64 ``[rows, width]``, weighted by
    their places among these."""
    mask = mask_of(x, masks)
    weights = (mask.cumsum(1) * mask).double()
    return (weights[..., None] * x.double()).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
