"""What is declared of an op: signature, traits, type rule, reference, and its native forms.

A declaration is all that is known of an op. What reads graphs, rewrites, costs or lowers them asks
for a trait, never for a name in a list of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.errors import Refusal
from ..core.types import Type
from .fx import AtenForm
from .onnx import OnnxForm

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Graph, Node

END = (1 << 63) - 1
"""As the end of a ``slice``: to the end, whatever the size."""


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()
"""Stands for the default of an attribute that has none."""

Attrs = Mapping[str, Any]
Types = tuple[Type, ...]
Infer = Callable[[Sequence[Any], Attrs], Types]
"""Operand types (numbers as they are, ``None`` for absent) and attributes to result types.

It answers as much as it knows: a dimension that it cannot name is ``UNKNOWN_DIM``. Raises
``ValueError`` where operands contradict each other.
"""
Shape = Sequence[int]


@dataclass(frozen=True, slots=True)
class Macs:
    """The trait of an op that multiplies and adds: how often."""

    count: Callable[[Sequence[Any], Shape], int]
    """From the shapes of the operands that are tensors, and the shape of the result."""
    reads: int = 1
    """How many of the operands' shapes, the first ones, ``count`` reads; the others may be open."""


StoredLinear = Callable[[Attrs], str]
"""The trait of a linear whose weight is stored in a form of its own: that form in a few words.

Operand 0 is ``x``, operand 1 the constant that names the linear, one called ``bias?`` its bias; the
attributes ``in_features`` and ``out_features`` say its size. Such an op declares ``dense``.
"""
Dense = Callable[[int, "Sequence[Tensor | None]", Attrs], "Tensor"]
"""The matrix f32 [out, in] that an op multiplies by: from the columns of ``x``, the operands after
``x`` (constants; ``None`` for an absent one) and the attributes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpSpec:
    """One op of the vocabulary.

    Its operands are tensors or numbers, its attributes Python constants.
    """

    name: str
    operands: tuple[str, ...]
    """Names in order. ``?`` marks an operand that may be absent, ``*`` one that repeats."""
    attrs: Attrs = field(default_factory=dict)
    """Attribute names with their defaults; ``REQUIRED`` where there is none."""
    infer: Infer
    reference: Callable[..., Any]
    """The op on torch tensors: ``reference(*operands, **attrs)``."""
    aten: AtenForm | None = None
    onnx: OnnxForm | None = None

    pure: bool = True
    """Equal operands give equal results: it may be merged and computed ahead."""
    commutative: bool = False
    """Its two operands may change places."""
    heavy: bool = False
    """To compute it again would be to run a part of the model again."""
    multi_result: bool = False
    """It has several results, or a tuple of one."""
    shape_only: bool = False
    """It reads the shape of its operand, and nothing of what that holds."""
    rearranges: bool = False
    """Its result holds numbers of the first operand, in other places or another dtype."""
    picks: bool = False
    """Its index operand picks rows or items of another one."""
    table: int | None = None
    """Which operand is a table of rows that ids pick from, the other one of the first two."""
    activation: bool = False
    """A nonlinearity between linears."""
    rounds: bool = False
    """It rounds its first operand to 8 bits, whatever its attributes say."""
    macs: Macs | None = None
    dense: Dense | None = None
    """For an op ``x Wᵀ``, with a bias or not: what W is."""
    stored_linear: StoredLinear | None = None
    """How the weight is stored, in a few words, for a linear that has no plain matrix."""

    arity: tuple[int, int | None] = field(init=False)
    """Least and greatest number of operands; the greatest is ``None`` where one repeats."""

    def __post_init__(self) -> None:
        least = sum(1 for o in self.operands if not o.endswith("?") and not o.startswith("*"))
        repeats = any(o.startswith("*") for o in self.operands)
        object.__setattr__(self, "arity", (least, None if repeats else len(self.operands)))

    @property
    def bias(self) -> int | None:
        """Which operand is a bias."""
        return self.operands.index("bias?") if "bias?" in self.operands else None

    @property
    def ids(self) -> int | None:
        """Which operand picks rows of ``table``."""
        return None if self.table is None else 1 - self.table

    @property
    def own(self) -> bool:
        """Whether it is an op of ours: one that no native graph has."""
        return self.aten is None

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear of the model, whatever form its weight has."""
        return self.stored_linear is not None or self.name == "linear"

    def build_fx(self, graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
        """Insert what writes the op in an FX graph; the node that is its result."""
        if self.aten is None:
            raise Refusal(f"{self.name} has no form in an FX graph")
        return self.aten.build(graph, operands, attrs)
