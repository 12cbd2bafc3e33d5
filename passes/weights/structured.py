"""What the passes that take whole heads and units away share: places, sizes, what stands in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import floor
from typing import Any, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput, Refusal, near_misses
from ...ir.moves import (
    Kept,
    Shrunk,
    kept_heads,
    kept_units,
    reason_against_shrinking,
    shrink_channels,
)
from ...ir.run.statistics import Statistics
from ...ir.structure.channels import Channels, heads_of, units_of
from ...ir.structure.recognize import Attention, Linear, Structure
from ..base import Context, Group, Pass, PassResult, Site
from ..linear_pass import linear_site, weight_of


@dataclass(frozen=True)
class Place:
    """An attention or a feed-forward from which channels can be taken."""

    kind: Literal["heads", "units"]
    channels: Channels
    count: int
    """Heads of keys, each with its queries; or units."""
    each: int
    """Columns of the sink that one of them is."""
    site: Attention | None = None

    @property
    def sink(self) -> Linear:
        return self.channels.sink

    @property
    def name(self) -> str:
        return self.sink.name

    @property
    def cost(self) -> int:
        """Weights that one of them has, in all linears of the place."""
        return sum(x.out_features * x.in_features for x in self.linears) // self.count

    @property
    def signature(self) -> str:
        """Equal for places that take equally long: the kind, and the sizes of the linears."""
        sizes = ",".join(f"{x.out_features}x{x.in_features}" for x in self.linears)
        return f"{self.kind}:{sizes}"

    @property
    def linears(self) -> list[Linear]:
        return [*self.channels.linears.values(), self.sink]

    def columns(self, chosen: Sequence[int]) -> Tensor:
        """The columns of the sink that belong to some of them."""
        start = torch.tensor(sorted(chosen), dtype=torch.long) * self.each
        return (start[:, None] + torch.arange(self.each)).flatten()

    def kept(self, chosen: Sequence[int]) -> Kept:
        """What the move keeps: of an attention, heads of keys with all their queries."""
        if self.site is None:
            return kept_units(self.channels, chosen)
        assert self.site.heads is not None
        shared = self.site.heads // self.count
        return kept_heads(self.channels, [g * shared + i for g in chosen for i in range(shared)])


def find_places(
    context: Context, result: PassResult, kinds: Sequence[str], include: Sequence[str] = ()
) -> list[Place]:
    """The places of a graph in its order; those that cannot shrink are refused with reasons.

    ``include`` are globs of their sinks' names; all, if empty. Raises ``BadInput`` for one that
    matches none.
    """
    places, refused = _all_places(context, kinds)
    names = [*(place.name for place in places), *(name for name, _ in refused)]
    for glob in include:
        if not any(fnmatchcase(name, glob) for name in names):
            raise BadInput(f"include={glob} matches no site; {near_misses(glob, names)}")

    def chosen(name: str) -> bool:
        return not include or any(fnmatchcase(name, glob) for glob in include)

    result.refused += [(name, reason) for name, reason in refused if chosen(name)]
    return [place for place in places if chosen(place.name)]


def _all_places(
    context: Context, kinds: Sequence[str]
) -> tuple[list[Place], list[tuple[str, str]]]:
    """Those that can shrink, and the names of the others with reasons."""
    view, structure = context.view, context.structure
    order = {node: place for place, node in enumerate(view.nodes())}
    linears = {linear.name: linear for linear in structure.linears}
    candidates: list[Place] = []
    refused: list[tuple[str, str]] = []
    for site in structure.attentions if "heads" in kinds else ():
        try:
            channels = heads_of(view, site, linears, order)
        except Refusal as refusal:
            refused.append((site.o or view.name(site.node), refusal.reason))
            continue
        assert site.kv_heads is not None
        each = channels.sink.in_features // site.kv_heads
        candidates.append(Place("heads", channels, site.kv_heads, each, site))
    for first, last in _feed_forwards(structure) if "units" in kinds else ():
        try:
            channels = units_of(view, first, last, linears, order)
        except Refusal as refusal:
            refused.append((last.name, refusal.reason))
            continue
        candidates.append(Place("units", channels, last.in_features, 1))
    places = []
    for place in sorted(candidates, key=lambda p: order[p.sink.node]):
        reason = reason_against_shrinking(view, place.channels)
        if reason is None:
            places.append(place)
        else:
            refused.append((place.name, reason))
    return places, refused


def _feed_forwards(structure: Structure) -> list[tuple[list[Linear], Linear]]:
    linears = {linear.name: linear for linear in structure.linears}
    pairs = []
    for sub in structure.sub_blocks:
        by_role: dict[str, Linear] = {linears[name].role: linears[name] for name in sub.linears}
        first = [by_role[role] for role in ("gate", "up", "fc1") if role in by_role]
        last = by_role.get("down") or by_role.get("fc2")
        if first and last is not None:
            pairs.append((first, last))
    return pairs


def staying(count: int, ratio: float) -> int:
    """How many of ``count`` heads or units stay where a share ``ratio`` goes: one at least."""
    return max(1, count - floor(ratio * count + 0.5))


Repair = tuple[Tensor | None, Tensor | None]
"""The columns of a sink that stay, and what is added to its bias; ``None`` where they are as they
were."""
Fit = Callable[[Context, Place, Statistics], dict[str, Any]]


def learned(
    context: Context, pass_: Pass, places: Sequence[Place], fit: Fit, what: str
) -> dict[str, dict[str, Any]]:
    """What ``fit`` makes of the statistics at each place's sink, by name; where a run was killed it
    is remembered, without sweeping again."""
    by_name = {place.name: place for place in places}
    fits: dict[str, dict[str, Any]] = {}

    def done(group: Group, statistics: Statistics) -> None:
        (name,) = group
        context.progress(f"{pass_.name}: {name}", len(fits), len(places))
        fits[name] = context.once(
            f"{what} {name}", lambda: fit(context, by_name[name], statistics)
        )

    groups: list[Group] = [(name,) for name in by_name]
    if context.remembers(f"swept {what}"):
        for group in groups:
            done(group, Statistics())
        return fits
    assert context.learning is not None
    context.learning.at_linears(context, pass_.requires(), groups, done, {})
    context.once(f"swept {what}", lambda: True)
    return fits


def take_away(
    context: Context, kept: Mapping[str, Sequence[int]], places: Sequence[Place],
    repairs: Mapping[str, Repair], result: PassResult, rule: str,
) -> None:  # fmt: skip
    """Keep of each place those that ``kept`` names, and put in what ``repairs`` say."""
    shrunk = []
    for place in places:
        if len(kept[place.name]) == place.count:
            continue
        sink, bias = repairs.get(place.name, (None, None))
        shrunk.append(Shrunk(place.channels, place.kept(kept[place.name]), sink, bias))
        result.sites += shrunk_sites(context, place, len(kept[place.name]))
    shrink_channels(context.view, shrunk, spool=context.spool, rule=rule, step=context.step)
    context.edited()


def shrunk_sites(context: Context, place: Place, remaining: int) -> list[Site]:
    """A site for each linear of a place of which ``remaining`` heads or units stay."""
    sites = []
    for linear in place.linears:
        weight = weight_of(context.view, linear)
        after = weight.nbytes * remaining // place.count
        note = f"{remaining} of {place.count} {_NAMES[place.kind]} stay"
        sites.append(linear_site(linear, weight.stored_bytes, after, note=note))
    return sites


_NAMES = {"heads": "heads of keys", "units": "units"}
