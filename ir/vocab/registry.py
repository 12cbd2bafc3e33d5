"""All ops that are declared, by name, and the tables by which native graphs are decoded.

The native ops are declared in this package. Dialects add to them: our own ops (``ir.ops``), and
those of other packages, by ``register`` or by the entry point group ``graphwright.ops``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from ..core.errors import BadInput, Refusal, near_misses
from ..core.types import UNKNOWN
from . import (
    activations,
    choices,
    cuts,
    elementwise,
    fx,
    indexing,
    linear,
    norms,
    onnx,
    reductions,
    shape,
)
from .spec import REQUIRED, OpSpec

GROUP = "graphwright.ops"
"""The entry point group of third-party ops: ``my-op = "package.module:MY_OP"``, an ``OpSpec``."""

VOCABULARY: dict[str, OpSpec] = {}
"""Every op by its name."""
ATEN_DECODERS: dict[Any, tuple[str, fx.Decode, bool]] = {}
"""ATen target to the op, its decoder, and whether that may answer ``None``."""
ONNX_DECODERS: dict[tuple[str, str], list[tuple[str, onnx.Decode, bool]]] = {}
"""(domain, op type) to candidates, those whose decoder may answer ``None`` first."""

_OUR_DIALECT = "...ops"
_dialects: list[str] = []
"""The dialects loaded so far."""


def register(op: OpSpec) -> OpSpec:
    """Add an op to the vocabulary.

    Raises ``BadInput`` where its name, or a native op that it decodes, is another op's already, and
    for a stored linear whose declaration lacks what every linear has.
    """
    _check(op)
    VOCABULARY[op.name] = op
    for decoder in op.aten.decoders if op.aten else ():
        for target in decoder.targets:
            ATEN_DECODERS[target] = (op.name, decoder.decode, decoder.partial)
    for reader in op.onnx.decoders if op.onnx else ():
        for op_type in reader.op_types:
            candidates = ONNX_DECODERS.setdefault((reader.domain, op_type), [])
            candidates.append((op.name, reader.decode, reader.partial))
            candidates.sort(key=lambda candidate: not candidate[2])
    return op


def _check(op: OpSpec) -> None:
    if op.name in VOCABULARY:
        raise BadInput(f"there is an op {op.name!r} already")
    for target in (t for d in (op.aten.decoders if op.aten else ()) for t in d.targets):
        if target in ATEN_DECODERS:
            raise BadInput(f"{op.name}: {target} is {ATEN_DECODERS[target][0]} already")
    for reader in op.onnx.decoders if op.onnx else ():
        for op_type in () if reader.partial else reader.op_types:
            taken = [c[0] for c in ONNX_DECODERS.get((reader.domain, op_type), ()) if not c[2]]
            if taken:
                raise BadInput(f"{op.name}: {op_type} is {taken[0]} already")
    if op.stored_linear is not None and (
        op.dense is None or not {"in_features", "out_features"} <= set(op.attrs)
    ):
        raise BadInput(
            f"{op.name}: a stored linear declares dense and the attributes in_features and "
            "out_features"
        )


def load_dialects() -> None:
    """Register our own ops and those of other packages, once; views do it before they read."""
    if _dialects:
        return
    _dialects.append(_OUR_DIALECT)
    importlib.import_module(_OUR_DIALECT, __name__)
    for point in entry_points(group=GROUP):
        op = point.load()
        if not isinstance(op, OpSpec):
            raise BadInput(f"the entry point {point.name!r} is not a graphwright op: {op!r}")
        if VOCABULARY.get(op.name) is not op:  # its module may have registered it
            register(op)
        _dialects.append(point.name)


def declared(name: str) -> OpSpec | None:
    """The declaration of an op; ``None`` where there is none, as for ``native``."""
    op = VOCABULARY.get(name)
    if op is None and not _dialects:
        load_dialects()
        op = VOCABULARY.get(name)
    return op


_NATIVE = OpSpec(
    name="native", operands=("*inputs",), infer=lambda operands, attrs: (UNKNOWN,),
    reference=lambda *inputs: None, pure=False,
)  # fmt: skip


def traits(name: str) -> OpSpec:
    """The declaration of an op, to ask for its traits: ``native`` ones have none."""
    return declared(name) or _NATIVE


def spec(name: str) -> OpSpec:
    """The declaration of an op; ``KeyError`` where there is none."""
    op = declared(name)
    if op is None:
        raise KeyError(name)
    return op


def is_known(name: str) -> bool:
    """Whether an op of this name is declared."""
    return declared(name) is not None


def check_known(name: str) -> None:
    """Raise ``AttributeError``, with near misses, where no op of this name is declared."""
    if not is_known(name):
        raise AttributeError(f"the vocabulary has no op {name!r}; {near_misses(name, VOCABULARY)}")


def ops_with(trait: Callable[[OpSpec], object]) -> tuple[str, ...]:
    """The names of the ops that have a trait: ``ops_with(lambda op: op.macs)``."""
    load_dialects()
    return tuple(name for name, op in VOCABULARY.items() if trait(op))


def check_arity(name: str, operands: Sequence[Any], where: Any) -> None:
    """Raise ``Refusal``, with the node ``where``, for more or fewer operands than the op takes."""
    least, most = spec(name).arity
    if len(operands) < least or (most is not None and len(operands) > most):
        raise Refusal(f"{name} takes {least} to {most} operands, not {len(operands)}", where)


def complete_attrs(name: str, attrs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The attributes with defaults filled in; ``TypeError`` on an unknown or missing one."""
    defaults = spec(name).attrs
    if not attrs and not defaults:
        return {}
    full = {**defaults, **(attrs or {})}
    if len(full) > len(defaults):
        raise TypeError(f"{name} has no attribute {', '.join(sorted(set(full) - set(defaults)))}")
    missing = sorted(k for k, v in full.items() if v is REQUIRED)
    if missing:
        raise TypeError(f"{name} needs the attribute {', '.join(missing)}")
    return full


_FAMILIES = (
    elementwise, choices, activations, reductions, linear, norms, shape, cuts, indexing,
)  # fmt: skip
for _family in _FAMILIES:
    for _op in _family.OPS:
        register(_op)
