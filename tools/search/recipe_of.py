"""A choice as a recipe: passes that the normal pipeline runs, and that replay without a search."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...ir.moves import Path as BlockPath
from ...ir.structure.units import Unit
from ...ir.vocab.targets import Target
from ...passes.base import Pass
from ...passes.exact.clean import Clean
from ...passes.recipe import Recipe
from ...passes.tokens.token_pass import KeepPass
from ...passes.weights.flap import FLAP
from ...passes.weights.quantize import Quantize
from ...passes.weights.quantize_cache import QuantizeCache
from .forms import NO_PATH, Form, Path
from .healing import followed
from .problem import Choice

NO_LINEAR = 1 << 60
"""A least number of weights that no linear has: the pass stores tables alone."""


@dataclass(frozen=True)
class Held:
    """What linears that share a weight hold."""

    names: tuple[str, ...]
    form: Form | None = None
    """``None``: what the source has."""
    path: Path = NO_PATH
    gone: float = 0.0
    """Share of its rows or columns that went with heads or units."""

    @property
    def plain(self) -> Held:
        """The same, as all rows and columns hold it."""
        return replace(self, gone=0.0)

    def __str__(self) -> str:
        return " + ".join(filter(None, (str(self.form or ""), str(self.path)))) or "kept"


@dataclass(frozen=True)
class HeldTables:
    """What the tables of embeddings hold, and the heads that are tied to them."""

    bits: Literal[4, 8] | None = None
    group: int = 32

    def pass_(self, target: Target) -> Pass:
        """Raises ``AssertionError`` where they are kept."""
        assert self.bits is not None
        return Quantize(
            bits=self.bits, group=self.group, embeddings=self.bits, min_size=NO_LINEAR
        ).settled(target)

    def __str__(self) -> str:
        return "kept" if self.bits is None else f"tables {self.bits}/{self.group}"


@dataclass(frozen=True)
class HeldCache:
    """How keys and values are kept."""

    bits: Literal[4, 8] | None = None
    """``None``: as the source keeps them."""

    def pass_(self) -> QuantizeCache:
        """Raises ``AssertionError`` where they are kept as they are."""
        assert self.bits is not None
        return QuantizeCache(bits=self.bits)

    def __str__(self) -> str:
        return "cache kept" if self.bits is None else f"cache in {self.bits} bits"


@dataclass(frozen=True)
class Thinned:
    """What an attention or a feed-forward holds: all its heads or units, or but for a share."""

    sink: str
    """The linear that takes them up."""
    kind: Literal["heads", "units"]
    gone: float = 0.0

    def __str__(self) -> str:
        return f"{100 * self.gone:g}% of {self.kind} gone" if self.gone else f"all {self.kind}"


@dataclass(frozen=True)
class Cut:
    """What drops image tokens."""

    by: KeepPass | None = None

    def __str__(self) -> str:
        return "all image tokens" if self.by is None else f"{self.by.name} {self.by.keep}"


def recipe_of(
    choice: Choice, target: Target, units: Sequence[Unit] = (), *, heal: bool = True
) -> Recipe:
    """The passes of a choice in the order in which they compose: tokens, depth, heads, bits, ranks,
    and the cache, whose scales are of the keys and values that the others leave.

    ``units`` are the halves of blocks, of which the choice may leave some out, healed or not.
    """
    held = [option.what for option in choice.chosen.values()]
    passes: list[Pass] = [Clean(optional=True)]
    passes += [what.by for what in held if isinstance(what, Cut) and what.by is not None]
    if choice.dropped:
        path = BlockPath.through(unit for unit in units if unit.name not in choice.dropped)
        passes.append(followed(path, heal=heal))
    passes += _thinning(held)
    forms = _sites(held, "form")
    passes += [form.pass_(forms[form], target) for form in sorted(forms, key=str)]
    tables = [what for what in held if isinstance(what, HeldTables) and what.bits]
    passes += [what.pass_(target) for what in tables]
    paths = _sites(held, "path")
    passes += [
        beside.pass_(paths[beside], target) for beside in sorted(paths, key=str) if beside.rank
    ]
    passes += [what.pass_() for what in held if isinstance(what, HeldCache) and what.bits]
    return Recipe.of(*passes)


def thinning(gone: float, sinks: Sequence[str] = ()) -> FLAP:
    """The pass that takes a share of the heads or units of some places, of all if none is named."""
    include = tuple(map(glob.escape, sinks))
    return FLAP(ratio=gone, across="place", include=include, repair="regression")


def _thinning(held: Sequence[Any]) -> list[Pass]:
    """One pass for each share that goes somewhere."""
    sinks: dict[float, list[str]] = {}
    for what in held:
        if isinstance(what, Thinned) and what.gone:
            sinks.setdefault(what.gone, []).append(what.sink)
    return [thinning(gone, sinks[gone]) for gone in sorted(sinks)]


def _sites(held: list[Any], part: str) -> Mapping[Any, list[str]]:
    """The names of linears by what they hold, in the order of the graph, as globs."""
    names: dict[Any, list[str]] = {}
    for what in held:
        if isinstance(what, Held) and what.form is not None:
            names.setdefault(getattr(what, part), []).extend(map(glob.escape, what.names))
    return names
