"""What passes that change a model's depth share: the path, what it costs, and how it is healed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Node, Value, View
from ...ir.moves.block_path import Path
from ...ir.moves.bypass_blocks import bodies, check_repeats, follow
from ...ir.run.masks import without_first
from ...ir.run.statistics import Stat, StreamFit
from ...ir.structure.costs import Causal
from ...ir.structure.recognize import Structure, last_tower
from ...ir.structure.units import Unit
from ...ir.vocab.builder import Builder
from ..base import BLOCKS, Context, Pass, PassResult, Site
from .heal import StreamMap, fit_map


@dataclass(frozen=True, kw_only=True)
class PathPass(Pass):
    """Base of passes that let the residual stream run through some blocks, or halves of them.

    ``heal`` puts something small in the place of what is left out, fitted to what that added to
    the stream on the calibration data: ``mean`` a constant, ``linear`` a linear map of rank
    ``heal_rank`` beside it, by least squares in closed form with a ridge (``depth/heal.py``). Where
    neighbours are left out, one map stands for all of them. It is fitted to texts as they are and
    to the same texts without their first token. Nothing stands in where such a map, fitted to seven
    eighths of the data, is worse than nothing on the rest: then there are too few of them.
    """

    exact: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = (BLOCKS,)
    heal: Literal["none", "mean", "linear"] = "none"
    """What stands in for it; takes data."""
    heal_rank: int = 16
    """Of heal=linear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heal_rank < 1:
            raise BadInput(f"{self.name}: heal_rank={self.heal_rank} must be at least 1")

    def heal_stats(self) -> tuple[Stat, ...]:
        """What healing asks of the calibration data."""
        return () if self.heal == "none" else (Stat("stream_fit", at="block"),)

    def follow(self, context: Context, path: Path, result: PassResult) -> None:
        """Let the stream run through ``path``, healed; its sites go into ``result``.

        Raises ``BadInput`` where the path is not one of this model's.
        """
        result.sites += self.sites(context, path)
        try:
            maps = self._maps(context, path, result)
            leave_out(context, path, maps, rule=self.name)
        except Refusal as refusal:
            raise BadInput(f"{self.name}: {refusal}") from None

    def sites(self, context: Context, path: Path) -> list[Site]:
        """What becomes of the blocks, or halves, that are not run through once."""
        try:
            units, places = path.units(last_tower(context.structure))
            counts = [places.count(i) for i in range(len(units))]
            check_repeats(context.view, units, path, counts)
        except Refusal as refusal:
            raise BadInput(f"{self.name}: {refusal}") from None
        changed = [i for i, count in enumerate(counts) if count != 1]
        changed_bodies = bodies(context.view, [units[i] for i in changed])
        sizes = [_own_bytes(context.view, body) for body in changed_bodies]
        sites = [
            Site(
                name=units[i].name, kind=units[i].part or "block", shape=(counts[i],),
                bytes_before=size, bytes_after=size if counts[i] else 0,
            )
            for i, size in zip(changed, sizes, strict=True)
        ]  # fmt: skip
        if self.heal != "none":
            sites += [self._healing_site(context.view, run) for run in runs_left_out(units, counts)]
        return sites

    def _healing_site(self, view: View, run: Sequence[Unit]) -> Site:
        stream = view.type(run[0].entry)
        width = (stream.shape or (0,))[-1]
        assert isinstance(width, int) and stream.dtype is not None
        rank = min(self.heal_rank, width) if self.heal == "linear" else 0
        size = (1 + 2 * rank) * width * stream.dtype.itemsize
        return Site(
            name=_healing(run), kind="heal", shape=(rank, width), bytes_before=0, bytes_after=size,
        )  # fmt: skip

    def _maps(self, context: Context, path: Path, result: PassResult) -> dict[str, StreamMap]:
        """For the first unit of each run that is left out what stands in for the run."""
        if self.heal == "none":
            return {}
        units, places = path.units(last_tower(context.structure))
        counts = [places.count(i) for i in range(len(units))]
        if max(counts) > 1:
            raise BadInput(
                f"{self.name}: heal={self.heal}, but the path runs through blocks again: what is "
                "left out is fitted to the model's own stream, which such a path does not have"
            )
        runs = runs_left_out(units, counts)
        maps = {}
        for run, fitted in zip(runs, self._fitted(context, runs), strict=True):
            name = _named(run)
            if not fitted.helps:
                result.sites = [s for s in result.sites if s.name != _healing(run)]
                result.notes.append(
                    f"not healed, {name}: a map fitted to seven eighths of the data is worse than "
                    "nothing on the rest; give more data"
                )
                continue
            maps[run[0].name] = fitted
            unseen = "" if fitted.unseen is None else f", {fitted.unseen:.1%} on data held back"
            share = f"{fitted.explained:.1%} of what it added to the stream"
            result.notes.append(f"healed {name}: {share}{unseen}")
        return maps

    def _fitted(self, context: Context, runs: Sequence[Sequence[Unit]]) -> list[StreamMap]:
        rank = self.heal_rank if self.heal == "linear" else 0

        def fit() -> list[dict[str, object]]:
            assert context.learning is not None
            ends = [joined(run) for run in runs]
            more = texts_begun_before(context.view, context.structure, context.calibration)
            (fits,) = context.learning.at_units(context, self.heal_stats(), ends, more).values()
            return [vars(fit_map(statistics[StreamFit], rank)) for statistics in fits]

        return [StreamMap(**fields) for fields in context.once("healing", fit)]  # type: ignore[arg-type]


def leave_out(
    context: Context, path: Path, maps: Mapping[str, StreamMap], *, rule: str
) -> None:
    """Let the stream run through ``path``, and of each run of units that it leaves out through the
    map in ``maps``, by the name of the run's first. Raises ``Refusal`` where the path is not one of
    this model's."""
    instead = {
        name: lambda b, x, fitted=fitted: _apply(context, b, x, fitted)
        for name, fitted in maps.items()
    }
    blocks = last_tower(context.structure)
    follow(context.view, blocks, path, instead, rule=rule, step=context.step)
    context.edited()


def texts_begun_before(
    view: View, structure: Structure, batches: Sequence[Mapping[str, Tensor]]
) -> Sequence[Mapping[str, Tensor]]:
    """The calibration data of a causal model without each text's first token.

    All tokens look at the first one, and where it is always the same, as a BOS is, the stream
    holds much that is of this and not of the text: a map that was fitted to that alone, to blocks
    3 and 4 of zoo:tiny-llama, took a perplexity of windows that begin anywhere from 53 to 85.
    """
    causal = Causal(view)
    if not all(causal(attention.node) for attention in structure.attentions):
        return ()
    return without_first(view, batches)


def _apply(context: Context, b: Builder, x: Value, fitted: StreamMap) -> Value:
    """``x + U D x + c``: what stands in for what was left out of the stream."""
    view = context.view
    dtype = view.type(x).dtype
    assert dtype is not None

    def weight(name: str, tensor: Tensor) -> Value:
        return view.add_weight(f"heal.{name}", context.spool.store(tensor.to(dtype)))

    total = b.add(x, weight("bias", fitted.bias), like=x)
    if not fitted.down.numel():
        return total
    side = b.linear(b.linear(x, weight("down", fitted.down)), weight("up", fitted.up), like=x)
    return b.add(total, side, like=x)


def runs_left_out(units: Sequence[Unit], counts: Sequence[int]) -> list[list[Unit]]:
    """Neighbours that are left out together, with no selection of tokens between them."""
    runs: list[list[Unit]] = []
    for i, (unit, count) in enumerate(zip(units, counts, strict=True)):
        if count:
            continue
        if i and not counts[i - 1] and units[i - 1].exit is unit.entry:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return runs


def joined(run: Sequence[Unit]) -> Unit:
    """All of a run of neighbours, as one unit that has the name of the first."""
    return Unit(run[0].block, run[0].part, run[0].entry, run[-1].exit)


def _named(run: Sequence[Unit]) -> str:
    return run[0].name if len(run) == 1 else f"{run[0].name} to {run[-1].name.split()[1]}"


def _healing(run: Sequence[Unit]) -> str:
    return f"healing of {_named(run)}"


def _own_bytes(view: View, body: Sequence[Node]) -> int:
    """Bytes of the weights that only these nodes read."""
    members = set(body)
    sizes = {}
    for node in body:
        for value in view.arguments(node):
            weight = view.weight(value)
            if weight is not None and members.issuperset(view.users(value)):
                sizes[weight.key] = weight.nbytes
    return sum(sizes.values())
