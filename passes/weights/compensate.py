"""Base of the passes that graft a low-rank path onto linears that earlier passes compressed."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import Node, Value, View, is_value
from ...ir.run.statistics import Statistics
from ...ir.structure.low_rank import FIRST, SECOND, wholes
from ...ir.structure.recognize import Linear, Structure
from ...ir.vocab import dense_weight
from ...ir.vocab.targets import Target
from ..base import CHANGED, COMPENSATED, Context, PassResult, Site, select_linears
from ..checkpoint_store import settled
from ..linear_pass import LinearPass, linear_site
from .factor_form import SHORT, FactorForm, graft_group
from .low_rank import Spectrum, allocate, fits_half

DEFAULT_RANK = 32
LEAST_ALIKE = 0.5
"""Cosine of a weight and of what was made of it, at least; signs alone have 0.8."""


@dataclass(frozen=True)
class Path:
    """The low-rank path of one linear."""

    down: Tensor
    """A ``[rank, in]`` f32."""
    up: Tensor
    """B ``[out, rank]`` f32."""
    gap: float
    """Relative error of the linear's output without the path, as the method measures it."""
    left: float
    """The same with the path."""
    rel_l2: float
    """Relative Frobenius error of the weight that is left, the path stored as ``factors`` says."""
    wide_rel_l2: float
    """The same with the path in float32."""
    tokens: int | None
    """Calibration tokens that it was fitted to; ``None`` where it was fitted to weights alone."""
    asked: int
    """The rank that was asked for; the gap may have a lower one."""

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def note(self) -> str:
        """What a reader of its site should know."""
        fewer = self.rank < min(self.asked, len(self.up), self.down.shape[1])
        rank = f"rank {self.rank} of {self.asked}: the gap has no more" if fewer else ""
        return "; ".join(filter(None, (rank, _SHORT if self.short else "")))

    @property
    def short(self) -> bool:
        """Whether fewer tokens were seen than the inputs have features."""
        return self.tokens is not None and self.tokens < self.down.shape[1]


@dataclass(frozen=True, kw_only=True)
class Compensate(LinearPass):
    """Base: ``y = f(W^, x) + B (A x)`` for each chosen linear, W^ being what it now holds.

    ``rank`` is the rank of every site (32 unless given), or with ``budget`` the most that one site
    may get. ``budget`` is the storage of all factors together in bits per weight of the chosen
    linears, spent where it removes most error (``low_rank.allocate``). Linears with one input (q, k
    and v; gate and up) share one stacked A. Factors are stored as ``factors`` says; ``float16`` is
    widened where a factor does not fit. With ``factor_bits`` they are stored as ``quantize`` stores
    weights, in groups of up to 32 (INT2.1's form, Chai et al. 2023, arXiv 2306.08162, in closed
    form instead of training), and ``accuracy_level`` is that of ``quantize``: as the target likes
    it, or 0. At rank 32 beside 4 bits in groups of 32, a decoder of Qwen2-0.5B's shape takes for a
    token, by its factors: in float16 1.20 to 1.25 times as long, in 8 bits 1.14 to 1.15, in 4 bits
    1.07 to 1.12, in 8 bits with ``accuracy_level=0`` 2.0 (``bench.path_cost``, ONNX Runtime 1.31,
    one AVX-512 core; the artifact 1.12, 1.07 and 1.04 times as large). ``include``, ``exclude``,
    ``kinds`` and ``min_size`` choose sites as in the quantizing passes.
    """

    provides: ClassVar[tuple[str, ...]] = (COMPENSATED,)
    excludes: ClassVar[tuple[str, ...]] = (COMPENSATED,)
    follows: ClassVar[tuple[str, ...]] = (CHANGED,)
    rank: int | None = None
    """Rank of each path (32); with a budget the most."""
    budget: float | None = None
    """Bits per weight of all paths, put where they help."""
    factors: Literal["float16", "float32"] = "float16"
    """In what the paths are stored."""
    factor_bits: Literal[4, 8] | None = None
    """Bits of the paths, stored as by quantize."""
    accuracy_level: Literal[0, 4] | None = None
    """4: few bits computed in 8 bits, 0: in floats."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 0:
            raise BadInput(f"{self.name}: rank={self.rank} must not be negative")
        if self.budget is not None and not self.budget > 0:
            raise BadInput(f"{self.name}: budget={self.budget} must be above 0 bits per weight")
        if self.accuracy_level is not None and self.factor_bits is None:
            raise BadInput(f"{self.name}: accuracy_level= is for factors of few bits: factor_bits=")

    def settled(self, target: Target) -> Compensate:
        if self.factor_bits is None or self.accuracy_level is not None:
            return self
        level = target.level(self.factor_bits, SHORT)
        return replace(self, accuracy_level=4) if level == 4 else self

    @abstractmethod
    def spectrum(
        self, source: Tensor, gap: Tensor, statistics: Statistics, rank: int | None
    ) -> Spectrum:
        """The spectrum of a linear's gap ``[out, in]`` f32; ``source`` is the dense weight.

        With ``rank`` so many singular values and vectors are enough.
        """

    # --- the pass ----------------------------------------------------------------------------

    def select(self, structure: Structure) -> list[Linear]:
        """As the source has them: two that were made of one are that one."""
        linears = [whole.linear for whole in wholes(structure).values()]
        return select_linears(
            linears,
            include=self.include, exclude=self.exclude, kinds=self.kinds, min_size=self.min_size,
        )  # fmt: skip

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        chosen = self.choose(context, result)
        if chosen:
            paths = self._paths(context, chosen, self._ranks(context, chosen))
            self._attach(context, chosen, paths, result)
            sources = {x.name: context.original_weight(x).nbytes for x in chosen}
            _say_break_even(result, sources)
        context.edited()
        return result

    def reason_against(self, context: Context, linear: Linear) -> str | None:
        view, original = context.view, context.original_linears.get(linear.name)
        if original is None:
            return "the source model has no linear of this name to compare with"
        source = context.original or view
        now, then = view.weight(linear.weight), source.weight(original.weight)
        if now is None or then is None:
            return "its weight is not a constant"
        if source.op(original.node) != "linear":  # codes, as a checkpoint of gpt-oss has for some
            return _UNTOUCHED if now.key == then.key else "the source itself stores it in few bits"
        original_key = (context.original_keys or {}).get(linear.name, then.key)
        if view.op(linear.node) == "linear" and now.key in (then.key, original_key):
            return _UNTOUCHED
        if any(is_low_rank(view, node) for node in _chain(view, linear)):
            return "a low-rank path compensates it already"
        return None

    def foreseen(self, context: Context, changed: Container[str]) -> list[Linear]:
        def fits(linear: Linear) -> bool:
            reason = self.reason_against(context, linear)
            return reason is None or (reason is _UNTOUCHED and linear.name in changed)

        return [linear for linear in self.select(context.structure) if fits(linear)]

    def key(self, view: View, linear: Linear) -> Hashable:
        """A path belongs to a linear, not to a weight: each sees inputs of its own."""
        return linear.name

    def gap(self, context: Context, linear: Linear) -> tuple[Tensor, Tensor]:
        """The source model's weight, and that less what the graph computes: ``[out, in]`` f32."""
        source = context.original_weight(linear).read().float()
        gap = source - context.wholes[linear.name].matrix(context.view)
        for side in _chain(context.view, linear):
            gap -= dense_weight(context.view, side)
        if context.original_keys is not None:
            _check_kin(linear.name, source, gap)
        return source, gap

    def _ranks(self, context: Context, linears: Sequence[Linear]) -> dict[str, int]:
        """The rank of each linear. With a budget they depend on all spectra, and what a later
        linear sees may depend on the ranks: a first sweep without paths chooses them."""
        if self.budget is None:
            return {x.name: min(self.top_rank, *_shape(x)) for x in linears}

        def fit(linear: Linear, statistics: Statistics) -> dict[str, Any]:
            def values() -> dict[str, Any]:
                spectrum = self.spectrum(*self.gap(context, linear), statistics, self.rank)
                return {"sigma": spectrum.sigma, "energy": spectrum.energy}

            return context.once(f"spectrum {linear.name}", values)

        spectra = self.fit_all(context, linears, fit, what="spectra")
        none = torch.empty(0)
        by_name = {name: Spectrum(none, none, **fields) for name, fields in spectra.items()}
        sizes = {x.name: _shape(x) for x in linears}
        entries = int(self.budget * sum(m * n for m, n in sizes.values()) / (8 * self._width))
        ranks = allocate(by_name, sizes, entries, self.rank)
        if not any(ranks.values()):
            raise BadInput(
                f"{self.name}: budget={self.budget} bits per weight buys no rank at any site; one "
                f"rank of the smallest costs {min(map(sum, sizes.values())) * self._width} bytes"
            )
        return ranks

    def _paths(
        self, context: Context, linears: Sequence[Linear], ranks: Mapping[str, int]
    ) -> dict[str, Path]:
        def fit(linear: Linear, statistics: Statistics) -> Path:
            def path() -> dict[str, Any]:
                source, gap = self.gap(context, linear)
                spectrum = self.spectrum(source, gap, statistics, ranks[linear.name])
                return vars(self._path(source, gap, spectrum, ranks[linear.name]))

            return Path(**context.once(f"site {linear.name}", path))

        def outputs(linear: Linear, path: Path, x: Tensor, y: Tensor) -> Tensor:
            return y + ((x.float() @ path.down.T) @ path.up.T).to(y.dtype) if path.rank else y

        on_the_way = self.requires().propagate == "compensated"
        return self.fit_all(context, linears, fit, outputs if on_the_way else None)

    def _path(self, source: Tensor, gap: Tensor, spectrum: Spectrum, asked: int) -> Path:
        rank = min(asked, len(spectrum.sigma))
        form = self._planned_form
        factors = form.even(*spectrum.factors(rank))
        down, up = settled([form.rounded(factor) for factor in factors])
        norm = torch.linalg.norm(source)

        def error(dtype: torch.dtype) -> float:
            product = up.to(dtype).float() @ down.to(dtype).float()
            return float(torch.linalg.norm(gap - product) / norm)

        wide = error(torch.float32)
        half = self.factors == "float16" and fits_half(down, up)
        rel_l2 = error(torch.float16) if half else wide
        before, after = spectrum.relative_error(0), spectrum.relative_error(rank)
        return Path(down, up, before, after, rel_l2, wide, spectrum.tokens, asked)

    # --- grafting ----------------------------------------------------------------------------

    def _attach(
        self, context: Context, linears: Sequence[Linear], paths: Mapping[str, Path],
        result: PassResult,
    ) -> None:  # fmt: skip
        """Graft the paths, one A for all linears of one input."""
        groups: dict[Value, list[Linear]] = {}
        for linear in linears:
            if paths[linear.name].rank:
                x = context.wholes[linear.name].input(context.view)
                groups.setdefault(x, []).append(linear)
        for x, members in groups.items():
            self._attach_group(context, x, members, paths, result)
        before = sum(path.gap for path in paths.values()) / len(paths)
        after = sum(path.left for path in paths.values()) / len(paths)
        result.notes.append(
            f"mean relative error of the linears' outputs: {before:.4g}, compensated {after:.4g}"
            + ("" if self.factor_bits is None else ", before the factors are rounded")
        )
        none = [x.name for x in linears if not paths[x.name].rank and paths[x.name].asked]
        if none:
            result.notes.append(f"no path for {', '.join(none)}: there is no gap to compensate")
        short = [x for x in linears if paths[x.name].short]
        if short:
            result.notes.append(
                f"too little calibration data for {len(short)} sites: "
                f"{paths[short[0].name].tokens} tokens, and up to "
                f"{max(linear.in_features for linear in short)} inputs. The paths are chosen by "
                "what the tokens span there; these sites are marked"
            )

    def _attach_group(
        self, context: Context, x: Value, members: Sequence[Linear], paths: Mapping[str, Path],
        result: PassResult,
    ) -> None:  # fmt: skip
        chosen = [paths[linear.name] for linear in members]
        dtype = context.view.type(x).dtype or torch.float32
        half = self.factors == "float16" and all(fits_half(p.down, p.up) for p in chosen)
        form = replace(self._planned_form, dtype=torch.float16 if half else dtype)
        sizes = {linear.name: _stored_bytes(context, linear) for linear in members}
        factors = [(p.down, p.up) for p in chosen]
        extras = graft_group(context, members, factors, form, self.name)
        for linear, path, extra in zip(members, chosen, extras, strict=True):
            size = sizes[linear.name]
            error = path.rel_l2 if half else path.wide_rel_l2
            result.sites.append(linear_site(linear, size, size + extra, error, note=path.note))

    # --- forecast ----------------------------------------------------------------------------

    def plan(self, context: Context) -> PassResult:
        result = PassResult()
        chosen = self.select(context.structure)
        for linear in chosen:
            if linear.name in context.planned:
                result.sites.append(self.planned_site(context, linear))
            else:
                result.refused.append((linear.name, _UNTOUCHED))
        sources = {}
        for linear in chosen:
            weight = context.view.weight(linear.weight)
            if weight is not None:
                sources[linear.name] = math.prod(_shape(linear)) * weight.dtype.itemsize
        _say_break_even(result, sources)
        return result

    def planned_site(self, context: Context, linear: Linear) -> Site:
        factors = [context.planned.get(linear.name + end) for end in (FIRST, SECOND)]
        parts = [part for part in factors if part] or [context.planned[linear.name]]
        before = sum(part.bytes_after for part in parts)
        form, rank = self._planned_form, self._planned_rank(linear)
        extra = form.nbytes(rank, linear.in_features) + form.nbytes(linear.out_features, rank)
        return linear_site(linear, before, before + (extra if rank else 0))

    def _planned_rank(self, linear: Linear) -> int:
        m, n = _shape(linear)
        if self.budget is None:
            return min(self.top_rank, m, n)
        even = int(self.budget * m * n / (8 * self._width * (m + n)))
        return min(even, m, n, *(() if self.rank is None else (self.rank,)))

    @property
    def top_rank(self) -> int:
        """The rank of a site, where no budget says otherwise."""
        return DEFAULT_RANK if self.rank is None else self.rank

    @property
    def _planned_form(self) -> FactorForm:
        wide = torch.float16 if self.factors == "float16" else torch.float32
        return FactorForm(self.factor_bits, wide, self.accuracy_level or 0)

    @property
    def _width(self) -> float:
        """Bytes of one number of a factor."""
        return self._planned_form.width


def _check_kin(name: str, source: Tensor, gap: Tensor) -> None:
    """Raise ``BadInput`` for an original that is another model: ``gap`` is to its ``source``."""
    now = source - gap
    size = float(torch.linalg.norm(source) * torch.linalg.norm(now))
    alike = float((source * now).sum()) / size if size else 1.0
    if alike < LEAST_ALIKE:
        raise BadInput(
            f"the original's weight of {name} is that of another model, or in another basis: its "
            f"cosine with the source's is {alike:.2f}. Give the model that the source was "
            "quantized from"
        )


def _shape(linear: Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _say_break_even(result: PassResult, sources: Mapping[str, int]) -> None:
    """Note the sites that take as many bytes as the source's own weights, which have no error."""
    above = [s for s in result.sites if s.bytes_after >= sources.get(s.name, s.bytes_after + 1)]
    if above:
        site = above[0]
        result.notes.append(
            f"above break-even at {len(above)} of {len(result.sites)} sites: with its path a site "
            f"takes no fewer bytes than the source's weight did ({site.name}: {site.bytes_after} "
            f"to {sources[site.name]}). Choose a lower rank, or leave those sites as they were"
        )


_UNTOUCHED = "its weight is the source's own: there is nothing to compensate"


_SHORT = "fewer calibration tokens than inputs: chosen by what they span"


def _stored_bytes(context: Context, linear: Linear) -> int:
    view = context.view
    nodes = [*context.wholes[linear.name].nodes, *_chain(view, linear)]
    operands = [o for node in nodes for o in view.operands(node)[1:] if o is not linear.bias]
    handles = [view.weight(o) for o in operands]
    return sum(h.stored_bytes for h in handles if h is not None)


def _chain(view: View, linear: Linear) -> list[Node]:
    """The side paths that are added to a linear's result, one after another."""
    paths: list[Node] = []
    value = linear.out
    while len(users := view.users(value)) == 1 and view.op(users[0]) == "add":
        others = [o for o in view.operands(users[0]) if o is not value]
        other = others[0] if len(others) == 1 else None
        side = view.producer(other) if is_value(other) else None
        if side is None or not (is_low_rank(view, side) or view.op(side) == "sparse_linear"):
            break
        paths.append(side)
        value = view.results(users[0])[0]
    return paths


_FACTORS = ("linear", "linear_nbit")
_DOWN = re.compile(r"\.down(\.codes)?(_\d+)?(\.T)?(_\d+)?$")
"""How the name of a path's first factor ends, in either graph: not that of a ``down_proj``."""


def is_low_rank(view: View, node: Node) -> bool:
    """Whether a node is the second linear of a low-rank path, behind a cut or not."""
    if view.op(node) not in _FACTORS or _constant(view, view.tensor(node, 1)) is None:
        return False
    inner = view.producer(view.tensor(node))
    if inner is not None and view.op(inner) == "slice":
        inner = view.producer(view.tensor(inner))
    if inner is None or view.op(inner) not in _FACTORS:
        return False
    narrow = _constant(view, view.tensor(inner, 1))
    return narrow is not None and _DOWN.search(view.name(narrow)) is not None


def _constant(view: View, value: Value) -> Value | None:
    """The weight behind a value, through a cast."""
    if view.weight(value) is not None:
        return value
    node = view.producer(value)
    if node is None or view.op(node) != "cast":
        return None
    inner = view.tensor(node)
    return inner if view.weight(inner) is not None else None
