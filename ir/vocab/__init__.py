"""The vocabulary: the shared op names in which patterns, structure and passes speak, as one table.

An op's operands are tensors or numbers, its attributes Python constants. ``?`` marks an operand
that may be absent, ``*`` one that repeats. What is not here stays a ``native`` node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import Refusal
from ..core.types import Type
from . import infer, reference


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op of the vocabulary."""

    name: str
    operands: tuple[str, ...]
    attrs: Mapping[str, Any]
    """Attribute names with their defaults; ``REQUIRED`` where there is none."""
    infer: Callable[[Sequence[Any], Mapping[str, Any]], tuple[Type, ...]]
    """From operand types (numbers as they are, ``None`` for absent) and attributes to results."""
    reference: Callable[..., Any]
    """The op on torch tensors: ``reference(*operands, **attrs)``."""
    commutative: bool = False
    own: bool = False
    """An op of ours with an entry in ``ops.OWN_OPS``."""
    arity: tuple[int, int | None] = field(init=False)
    """Least and greatest number of operands; the greatest is ``None`` where one repeats."""

    def __post_init__(self) -> None:
        least = sum(1 for o in self.operands if not o.endswith("?") and not o.startswith("*"))
        repeats = any(o.startswith("*") for o in self.operands)
        object.__setattr__(self, "arity", (least, None if repeats else len(self.operands)))


END = (1 << 63) - 1
"""As the end of a ``slice``: to the end, whatever the size."""


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()
"""Stands for the default of an attribute that has none."""

_BINARY = (
    ("add", True), ("sub", False), ("mul", True), ("div", False), ("pow", False),
    ("maximum", True), ("minimum", True),
)  # fmt: skip
_COMPARE = (
    ("eq", True), ("ne", True), ("lt", False), ("le", False), ("gt", False), ("ge", False),
    ("logical_and", True), ("logical_or", True),
)  # fmt: skip
_UNARY = (
    "neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "erf", "tanh", "sigmoid", "sin",
    "cos", "floor", "relu", "silu", "identity",
)  # fmt: skip
_PREDICATE = ("logical_not", "isnan")
_REDUCE = ("mean", "sum", "amax", "amin")


def _table() -> dict[str, OpSpec]:
    specs: list[OpSpec] = []

    def op(
        name: str, operands: str, rule: Any, *, commutative: bool = False, **attrs: Any
    ) -> None:
        function = getattr(reference, name)
        specs.append(OpSpec(name, tuple(operands.split()), attrs, rule, function, commutative))

    for name, commutative in _BINARY:
        op(name, "a b", infer.elementwise, commutative=commutative)
    for name, commutative in _COMPARE:
        op(name, "a b", infer.comparison, commutative=commutative)
    for name in _UNARY:
        op(name, "x", infer.same)
    for name in _PREDICATE:
        op(name, "x", infer.comparison)
    for name in _REDUCE:
        op(name, "x", infer.reduction, dims=REQUIRED, keepdim=False)
    op("gelu", "x", infer.same, approximate="none")
    op("clamp", "x", infer.same, min=None, max=None)
    op("cast", "x", infer.cast, dtype=REQUIRED)
    op("where", "condition a b", infer.where)
    op("softmax", "x", infer.same, dim=REQUIRED)
    op("cumsum", "x", infer.same, dim=REQUIRED)
    op("matmul", "a b", infer.matmul)
    op("linear", "x weight bias?", infer.linear)
    op(
        "conv", "x weight bias?", infer.conv,
        stride=REQUIRED, padding=REQUIRED, dilation=REQUIRED, groups=1,
    )  # fmt: skip
    op("embedding", "weight ids", infer.embedding)
    op("layer_norm", "x weight? bias?", infer.same, dims=1, eps=1e-5)
    op("rms_norm", "x weight?", infer.same, eps=1e-6)
    op("sdpa", "q k v mask?", infer.sdpa, scale=None, causal=False, gqa=False, softcap=None)
    op("reshape", "x *shape", infer.reshape)
    op("expand", "x *shape", infer.expand)
    op("transpose", "x", infer.transpose, perm=REQUIRED)
    op("unsqueeze", "x", infer.unsqueeze, dims=REQUIRED)
    op("squeeze", "x", infer.squeeze, dims=REQUIRED)
    op("concat", "*xs", infer.concat, dim=REQUIRED)
    op("slice", "x start end", infer.slice_, dim=REQUIRED, step=1)
    op("gather", "x index", infer.gather, dim=REQUIRED)
    op("index_select", "x index", infer.index_select, dim=REQUIRED)
    op("split", "x", infer.split, sizes=REQUIRED, dim=REQUIRED)
    op("topk", "x", infer.topk, k=REQUIRED, dim=-1, largest=True, sorted=True)
    op("arange", "start end step", infer.arange, dtype=REQUIRED)
    op("size", "x", infer.size, dim=REQUIRED)
    return {spec.name: spec for spec in specs}


VOCABULARY: dict[str, OpSpec] = _table()


def spec(name: str) -> OpSpec:
    """The entry of an op, our own ops included; ``KeyError`` where there is none."""
    found = VOCABULARY.get(name)
    return _own_spec(name) if found is None else found


def is_known(name: str) -> bool:
    """Whether the vocabulary, our own ops included, has an op of this name."""
    return name in VOCABULARY or name in _own_ops()


def _own_ops() -> Mapping[str, Any]:
    from ..ops import OWN_OPS

    return OWN_OPS


def _own_spec(name: str) -> OpSpec:
    own = _own_ops()[name]
    return OpSpec(name, own.operands, own.attrs, own.infer, own.reference, own=True)


def check_arity(name: str, operands: Sequence[Any], where: Any) -> None:
    """Raise ``Refusal``, with the node ``where``, for more or fewer operands than the op takes."""
    least, most = spec(name).arity
    if len(operands) < least or (most is not None and len(operands) > most):
        raise Refusal(f"{name} takes {least} to {most} operands, not {len(operands)}", where)


def complete_attrs(name: str, attrs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The attributes with defaults filled in; ``TypeError`` on an unknown or missing one."""
    declared = spec(name).attrs
    if not attrs and not declared:
        return {}
    given = dict(attrs or {})
    unknown = sorted(set(given) - set(declared))
    if unknown:
        raise TypeError(f"{name} has no attribute {', '.join(unknown)}")
    full = {**declared, **given}
    missing = sorted(k for k, v in full.items() if v is REQUIRED)
    if missing:
        raise TypeError(f"{name} needs the attribute {', '.join(missing)}")
    return full
