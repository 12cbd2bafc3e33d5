"""The kernels that there are, by the op that each computes.

A kernel lies in the file of its op's name, ``kernels/OP.py``, as ``KERNEL``; other packages add
theirs by ``register_kernel``. Importing this module does not import triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.core.errors import BadInput
from .launch import Launch

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
PRECISION = {torch.float32: "tf32x3"}
"""Of a product of matrices: three TF32 products make one of float32 to 1e-6; the half types ignore
it."""


@dataclass(frozen=True)
class Kernel:
    """What computes an op on a CUDA device, and what it takes."""

    function: Callable[..., torch.Tensor]
    """It takes what the op's reference takes."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Of the first operand; any, where empty."""
    attrs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """The values that an attribute may have, where not all are taken."""
    ranks: tuple[int, ...] = ()
    """Of the first operand; any, where empty."""
    one_dtype: bool = False
    """Whether all operands must be of the first one's dtype."""
    low_rank: Callable[..., torch.Tensor] | None = None
    """Of a linear: the same that also adds ``narrow @ up.T``, its two operands after the op's."""
    launches: Callable[[], list[tuple[str, Launch]]] = list
    """Labelled launches of typical sizes on tensors without data: what a bench compiles."""


_REGISTERED: dict[str, Kernel] = {}


def register_kernel(op: str, kernel: Kernel) -> None:
    """Let a kernel of another package run an op. Raises ``BadInput`` where there is one already."""
    if kernel_of(op) is not None:
        raise BadInput(f"{op} has a kernel already")
    _REGISTERED[op] = kernel


def kernel_of(op: str) -> Kernel | None:
    """The kernel of an op; ``None`` where there is none. Importing one imports triton."""
    return _REGISTERED.get(op) or _built_in(op)


@functools.cache
def _built_in(op: str) -> Kernel | None:
    if importlib.util.find_spec(f"{__package__}.{op}") is None:
        return None
    kernel: Kernel | None = getattr(
        importlib.import_module(f"{__package__}.{op}"), "KERNEL", None
    )
    return kernel
