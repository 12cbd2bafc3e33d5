"""Types of the ops that most of a model is made of, by one rule each while the exporter traces.

To learn the type of a linear's result the exporter takes it apart into views and a product, and
runs each through fake tensors of symbolic sizes: an eighth of what a trace costs. Where operands
plainly fit each other, the result is as long as they say, and contiguous, which these ops make it.
Whether a tensor is contiguous is worked out anew for each operand of each op, another eighth: here
once for all tensors of the same sizes and strides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch._prims_common as prims
from torch import SymInt, Tensor
from torch._C import DispatchKey

from ...fx.dims import Sizes, same
from .lean_export import replaced

aten = torch.ops.aten

_APART = DispatchKey.CompositeImplicitAutograd
"""By which the exporter takes an op apart."""
_Rule = Callable[..., Sizes | None]
"""From the operands to the sizes of the result; ``None`` where the exporter has to say."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sizes | None:
    fits = x.dim() and weight.dim() == 2 and same(x.shape[-1], weight.shape[1])
    if not fits or (bias is not None and not _same_all(bias.shape, weight.shape[:1])):
        return None
    operands = (x, weight) if bias is None else (x, weight, bias)
    return (*x.shape[:-1], weight.shape[0]) if _alike(*operands) else None


def _matmul(a: Tensor, b: Tensor) -> Sizes | None:
    if b.dim() < 2 or a.dim() < b.dim() or not same(a.shape[-1], b.shape[-2]):
        return None  # of fewer dimensions than ``b``, the result is the view of a product
    if b.dim() > 2 and not _same_all(a.shape[:-2], b.shape[:-2]):
        return None
    return (*a.shape[:-1], b.shape[-1]) if _alike(a, b) else None


def _layer_norm(
    x: Tensor, sizes: Sizes, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any
) -> Sizes | None:
    given = [sizes, *(t.shape for t in (weight, bias) if t is not None)]
    if not all(_same_all(shape, x.shape[-len(sizes):]) for shape in given):  # fmt: skip
        return None
    return x.shape


_RULES: Mapping[Any, _Rule] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.layer_norm.default: _layer_norm,
}


@contextlib.contextmanager
def short_types() -> Iterator[None]:
    """Within it, the ops above are typed by their rule, and taken apart where it does not say.

    For one export: sizes of another that go by the same letters may be others.
    """
    before = {op: op.py_kernels.get(_APART) for op in _RULES}
    try:
        for op, rule in _RULES.items():
            _set(op, _by_rule(op, rule, before[op]))
        with (
            replaced(prims, "is_contiguous", _asked_once),
            replaced(prims, "is_channels_last_contiguous_2d", partial(_asked_once, ranks=(4,))),
        ):
            yield
    finally:
        for op, kernel in before.items():
            _set(op, kernel)


def _set(op: Any, kernel: Callable[..., Any] | None) -> None:
    """Gives an op its decomposition in Python, or takes it away."""
    if kernel is None:
        op.py_kernels.pop(_APART, None)
    else:
        op.py_kernels[_APART] = kernel
    op._dispatch_cache.clear()


def _by_rule(op: Any, rule: _Rule, taken_apart: Callable[..., Any] | None) -> Callable[..., Any]:
    def typed(*args: Any, **kwargs: Any) -> Any:
        sizes = None if _differentiates() else rule(*args, **kwargs)
        if sizes is not None:
            return args[0].new_empty(sizes)
        if taken_apart is not None:
            return taken_apart(*args, **kwargs)
        return op._op_dk(_APART, *args, **kwargs)

    return typed


def _differentiates() -> bool:
    """Whether more than a type is asked for: a result made anew has no gradient, and is none of a
    transform's (``torch.func.grad``, ``jvp``, ``vmap``) tensors."""
    return torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None


def _asked_once(asked: Callable[..., bool], ranks: Sequence[int] = ()) -> Callable[..., bool]:
    """A question about the layout of a tensor, which is answered as it was for its like; where
    ``ranks`` are named, tensors of others cost it nothing."""
    answers: dict[Any, bool] = {}

    def answered(tensor: Tensor, *flags: Any, **named: Any) -> bool:
        if ranks and tensor.ndim not in ranks:
            return asked(tensor, *flags, **named)
        sizes = tuple(map(_written, (*tensor.shape, *tensor.stride())))
        like = (sizes, flags, *named.items())
        if like not in answers:
            answers[like] = asked(tensor, *flags, **named)
        return answers[like]

    return answered


def _written(size: int | SymInt) -> Any:
    """As it was written: what the exporter has since learned of its symbols is a dear question."""
    return size.node._expr if isinstance(size, SymInt) else size


def _alike(*tensors: Tensor) -> bool:
    return len({(t.dtype, t.device, t.layout) for t in tensors}) == 1


def _same_all(a: Sizes, b: Sizes) -> bool:
    return len(a) == len(b) and all(map(same, a, b))
