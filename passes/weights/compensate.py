"""Base of the passes that graft a low-rank path onto linears that earlier passes compressed."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import Node, Value, View
from ...ir.core.weights import Weight
from ...ir.moves import graft_low_rank
from ...ir.structure.recognize import Linear
from ..base import COMPENSATED, STORED, Context, Pass, PassResult, Site, select_linears
from .low_rank import Spectrum, allocate, fits_half, stacked

ROWS = 1024
"""Rows of the identity that a compressed linear is run on at once, to read what matrix it is."""
DEFAULT_RANK = 32


@dataclass(frozen=True)
class Target:
    """A compressed linear and what it was. Its matrices are read when they are asked for: those of
    all targets together would be the whole model, twice, in float32."""

    linear: Linear
    """Where its inputs are seen: in the graph, or in the source graph."""
    now: Linear
    """The linear in the graph."""
    view: View
    weight: Weight
    """Of the source model."""

    def read(self) -> tuple[Tensor, Tensor]:
        """The source model's weight, and that less what the graph computes: ``[out, in]`` f32."""
        source = self.weight.read().float()
        return source, source - effective_weight(self.view, self.now)


@dataclass(frozen=True, kw_only=True)
class Compensate(Pass):
    """Base: ``y = f(W^, x) + B (A x)`` for each chosen linear, W^ being what it now holds.

    ``rank`` is the rank of every site (32 unless given), or with ``budget`` the most that one site
    may get. ``budget`` is the storage of all factors together in bits per weight of the chosen
    linears, spent where it removes most error (``low_rank.allocate``). Linears with one input (q, k
    and v; gate and up) share one stacked A. Factors are stored as ``factors`` says; ``float16`` is
    widened where a factor does not fit. ``include``, ``exclude``, ``kinds`` and ``min_size`` choose
    sites as in the quantizing passes.
    """

    exact: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = (COMPENSATED,)
    excludes: ClassVar[tuple[str, ...]] = (COMPENSATED,)
    follows: ClassVar[tuple[str, ...]] = (STORED,)
    rank: int | None = None
    budget: float | None = None
    factors: Literal["float16", "float32"] = "float16"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    min_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 0:
            raise BadInput(f"{self.name}: rank={self.rank} must not be negative")
        if self.budget is not None and not self.budget > 0:
            raise BadInput(f"{self.name}: budget={self.budget} must be above 0 bits per weight")
        if self.min_size < 0:
            raise BadInput(f"{self.name}: min_size={self.min_size} must not be negative")

    @abstractmethod
    def fit(
        self, context: Context, targets: Sequence[Target]
    ) -> tuple[dict[str, Spectrum], dict[str, int]]:
        """The spectrum of each target's gap, and its rank, by name."""

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        targets = self._targets(context, result)
        if targets:
            fitted = context.once("fit", lambda: self._fitted(context, targets))
            found = {name: Spectrum(**fields) for name, fields in fitted["spectra"].items()}
            self.attach(context, targets, found, fitted["ranks"], result)
            _say_break_even(result, {t.linear.name: t.weight.nbytes for t in targets})
        context.edited()
        return result

    def _fitted(self, context: Context, targets: Sequence[Target]) -> dict[str, Any]:
        found, ranks = self.fit(context, targets)
        return {"spectra": {n: s.cut(ranks[n]) for n, s in found.items()}, "ranks": ranks}

    def plan(self, context: Context) -> PassResult:
        result = PassResult()
        chosen = self._select(context)
        for linear in chosen:
            before = context.planned.get(linear.name)
            if before is None:
                result.refused.append((linear.name, _UNTOUCHED))
                continue
            numbers = self._planned_rank(linear) * (linear.in_features + linear.out_features)
            size = before.bytes_after + numbers * self._width
            result.sites.append(_site(linear, before.bytes_after, size, None))
        weights = {x.name: context.view.weight(x.weight) for x in chosen}
        _say_break_even(result, {name: w.nbytes for name, w in weights.items() if w is not None})
        return result

    def _planned_rank(self, linear: Linear) -> int:
        m, n = linear.out_features, linear.in_features
        if self.budget is None:
            return min(self.top_rank, m, n)
        even = int(self.budget * m * n / (8 * self._width * (m + n)))
        return min(even, m, n, *(() if self.rank is None else (self.rank,)))

    @property
    def top_rank(self) -> int:
        """The rank of a site, where no budget says otherwise."""
        return DEFAULT_RANK if self.rank is None else self.rank

    @property
    def _width(self) -> int:
        return 2 if self.factors == "float16" else 4

    # --- sites -------------------------------------------------------------------------------

    def _select(self, context: Context) -> list[Linear]:
        return select_linears(
            context.structure.linears,
            include=self.include, exclude=self.exclude, kinds=self.kinds, min_size=self.min_size,
        )  # fmt: skip

    def _targets(self, context: Context, result: PassResult) -> list[Target]:
        found = []
        for linear in self._select(context):
            reason = self._reason_against(context, linear)
            if reason is not None:
                result.refused.append((linear.name, reason))
                continue
            original = context.original_linears[linear.name]
            weight = (context.original or context.view).weight(original.weight)
            assert weight is not None
            found.append(Target(linear, linear, context.view, weight))
        return found

    def _reason_against(self, context: Context, linear: Linear) -> str | None:
        view, original = context.view, context.original_linears.get(linear.name)
        if original is None:
            return "the source model has no linear of this name to compare with"
        now, then = view.weight(linear.weight), (context.original or view).weight(original.weight)
        if now is None or then is None:
            return "its weight is not a constant"
        if view.op(linear.node) == "linear" and now.key == then.key:
            return _UNTOUCHED
        if any(is_low_rank(view, node) for node in _chain(view, linear)):
            return "a low-rank path compensates it already"
        return None

    # --- ranks and factors -------------------------------------------------------------------

    def ranks(self, targets: Sequence[Target], found: dict[str, Spectrum]) -> dict[str, int]:
        """The rank of each target."""
        sizes = {t.linear.name: (t.linear.out_features, t.linear.in_features) for t in targets}
        if self.budget is None:
            return {name: min(self.top_rank, len(found[name].sigma)) for name in sizes}
        weights = sum(m * n for m, n in sizes.values())
        entries = int(self.budget * weights / (8 * self._width))
        ranks = allocate(found, sizes, entries, self.rank)
        if not any(ranks.values()):
            raise BadInput(
                f"{self.name}: budget={self.budget} bits per weight buys no rank at any site; one "
                f"rank of the smallest costs {min(map(sum, sizes.values())) * self._width} bytes"
            )
        return ranks

    def attach(
        self, context: Context, targets: Sequence[Target], found: dict[str, Spectrum],
        ranks: dict[str, int], result: PassResult,
    ) -> None:  # fmt: skip
        """Graft the paths, one A for all linears of one input."""
        groups: dict[Value, list[Target]] = {}
        for target in targets:
            if ranks[target.linear.name]:
                x = context.view.operands(target.linear.node)[0]
                groups.setdefault(x, []).append(target)
        before = after = 0.0
        for target in targets:
            name = target.linear.name
            before += found[name].relative_error(0) / len(targets)
            after += found[name].relative_error(ranks[name]) / len(targets)
        for x, members in groups.items():
            self._attach_group(context, x, members, found, ranks, result)
        result.notes.append(
            f"mean relative error of the linears' outputs: {before:.4g}, compensated {after:.4g}"
        )
        short = [t.linear for t in targets if found[t.linear.name].short]
        if short:
            result.notes.append(
                f"too little calibration data for {len(short)} sites: "
                f"{found[short[0].name].tokens} tokens, and up to "
                f"{max(linear.in_features for linear in short)} inputs. The inverse is truncated "
                "to what the tokens span there; these sites are marked"
            )

    def _attach_group(
        self, context: Context, x: Value, members: Sequence[Target], found: dict[str, Spectrum],
        ranks: dict[str, int], result: PassResult,
    ) -> None:  # fmt: skip
        pairs = [found[t.linear.name].factors(ranks[t.linear.name]) for t in members]
        downs, ups = [p[0] for p in pairs], [p[1] for p in pairs]
        dtype = context.view.type(x).dtype or torch.float32
        half = self.factors == "float16" and fits_half(*downs, *ups)
        stored = torch.float16 if half else dtype
        down = stacked(downs).to(stored)
        ups = [up.to(stored) for up in ups]
        errors = [
            _error(target, up.float() @ a.to(stored).float())
            for target, (a, _), up in zip(members, pairs, ups, strict=True)
        ]
        first = members[0].linear.name
        graft_low_rank(
            context.view, x, (f"{first}.{self.name}.down", context.spool.store(down)),
            [(t.linear.out, f"{t.linear.name}.{self.name}.up", context.spool.store(up))
             for t, up in zip(members, ups, strict=True)],
            rule=self.name, step=context.step,
        )  # fmt: skip
        for target, (a, _), up, error in zip(members, pairs, ups, errors, strict=True):
            extra = (up.numel() + a.numel()) * up.element_size()
            size = _stored_bytes(context.view, target.linear)
            note = _SHORT if found[target.linear.name].short else ""
            result.sites.append(_site(target.linear, size, size + extra, error, note))


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


def _error(target: Target, correction: Tensor) -> float:
    """What is left of the gap, by the source's weight: relative Frobenius norms."""
    source, gap = target.read()
    return float(torch.linalg.norm(gap - correction) / torch.linalg.norm(source))


_UNTOUCHED = "its weight is the source's own: there is nothing to compensate"


_SHORT = "fewer calibration tokens than inputs: truncated inverse"


def _site(
    linear: Linear, before: int, after: int, error: float | None, note: str = ""
) -> Site:
    shape = (linear.out_features, linear.in_features)
    return Site(
        name=linear.name, kind=linear.role or "linear", shape=shape, bytes_before=before,
        bytes_after=after, bits_per_weight=8 * after / (shape[0] * shape[1]), rel_l2=error,
        note=note,
    )  # fmt: skip


def _stored_bytes(view: View, linear: Linear) -> int:
    operands = [*view.operands(linear.node)[1:]]
    if linear.bias is not None:
        operands = [o for o in operands if o is not linear.bias]
    handles = [view.weight(o) for o in operands]
    for node in _chain(view, linear):
        handles += [view.weight(o) for o in view.operands(node)[1:]]
    return sum(h.nbytes for h in handles if h is not None)


def _chain(view: View, linear: Linear) -> list[Node]:
    """The side paths that are added to a linear's result, one after another."""
    found: list[Node] = []
    value = linear.out
    while len(users := view.users(value)) == 1 and view.op(users[0]) == "add":
        others = [o for o in view.operands(users[0]) if o is not value]
        side = view.producer(others[0]) if len(others) == 1 and not _number(others[0]) else None
        if side is None or not (is_low_rank(view, side) or view.op(side) == "sparse_linear"):
            break
        found.append(side)
        value = view.results(users[0])[0]
    return found


_DOWN = re.compile(r"\.down(_\d+)?(\.T)?(_\d+)?$")
"""How the name of a path's first factor ends, in either graph: not that of a ``down_proj``."""


def is_low_rank(view: View, node: Node) -> bool:
    """Whether a node is the second linear of a low-rank path, behind a cut or not."""
    if view.op(node) != "linear" or _constant(view, view.operands(node)[1]) is None:
        return False
    inner = view.producer(view.operands(node)[0])
    if inner is not None and view.op(inner) == "slice":
        inner = view.producer(view.operands(inner)[0])
    if inner is None or view.op(inner) != "linear":
        return False
    narrow = _constant(view, view.operands(inner)[1])
    return narrow is not None and _DOWN.search(view.name(narrow)) is not None


def _constant(view: View, value: Value) -> Value | None:
    """The weight behind a value, through a cast."""
    if view.weight(value) is not None:
        return value
    node = view.producer(value)
    if node is None or view.op(node) != "cast":
        return None
    inner = view.operands(node)[0]
    return inner if view.weight(inner) is not None else None


def _number(operand: Any) -> bool:
    return operand is None or isinstance(operand, int | float | bool)


def effective_weight(view: View, linear: Linear) -> Tensor:
    """What matrix ``[out, in]`` f32 a linear and its sparse path compute: run on the identity."""
    rows = []
    for start in range(0, linear.in_features, ROWS):
        count = min(ROWS, linear.in_features - start)
        eye = torch.zeros(count, linear.in_features)
        eye[torch.arange(count), torch.arange(start, start + count)] = 1
        given = eye.to(view.type(linear.x).dtype or torch.float32)
        total = _run(view, linear.node, given, skip=linear.bias)
        for side in _chain(view, linear):
            total = total + _run(view, side, given)
        rows.append(total.float())
    return torch.cat(rows).T.contiguous()


def _run(view: View, node: Node, x: Tensor, skip: Value | None = None) -> Tensor:
    given: list[Any] = []
    for argument in view.arguments(node):
        weight = view.weight(argument)
        if weight is None:
            given.append(x)
        else:
            tensor = weight.read()
            given.append(torch.zeros_like(tensor) if argument is skip else tensor)
    out: Tensor = view.execute(node, given)[0]
    return out
