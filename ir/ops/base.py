"""An op of ours: what it declares beyond the vocabulary, and what follows from it.

From one ``OwnOp`` come the torch custom op ``graphwright::NAME`` with its fake kernel, the ONNX
form that a stock ONNX Runtime runs, and the samples that its tests are generated from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.types import Type
from ..core.view import Node, Operand, View
from ..vocab import REQUIRED, OpSpec
from ..vocab.fx import call
from ..vocab.spec import Attrs, Infer

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape
    from torch.fx import Graph
    from torch.fx import Node as FxNode

NAMESPACE = "graphwright"

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,  # two units in the last place: the runtime sums in another order
    torch.bfloat16: 1.6e-2,
}
"""Relative L2 error that two exact implementations of one op may show, by the dtype of ``x``."""

Record = Callable[["Tape", "Sequence[onnx_ir.Value | None]", Attrs], "onnx_ir.Value"]
"""Records on a tape the nodes that a stock ONNX Runtime runs; returns their result.

Opset 18 and up. New initializers are lazy. Raises ``InvalidGraph`` where an operand that must be a
constant is none.
"""


@dataclass(frozen=True)
class Sample:
    """Operands (``None`` for an absent one) and attributes that an op is tested on."""

    operands: tuple[Tensor | None, ...]
    attrs: Mapping[str, Any]
    label: str


@dataclass(frozen=True, slots=True)
class StockDecoder:
    """How the ONNX form of an op is read back, at the node that ends it."""

    root: str
    """That node's op: a word of the vocabulary, or a native one (``com.microsoft::GroupNorm``)."""
    decode: Callable[[View, Node], tuple[Sequence[Operand], Attrs]]
    """The op's operands and attributes; new constants are added to the view. Raises ``Refusal``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnOp(OpSpec):
    """One op of ours, computed in float32 by its reference and cast to the dtype of ``x``."""

    record: Record
    """Its ONNX form for ONNX Runtime."""
    samples: Callable[[], list[Sample]]
    forms: Mapping[str, Record] = field(default_factory=dict)
    """Other ONNX forms by the names by which a target asks for them: see ``vocab.targets``."""
    tolerances: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCES)
    decoders: tuple[StockDecoder, ...] = ()
    as_numbers: bool = False
    """A linear that passes see as a plain one, of numbers, and that is written in this form where
    they leave it alone: see ``coded_weight``."""

    def build_fx(self, graph: Graph, operands: Sequence[Any], attrs: Attrs) -> FxNode:
        if self.own:
            return self.call(graph, operands, attrs)
        return super().build_fx(graph, operands, attrs)

    def call(self, graph: Graph, operands: Sequence[Any], attrs: Attrs) -> FxNode:
        """Insert a call of the torch custom op."""
        padded = (*operands, *[None] * (len(self.operands) - len(operands)))
        return call(graph, self.overload, padded, dict(attrs))

    def bytes_read(self, operands: Sequence[Type | None]) -> int:
        """Bytes of constants that one run reads, all operands but the first, from their types.

        Raises ``ValueError`` where a size is not known.
        """
        total = 0
        for name, operand in zip(self.operands[1:], operands[1:], strict=False):
            if operand is None:
                continue
            if operand.numel is None or operand.dtype is None:
                raise ValueError(f"{self.name}: the size of {name} is not known: {operand}")
            total += operand.numel * operand.dtype.itemsize
        return total

    @cached_property
    def overload(self) -> torch._ops.OpOverload:
        """The torch custom op, registered when it is first asked for."""
        # Attributes are constants of the graph: a symbolic size in their place is a mistake.
        schema = torch.library.infer_schema(self.reference, mutates_args=())
        schema = schema.replace("SymInt", "int")
        library: Any = _library()  # torch leaves these methods untyped
        library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(self.name, self.reference, "CompositeExplicitAutograd")
        qualified = f"{NAMESPACE}::{self.name}"
        torch.library.register_fake(qualified, partial(_fake, self), lib=library)
        overload: torch._ops.OpOverload = getattr(torch.ops.graphwright, self.name).default
        return overload


def own_op(
    reference: Callable[..., Tensor], *, infer: Infer, record: Record,
    samples: Callable[[], list[Sample]], **traits: Any,
) -> OwnOp:  # fmt: skip
    """Declare an op of ours. Its name and signature are those of the reference:

    positional parameters are operands (those that default to ``None`` may be absent), the first one
    is the activation; keyword-only parameters are attributes. ``traits`` are fields of ``OpSpec``.
    """
    parameters = inspect.signature(reference).parameters.values()
    return OwnOp(
        name=reference.__name__,
        operands=tuple(
            p.name if p.default is p.empty else p.name + "?"
            for p in parameters
            if p.kind is not p.KEYWORD_ONLY
        ),
        attrs={
            p.name: REQUIRED if p.default is p.empty else p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY
        },
        infer=infer, reference=reference, record=record, samples=samples, **traits,
    )  # fmt: skip


_LIBRARIES: list[torch.library.Library] = []


def _library() -> torch.library.Library:
    if not _LIBRARIES:
        make: Any = torch.library.Library
        _LIBRARIES.append(make(NAMESPACE, "FRAGMENT"))
    return _LIBRARIES[0]


def _fake(op: OwnOp, x: Tensor, *operands: Tensor | None, **attrs: Any) -> Tensor:
    types = [None if t is None else Type(t.dtype, tuple(t.shape)) for t in (x, *operands)]
    defaults = {k: v for k, v in op.attrs.items() if v is not REQUIRED}
    (result,) = op.infer(types, {**defaults, **attrs})
    return x.new_empty(result.shape, dtype=result.dtype)  # type: ignore[arg-type]
