"""What a pass is: a frozen dataclass whose fields are its options, and the context it runs in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch

from ..ir.core.errors import BadInput, near_misses
from ..ir.core.view import View
from ..ir.core.weights import Spool, Weight
from ..ir.run.calibrate import Compressed
from ..ir.run.statistics import Stat, Statistics
from ..ir.structure.low_rank import Whole, wholes
from ..ir.structure.recognize import Linear, Structure, recognize
from ..ir.structure.units import Unit
from ..ir.vocab.targets import Target
from .checkpoint_store import CheckpointStore, T, is_remembered, remembered
from .narrowing import Narrowing
from .options import check_types

STORED, MASKED, COMPENSATED = "stored weights", "masked weights", "compensated linears"
CHANGED = "changed weights"
"""What any pass leaves that gives linears other numbers: there is something to compensate."""
REDEFINED = "another model"
"""Of a pass that adds what was learned elsewhere, or takes heads away: what follows is held against
its result."""
TOKENS, BLOCKS = "fewer tokens", "other blocks"
"""What passes leave behind: see ``Pass.provides``."""

Propagate = Literal["current", "dense", "sequential", "compensated"]


@dataclass(frozen=True)
class Needs:
    """What must be there before a pass runs; the manager refuses early where it is not."""

    calibration: bool = False
    """Batches of inputs, for a pass that looks at them itself."""
    packages: tuple[str, ...] = ()
    stats: tuple[Stat, ...] = ()
    """Statistics of activations on the calibration data."""
    propagate: Propagate = "current"
    """In which graph they are taken. ``current``: as it is when the pass runs. ``dense``: as it was
    before any pass changed a weight. ``sequential``, ``compensated``: as it is, but what follows a
    linear sees what the pass makes of it, a stored form or a low-rank path beside one."""

    def __post_init__(self) -> None:
        kinds = [stat.kind for stat in self.stats]
        if len(set(kinds)) < len(kinds):
            raise TypeError("a pass can ask for one statistic of a kind")

    @property
    def data(self) -> bool:
        """Whether calibration data is needed."""
        return self.calibration or bool(self.stats)


@dataclass(frozen=True)
class Site:
    """What a pass did, or would do, at one place."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float | None = None
    rel_l2: float | None = None
    """Relative Frobenius error of the weight; ``None`` where it is unchanged or not known."""
    note: str = ""
    """What a person should know about this site, such as too little data."""
    sparsity: float | None = None
    """Share of zeros in the weight, where the pass makes them."""


@dataclass
class PassResult:
    """What a pass did: its sites, the refusals with reasons, remarks for the report."""

    sites: list[Site] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    edits: int = 0
    """Rewrites that have no site of their own (cleaning, folding)."""
    narrowing: Narrowing | None = None
    """Of a pass that ``narrows``: how the case that it left is the graph before."""
    shortened: bool = False
    """Whether outputs have fewer positions than before: the last ones are then compared."""

    @property
    def changed(self) -> bool:
        return bool(self.sites or self.edits)


Group = tuple[str, ...]
"""Names of linears that are fitted as one, in the order of the graph: they hold one weight."""


class Gatherer(Protocol):
    """What gathers the statistics that a pass asks for: see ``learning.Learning``."""

    def at_linears(
        self, context: Context, needs: Needs, groups: Sequence[Group],
        done: Callable[[Group, Statistics], None], compressed: Mapping[str, Compressed],
    ) -> None:
        """Call ``done`` with the statistics of each group of linears."""  # fmt: skip

    def at_units(
        self, context: Context, stats: Sequence[Stat], units: Sequence[Unit],
        more: Sequence[Mapping[str, torch.Tensor]] = (),
    ) -> dict[Stat, list[Statistics]]:
        """The statistics of each run of blocks, or of halves of them, by its first one; on ``more``
        than the calibration data, where it is given."""  # fmt: skip

    def graph_before_weights_changed(self) -> View | None:
        """The graph that ``propagate="dense"`` learns from, where one is kept."""


class Context:
    """The graph a pass edits, its structure, and where new weights go."""

    def __init__(
        self, view: View, *, step: int = 0, spool: Spool | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        calibration: Sequence[Mapping[str, torch.Tensor]] = (), original: View | None = None,
        checkpoints: CheckpointStore | None = None, learning: Gatherer | None = None,
        structure: Structure | None = None, original_keys: Mapping[str, Hashable] | None = None,
    ) -> None:  # fmt: skip
        self.view = view
        self.calibration = calibration
        self.original = original
        """The canonical source graph, as before the first pass, or behind the last one that made
        another model of it; of a source that was compressed from another model, that model.
        ``None`` is ``view`` itself."""
        self.original_keys = original_keys
        """Of a source that was compressed from another model, which ``original`` then is: the keys
        of the weights that are that model's own, by linear. ``None`` for any other source."""
        self.planned: dict[str, Site] = {}
        """In a forecast: the sites that earlier passes would have changed, by name."""
        self.step = step
        self.learning = learning
        """How statistics are gathered; there is none in a forecast."""
        self.spool = spool or Spool()
        self._progress = progress
        self._checkpoints = checkpoints
        self._structure = structure
        self._wholes: Mapping[str, Whole] | None = None

    @property
    def structure(self) -> Structure:
        """What is recognised in the graph as it now is; computed once until ``edited``."""
        if self._structure is None:
            self._structure = recognize(self.view)
        return self._structure

    @property
    def wholes(self) -> Mapping[str, Whole]:
        """The linears as the source has them, by name; computed once until ``edited``."""
        if self._wholes is None:
            self._wholes = wholes(self.structure)
        return self._wholes

    @cached_property
    def original_linears(self) -> Mapping[str, Linear]:
        """The linears of the source graph by name."""
        structure = recognize(self.original) if self.original is not None else self.structure
        return named_linears(structure)

    def original_weight(self, linear: Linear) -> Weight:
        """What the source graph holds at the linear of this name."""
        source = self.original_linears[linear.name]
        weight = (self.original or self.view).weight(source.weight)
        assert weight is not None
        return weight

    def edited(self) -> None:
        """Forget the structure: the graph has changed."""
        self._structure = self._wholes = None

    def references(self) -> list[View]:
        """The graphs that later passes compare weights with, or learn from, beside ``view``."""
        dense = None if self.learning is None else self.learning.graph_before_weights_changed()
        return [graph for graph in (self.original, dense) if graph is not None]

    def in_all_graphs(self, change: Callable[[View, Structure], None]) -> None:
        """Make an exact change in ``view`` and in its ``references`` alike.

        After it values are in other units, or in another basis; a gap to the source's weights is
        one of weights in the same units.
        """
        change(self.view, self.structure)
        self.edited()
        if self.original is not None:
            self.original = self.original.copy()
            self.__dict__.pop("original_linears", None)
        for graph in self.references():
            change(graph, recognize(graph))

    def once(self, what: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, or gave in an earlier, killed run: wrap what takes long in it.

        The result is made of tensors, numbers, text, ``None``, and lists and dicts of these;
        ``what`` names it within the pass.
        """
        return remembered(self._checkpoints, f"{self.step}: {what}", make)

    def remembers(self, what: str) -> bool:
        """Whether ``once`` would give what an earlier, killed run computed."""
        return is_remembered(self._checkpoints, f"{self.step}: {what}")

    def progress(self, what: str, done: int, total: int) -> None:
        """Tell the person how far a long loop has come."""
        if self._progress is not None:
            self._progress(what, done, total)


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """Base of a pass. Subclasses add options as fields and say what they are in class variables.

    ``optional`` lets the pass match nothing; ``max_error`` bounds the relative L2 that it may move
    any output by, against the graph before the pass.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    needs: ClassVar[Needs] = Needs()
    provides: ClassVar[tuple[str, ...]] = ()
    """What it leaves behind: ``STORED``, ``MASKED``, ``CHANGED``, ``COMPENSATED``, ``TOKENS``,
    ``BLOCKS``, or words of its own. ``rules`` are made of these."""
    excludes: ClassVar[tuple[str, ...]] = ()
    """What no earlier pass may have left at all of its sites."""
    follows: ClassVar[tuple[str, ...]] = ()
    """What earlier passes must have left at some of its sites."""
    narrows: ClassVar[bool] = False
    """Whether it makes a special case of the model, with fewer inputs or outputs: what follows is
    held against that case of the source."""
    rebases: ClassVar[bool] = False
    """Whether values are in other units behind it (``Context.in_all_graphs``): statistics that were
    taken before do not fit."""
    fits_together: ClassVar[bool] = False
    """Whether weights of several linears are fitted together, to what comes out behind them: the
    error of one makes up for that of another."""
    widened: ClassVar[bool] = False
    """Whether it stores codes that a runtime makes floats of again in each run."""
    optional: bool = False
    """It is not an error if the pass finds nothing to do."""
    max_error: float | None = None
    """Most that an output may move, in relative L2."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.max_error is not None and not self.max_error > 0:
            raise BadInput(f"{self.name}: max_error={self.max_error} must be above 0")

    def requires(self) -> Needs:
        """What this pass needs with the options that it has."""
        return self.needs

    def settled(self, target: Target) -> Pass:
        """The pass with what it leaves open as an artifact for ``target`` wants it."""
        return self

    @abstractmethod
    def run(self, context: Context) -> PassResult:
        """Edit ``context.view`` in place and say what was done."""

    @abstractmethod
    def plan(self, context: Context) -> PassResult:
        """What ``run`` would do, from shapes alone: no weight is read, nothing is changed."""

    def seconds(self, planned: PassResult) -> float:
        """A rough forecast of the time that ``run`` takes for what was planned."""
        return 0.0

    def peak_bytes(self, planned: PassResult) -> int:
        """Working memory that ``run`` needs beyond the graph itself."""
        return 0

    def selects(self) -> tuple[Any, ...]:
        """The options that choose sites; equal tuples choose the same sites."""
        return tuple(getattr(self, f.name) for f in fields(self) if f.name in _SELECTORS)


def named_linears(structure: Structure) -> dict[str, Linear]:
    """The linears of a structure by name."""
    return {linear.name: linear for linear in structure.linears}


_SELECTORS = ("include", "exclude", "kinds", "min_size")


def select_linears(
    linears: Sequence[Linear],
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    kinds: tuple[str, ...] = (),
    min_size: int = 0,
) -> list[Linear]:
    """The linears whose name matches a glob of ``include`` (all, if empty) and none of ``exclude``.

    ``kinds`` are roles (``q``, ``up``, ``head``, ...); ``min_size`` is the least number of weights.
    Raises ``BadInput`` where a glob or kind matches no linear at all: it is a typing error.
    """
    names = [site.name for site in linears]
    for option, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                raise BadInput(f"{option}={glob} matches no site; {near_misses(glob, names)}")
    roles = {site.role for site in linears if site.role}
    for kind in kinds:
        if kind not in roles:
            raise BadInput(f"kinds={kind} matches no site; {near_misses(kind, roles)}")
    return [
        site
        for site in linears
        if (not include or any(fnmatchcase(site.name, g) for g in include))
        and not any(fnmatchcase(site.name, g) for g in exclude)
        and (not kinds or site.role in kinds)
        and site.in_features * site.out_features >= min_size
    ]
