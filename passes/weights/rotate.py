"""``rotate``: the residual stream and heads in a basis without outliers, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import View
from ...ir.core.weights import Weight
from ...ir.moves import (
    Inlet,
    Stream,
    find_inlets,
    find_stream,
    heads_of,
    rotate_heads,
    rotate_stream,
)
from ...ir.structure.recognize import Linear, Structure, recognize
from ..base import Context, Pass, PassResult
from ..linear_pass import linear_site, weight_of
from .hadamard import hadamard

STREAM = "residual stream"


@dataclass(frozen=True)
class _Parts:
    """What can be rotated in one graph."""

    stream: Stream | None
    reason: str
    """Why the stream is not."""
    heads: list[tuple[Inlet, int]]


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Rotate the residual stream, and the values of attention heads, by Hadamard matrices.

    The offline part of QuaRot (Ashkboos et al. 2024, arXiv 2404.00456): ``h' = h Q``, with signs
    drawn by ``seed``, spreads what few features of the stream hold over all of them, and so do the
    columns of the linears that read it and the rows of those that write it. Norms' weights go into
    the linears behind them. Nothing is added to the graph, and outputs stay. ``heads`` rotates
    values and the columns of ``o`` within each head. The input of ``down`` is not rotated: that
    takes a Hadamard transform when the model runs.

    The stream is left where that is not exact, with the reason: a layer norm (it subtracts the
    mean), norms between a linear and the stream or in the stream itself, a stream that is no
    table's rows. A head that is tied to the table is stored a second time, since the norm's weights
    go into it alone; its site says so. Weights of 16 bits are rounded to 16 bits.
    """

    name: ClassVar[str] = "rotate"
    exact: ClassVar[bool] = True
    rebases: ClassVar[bool] = True
    stream: bool = True
    """Turn the residual stream."""
    heads: bool = True
    """Turn values and what reads them."""
    seed: int = 0
    """Of the signs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.stream or self.heads):
            raise BadInput("rotate: with stream=false and heads=false there is nothing to rotate")

    def run(self, context: Context) -> PassResult:
        result = self.plan(context)
        if not result.sites:
            return result
        rotates = all(self._parts(g, recognize(g)).stream for g in self._graphs(context))
        handles: dict[tuple[object, ...], Weight] = {}

        def turned(
            weights: tuple[Weight, ...], what: str, change: Callable[..., Tensor]
        ) -> Weight:
            key = what, *(weight.key for weight in weights)
            if key not in handles:
                handles[key] = context.spool.store(change(*(weight.read() for weight in weights)))
            return handles[key]

        bases: dict[int, Tensor] = {}

        def basis(order: int) -> Tensor:
            return bases.setdefault(order, hadamard(order, self.seed))

        def change(view: View, structure: Structure) -> None:
            parts = self._parts(view, structure)
            for inlet, size in parts.heads:
                rotate_heads(view, inlet, basis(size), turned)
            if parts.stream is not None and rotates:
                rotate_stream(view, parts.stream, basis(parts.stream.width), turned)

        context.in_all_graphs(change)
        return result

    def plan(self, context: Context) -> PassResult:
        """The linears whose numbers change; a tied head with the bytes that it takes from now."""
        result, structure = PassResult(), context.structure
        parts = self._parts(context.view, structure)
        touched: dict[str, Linear] = {}
        tied = ""
        for inlet, _ in parts.heads:
            touched.update((linear.name, linear) for linear in inlet.linears)
            makers = {id(value) for value in inlet.makers}
            touched.update((x.name, x) for x in structure.linears if id(x.weight) in makers)
        others = [self._parts(g, recognize(g)) for g in self._graphs(context)[1:]]
        reason = next((f.reason for f in others if f.stream is None), "")
        if parts.stream is not None and not reason:
            tied = "" if parts.stream.tied is None else parts.stream.tied.name
            touched.update((x.name, x) for r in parts.stream.readings for x in r.linears)
            touched.update((linear.name, linear) for linear in parts.stream.writers)
        elif self.stream:
            result.refused.append((STREAM, parts.reason or f"in the source graph, {reason}"))
        for linear in structure.linears:
            if linear.name not in touched:
                continue
            weight, own = weight_of(context.view, linear), linear.name != tied
            note = "" if own else "tied to its table before: stored a second time"
            before = weight.stored_bytes if own else 0
            result.sites.append(linear_site(linear, before, weight.nbytes, note=note))
        return result

    def seconds(self, planned: PassResult) -> float:
        return sum(s.shape[0] * s.shape[1] * max(s.shape) for s in planned.sites) / 1e10

    def _graphs(self, context: Context) -> list[View]:
        return [context.view, *context.references()]

    def _parts(self, view: View, structure: Structure) -> _Parts:
        heads = heads_of(find_inlets(view, structure)[0], structure) if self.heads else []
        if not self.stream:
            return _Parts(None, "", heads)
        try:
            return _Parts(find_stream(view, structure), "", heads)
        except (Refusal, BadInput) as reason:
            return _Parts(None, str(reason), heads)
