"""What an op of ours declares, once, and what follows from it.

From one ``OwnOp`` come the torch custom op ``graphwright::NAME`` with its fake kernel, the ONNX
form that a stock ONNX Runtime runs, the samples that its tests are generated from, and the slot
that a device kernel fills.
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
from ..vocab import REQUIRED

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape

NAMESPACE = "graphwright"

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,  # two units in the last place: the runtime sums in another order
    torch.bfloat16: 1.6e-2,
}
"""Relative L2 error that two exact implementations of one op may show, by the dtype of ``x``."""

Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class Sample:
    """Operands (``None`` for an absent one) and attributes that an op is tested on."""

    operands: tuple[Tensor | None, ...]
    attrs: Mapping[str, Any]
    label: str


@dataclass(frozen=True)
class OwnOp:
    """One op of ours. Its name, operands and attributes are read off the reference's signature:

    positional parameters are operands (those that default to ``None`` may be absent), the first one
    is the activation; keyword-only parameters are attributes.
    """

    reference: Kernel
    """The op on torch tensors, computed in float32 and cast to the dtype of ``x``."""
    infer: Callable[[Sequence[Any], Mapping[str, Any]], tuple[Type, ...]]
    """Operand types (``None`` for absent) and attributes to result types.

    Leading dimensions may be symbolic. Raises ``ValueError`` where operands contradict each other.
    """
    onnx: Callable[[Tape, Sequence[onnx_ir.Value | None], Mapping[str, Any]], onnx_ir.Value]
    """Records on a tape the nodes that a stock ONNX Runtime runs; returns their result.

    Opset 18 and up. New initializers are lazy. Raises ``InvalidGraph`` where an operand that must
    be a constant is none.
    """
    samples: Callable[[], list[Sample]]
    tolerances: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCES)

    @cached_property
    def name(self) -> str:
        return self.reference.__name__

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Operand names in order; ``?`` marks one that may be absent."""
        return tuple(
            p.name if p.default is p.empty else p.name + "?"
            for p in inspect.signature(self.reference).parameters.values()
            if p.kind is not p.KEYWORD_ONLY
        )

    @cached_property
    def attrs(self) -> Mapping[str, Any]:
        """Attribute names with their defaults; ``REQUIRED`` where there is none."""
        return {
            p.name: REQUIRED if p.default is p.empty else p.default
            for p in inspect.signature(self.reference).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }

    def stored_bytes(self, operands: Sequence[Type | None]) -> int:
        """Bytes that the op's constants take (all operands but the first), from their types alone.

        Raises ``ValueError`` where a constant's size is not known.
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
        library.impl(self.name, partial(_dispatch, self), "CompositeExplicitAutograd")
        qualified = f"{NAMESPACE}::{self.name}"
        torch.library.register_fake(qualified, partial(_fake, self), lib=library)
        overload: torch._ops.OpOverload = getattr(torch.ops.graphwright, self.name).default
        return overload


_KERNELS: dict[tuple[str, str], Kernel] = {}
_LIBRARIES: list[torch.library.Library] = []


def _library() -> torch.library.Library:
    if not _LIBRARIES:
        make: Any = torch.library.Library
        _LIBRARIES.append(make(NAMESPACE, "FRAGMENT"))
    return _LIBRARIES[0]


def register_kernel(op: str, device_type: str, kernel: Kernel | None) -> Kernel | None:
    """Let ``kernel`` run ``op`` on a device type such as ``cuda``; ``None`` empties the slot.

    A kernel takes what the reference takes. Returns the kernel that held the slot before.
    """
    former = _KERNELS.pop((op, device_type), None)
    if kernel is not None:
        _KERNELS[op, device_type] = kernel
    return former


def kernel_for(op: str, device_type: str) -> Kernel | None:
    """The kernel registered for an op on a device type, if there is one."""
    return _KERNELS.get((op, device_type))


def _dispatch(op: OwnOp, x: Tensor, *operands: Tensor | None, **attrs: Any) -> Tensor:
    kernel = _KERNELS.get((op.name, x.device.type), op.reference)
    return kernel(x, *operands, **attrs)


def _fake(op: OwnOp, x: Tensor, *operands: Tensor | None, **attrs: Any) -> Tensor:
    types = [None if t is None else Type(t.dtype, tuple(t.shape)) for t in (x, *operands)]
    defaults = {k: v for k, v in op.attrs.items() if v is not REQUIRED}
    (result,) = op.infer(types, {**defaults, **attrs})
    return x.new_empty(result.shape, dtype=result.dtype)  # type: ignore[arg-type]
