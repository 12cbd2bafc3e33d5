"""Base of the passes that give linears other weights, other forms, or a path beside them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from ..ir.canonical.unread import unread_products
from ..ir.core.errors import BadInput, Refusal
from ..ir.core.view import View
from ..ir.core.weights import Weight
from ..ir.run.calibrate import Compressed
from ..ir.run.statistics import Statistics
from ..ir.run.sweep import Results
from ..ir.structure.recognize import Linear, Structure
from ..ir.structure.weights import readers
from .base import CHANGED, STORED, Context, Group, Pass, PassResult, Site, select_linears
from .stored import Shelved, Stored, reason_against_storing

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LinearPass(Pass):
    """Rewrite linears, each by what is fitted to it.

    ``include`` and ``exclude`` are globs on site names, ``kinds`` are roles (``q``, ``up``);
    ``min_size`` is the least number of weights of a matrix. A subclass says why a linear is refused
    (``reason_against``), which are fitted as one (``key``), and what its site will look like
    (``planned_site``); it fits them with ``fit_all`` and edits the graph.
    """

    exact: ClassVar[bool] = False
    include: tuple[str, ...] = ()
    """Globs of the sites to work on; all, if empty."""
    exclude: tuple[str, ...] = ()
    """Globs of the sites to leave alone."""
    kinds: tuple[str, ...] = ()
    """Roles to work on: q, k, v, o, gate, up, down, head."""
    min_size: int = 0
    """Leave matrices of fewer weights alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_size < 0:
            raise BadInput(f"{self.name}: min_size={self.min_size} must not be negative")

    # --- which linears -----------------------------------------------------------------------

    def select(self, structure: Structure) -> list[Linear]:
        """The linears that the options choose."""
        return select_linears(
            structure.linears,
            include=self.include, exclude=self.exclude, kinds=self.kinds, min_size=self.min_size,
        )  # fmt: skip

    @abstractmethod
    def reason_against(self, context: Context, linear: Linear) -> str | None:
        """Why a chosen linear is left as it is; ``None`` where it is not."""

    def choose(self, context: Context, result: PassResult) -> list[Linear]:
        """The linears that are rewritten; the others go into ``result`` with their reasons, and so
        do the products with a constant matrix that are no linears."""
        chosen = []
        for linear in self.select(context.structure):
            reason = self.reason_against(context, linear)
            if reason is None:
                chosen.append(linear)
            else:
                result.refused.append((linear.name, reason))
        result.refused += self._unread(context)
        return chosen

    def _unread(self, context: Context) -> list[tuple[str, str]]:
        """What the options would choose if it were a linear; it has no role."""
        if self.kinds:
            return []
        linears = {linear.node for linear in context.structure.linears}
        return [
            (product.name, product.reason)
            for product in unread_products(context.view, linears)
            if product.size >= self.min_size
            and any(fnmatchcase(product.name, glob) for glob in self.include or ("*",))
            and not any(fnmatchcase(product.name, glob) for glob in self.exclude)
        ]

    def foreseen(self, context: Context, changed: Container[str]) -> list[Linear]:
        """What ``choose`` will choose, as far as it can be told before the passes between have run:
        ``changed`` names the linears that these give other numbers."""
        linears = self.select(context.structure)
        return [linear for linear in linears if self.reason_against(context, linear) is None]

    def key(self, view: View, linear: Linear) -> Hashable:
        """Equal for linears that are fitted as one: here, those that hold one weight."""
        return weight_of(view, linear).key

    def groups(self, view: View, linears: Sequence[Linear]) -> list[Group]:
        """The linears by ``key``."""
        members: dict[Hashable, list[str]] = {}
        for linear in linears:
            members.setdefault(self.key(view, linear), []).append(linear.name)
        return [tuple(names) for names in members.values()]

    # --- fitting -----------------------------------------------------------------------------

    def fit_all(
        self,
        context: Context,
        linears: Sequence[Linear],
        fit: Callable[[Linear, Statistics], T],
        outputs: Callable[[Linear, T, Tensor, Tensor], Tensor] | None = None,
        what: str = "sites",
    ) -> dict[str, T]:
        """What ``fit`` makes of each group's first linear and its statistics, by linear.

        Statistics are gathered as ``requires`` says, and are gone when the next ``fit`` is called.
        With ``outputs``, from a linear, its fit, its input and its output to the output that what
        follows sees, linears are compressed as the sweep goes. ``fit`` wraps what it computes in
        ``context.once``; ``what`` names the sweep, which a resumed run does not repeat.
        """
        needs = self.requires()
        groups = self.groups(context.view, linears)
        by_name = {linear.name: linear for linear in linears}
        fits: dict[str, T] = {}

        def done(group: Group, statistics: Statistics) -> None:
            context.progress(f"{self.name}: {group[0]}", len(fits), len(linears))
            fits.update(dict.fromkeys(group, fit(by_name[group[0]], statistics)))

        def compressed(linear: Linear) -> Compressed:
            def change(inputs: list[Tensor], results: list[Results]) -> list[Results]:
                assert outputs is not None
                pairs = zip(inputs, results, strict=True)
                return [(outputs(linear, fits[linear.name], x, y),) for x, (y,) in pairs]

            return change

        at = {linear.name: compressed(linear) for linear in linears if outputs is not None}
        if not needs.stats or context.remembers(f"swept {what}"):
            for group in groups:
                done(group, Statistics())
        else:
            assert context.learning is not None
            context.learning.at_linears(context, needs, groups, done, at)
            context.once(f"swept {what}", lambda: True)
        context.progress(self.name, len(linears), len(linears))
        return fits

    # --- forecast ----------------------------------------------------------------------------

    def plan(self, context: Context) -> PassResult:
        result = PassResult()
        for linear in self.choose(context, result):
            result.sites.append(self.planned_site(context, linear))
        return result

    @abstractmethod
    def planned_site(self, context: Context, linear: Linear) -> Site:
        """What becomes of a linear, from shapes alone."""


@dataclass(frozen=True, kw_only=True)
class FormPass(LinearPass):
    """Base of the passes that give linears weights in another form.

    ``include`` and ``exclude`` are globs on site names, ``kinds`` are roles (``q``, ``up``);
    ``min_size`` is the least number of weights of a matrix.
    """

    provides: ClassVar[tuple[str, ...]] = (STORED, CHANGED)
    excludes: ClassVar[tuple[str, ...]] = (STORED,)
    weights_per_second: ClassVar[float] = 2e7
    """Matrix entries fitted a second on one core of the reference CPU: forecasts use it."""

    keeps_form: ClassVar[bool] = False
    """Whether what is stored is the same linear with other numbers (``View.set_weight``)."""

    @abstractmethod
    def predicted_bytes(self, linear: Linear, weight: Weight) -> int:
        """Stored bytes of one matrix, from shapes alone."""

    def at(self, linear: Linear) -> Self:
        """The pass as it stores one linear, where that depends on what the linear is."""
        return self

    def reason_against(self, context: Context, linear: Linear) -> str | None:
        return reason_against_storing(context.view, linear)

    def choose(self, context: Context, result: PassResult) -> list[Linear]:
        chosen = super().choose(context, result)
        return self._without_shared(context, chosen, result) if self.keeps_form else chosen

    def _without_shared(
        self, context: Context, chosen: Sequence[Linear], result: PassResult
    ) -> list[Linear]:
        """Those whose weight no linear reads that keeps it: other numbers would reach that too."""
        names = {linear.node: linear.name for linear in context.structure.linears}
        nodes = {linear.node for linear in chosen}
        unshared = []
        for linear in chosen:
            others = [n for n in readers(context.view, linear.weight) if n not in nodes]
            if not others:
                unshared.append(linear)
                continue
            reason = f"{names.get(others[0], context.view.name(others[0]))} holds the same weight"
            result.refused.append((linear.name, f"{reason} and keeps it: choose both or neither"))
        return unshared

    def put_all(
        self, context: Context, linears: Sequence[Linear], forms: Mapping[str, Shelved],
        result: PassResult,
    ) -> None:  # fmt: skip
        """Let each linear hold the form that was made for it; their sites go into ``result``."""
        for linear in linears:
            weight, stored = weight_of(context.view, linear), forms[linear.name]
            try:
                stored.put(context.view, linear, rule=self.name, step=context.step)
            except Refusal as refusal:
                result.refused.append((linear.name, str(refusal)))
                continue
            result.sites.append(
                linear_site(
                    linear, weight.stored_bytes, stored.nbytes, stored.form.rel_l2,
                    note=stored.form.note, sparsity=stored.form.sparsity,
                )
            )  # fmt: skip
        context.edited()

    def planned_site(self, context: Context, linear: Linear) -> Site:
        weight = weight_of(context.view, linear)
        planned = self.at(linear).predicted_bytes(linear, weight)
        return linear_site(linear, weight.stored_bytes, planned)

    def seconds(self, planned: PassResult) -> float:
        return sum(s.shape[0] * s.shape[1] for s in planned.sites) / self.weights_per_second

    def peak_bytes(self, planned: PassResult) -> int:
        return max((s.shape[0] * s.shape[1] for s in planned.sites), default=0) * 4 * 6


@dataclass(frozen=True, kw_only=True)
class LinearStoringPass(FormPass):
    """Base of the passes that let each linear hold its weight in a stored form.

    ``include`` and ``exclude`` are globs on site names, ``kinds`` are roles (``q``, ``up``);
    ``min_size`` is the least number of weights of a matrix.
    """

    @abstractmethod
    def fitting(
        self, context: Context, chosen: Sequence[Linear]
    ) -> Callable[[Linear, Statistics], Stored]:
        """What makes the stored form of a linear's matrix [out, in], by its statistics."""

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        view, chosen = context.view, self.choose(context, result)
        stored_form = self.fitting(context, chosen)

        def fit(linear: Linear, statistics: Statistics) -> Shelved:
            def stored() -> dict[str, Any]:
                return vars(stored_form(linear, statistics))

            form = context.once(f"site {linear.name}", stored)
            return Shelved.of(Stored(**form), context.spool)

        def outputs(linear: Linear, stored: Shelved, x: Tensor, y: Tensor) -> Tensor:
            bias = None if linear.bias is None else view.weight(linear.bias)
            return stored.read().outputs(x, None if bias is None else bias.read()).to(y.dtype)

        on_the_way = self.requires().propagate in ("sequential", "compensated")
        forms = self.fit_all(context, chosen, fit, outputs if on_the_way else None)
        self.put_all(context, chosen, forms, result)
        return result


@dataclass(frozen=True, kw_only=True)
class StoringPass(LinearStoringPass):
    """Base of the passes that are one function from a weight and its statistics to a stored form.

    ``include`` and ``exclude`` are globs on site names, ``kinds`` are roles (``q``, ``up``);
    ``min_size`` is the least number of weights of a matrix.
    """

    @abstractmethod
    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        """The stored form of one matrix [out, in]; ``name`` is for errors."""

    def fitting(
        self, context: Context, chosen: Sequence[Linear]
    ) -> Callable[[Linear, Statistics], Stored]:
        def fit(linear: Linear, statistics: Statistics) -> Stored:
            weight = weight_of(context.view, linear).read()
            return self.at(linear).fit(weight, statistics, linear.name)

        return fit

    def stand_in(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Tensor:
        """The matrix f32 [out, in] that the stored form of a linear's stands for."""
        return self.at(linear).fit(weight, statistics, linear.name).dense(weight.shape[1])


def weight_of(view: View, linear: Linear) -> Weight:
    """The handle of a linear's weight, which is a constant."""
    weight = view.weight(linear.weight)
    assert weight is not None
    return weight


def linear_site(
    linear: Linear, before: int, after: int, error: float | None = None, *, note: str = "",
    sparsity: float | None = None,
) -> Site:  # fmt: skip
    """The site of a linear, by its bytes before and after."""
    m, n = linear.out_features, linear.in_features
    return Site(
        name=linear.name, kind=linear.role or "linear", shape=(m, n), bytes_before=before,
        bytes_after=after, bits_per_weight=8 * after / (m * n), rel_l2=error, note=note,
        sparsity=sparsity,
    )  # fmt: skip
