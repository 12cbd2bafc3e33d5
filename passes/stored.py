"""What a weight method makes of a matrix: the form in which its linear will hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..ir.core.view import View
from ..ir.core.weights import Spool, Weight
from ..ir.moves import graft, swap
from ..ir.structure.recognize import Linear
from ..ir.structure.weights import readers
from ..ir.vocab import spec


@dataclass(frozen=True)
class Stored:
    """A linear's weight in a form of its own. With ``op`` ``linear`` it is the same form with other
    numbers."""

    op: str
    """The op that computes with it: ``linear``, ``linear_nbit``, ``linear_bitstack``, ..."""
    operands: Mapping[str, Tensor | None]
    """The op's constants between its input and its bias, in order, by the names that they get."""
    rel_l2: float
    """Relative Frobenius error of the weight."""
    attrs: Mapping[str, Any] = field(default_factory=dict)
    outliers: Mapping[str, Tensor] = field(default_factory=dict)
    """``rows``, ``cols`` and ``values`` of a ``sparse_linear`` beside it; empty for none."""
    sparsity: float | None = None
    """Share of zeros, where they are what the method makes."""
    note: str = ""
    """What a reader of its site should know."""

    @property
    def nbytes(self) -> int:
        parts = [*self.operands.values(), *self.outliers.values()]
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def outputs(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What a linear that holds it makes of ``x``."""
        operands = [*self.operands.values(), bias]
        out: Tensor = spec(self.op).reference(x, *operands, **self.attrs)
        if self.outliers:
            size = {"out_features": out.shape[-1]}
            out = out + spec("sparse_linear").reference(x, *self.outliers.values(), **size)
        return out

    def dense(self, in_features: int) -> Tensor:
        """The matrix f32 ``[out, in]`` that it stands for: what it makes of unit vectors."""
        weight = self.operands["weight"] if self.op == "linear" else None
        if weight is not None:
            return weight.float()
        return self.outputs(torch.eye(in_features), None).float().T


def numbers(
    weight: Tensor, source: Tensor, *, sparsity: float | None = None, note: str = ""
) -> Stored:
    """The same linear with other numbers, of the shape and dtype of ``source``."""
    weight = weight.to(source.dtype)
    error = relative_error(source, weight)
    return Stored("linear", {"weight": weight}, error, sparsity=sparsity, note=note)


def relative_error(source: Tensor, weight: Tensor) -> float:
    """``||weight - source|| / ||source||`` in Frobenius norms, taken in float32."""
    source = source.float()
    gap = torch.linalg.norm(weight.float() - source)
    return float(gap / torch.linalg.norm(source).clamp_min(1e-30))


@dataclass(frozen=True)
class Shelved:
    """A stored form whose tensors are handles: those of a whole model need not be in memory."""

    form: Stored
    """Without its tensors."""
    nbytes: int
    operands: Sequence[tuple[str, Weight] | None]
    outliers: Sequence[tuple[str, Weight]]

    @classmethod
    def of(cls, form: Stored, spool: Spool) -> Shelved:
        return cls(
            replace(form, operands={}, outliers={}),
            form.nbytes,
            [
                None if tensor is None else (name, spool.store(tensor))
                for name, tensor in form.operands.items()
            ],
            [(name, spool.store(part)) for name, part in form.outliers.items()],
        )

    def read(self) -> Stored:
        """With its tensors."""
        operands = {
            str(i) if pair is None else pair[0]: None if pair is None else pair[1].read()
            for i, pair in enumerate(self.operands)
        }
        outliers = {name: weight.read() for name, weight in self.outliers}
        return replace(self.form, operands=operands, outliers=outliers)

    def put(self, view: View, linear: Linear, *, rule: str, step: int) -> None:
        """Let a linear hold it. Raises ``Refusal`` where the linear's type would change."""
        if self.form.op == "linear":
            ((_, weight),) = (pair for pair in self.operands if pair is not None)
            view.set_weight(linear.weight, weight)
            return
        # A linear that feeds this one directly may have been swapped since sites were chosen.
        current = replace(linear, x=view.tensor(linear.node))
        swapped = swap(
            view, current, self.form.op, self.operands, self.form.attrs, rule=rule, step=step
        )
        if self.outliers:
            named = [(f"{linear.name}.outliers.{name}", part) for name, part in self.outliers]
            graft(
                view, swapped.out, swapped.x, "sparse_linear", named,
                {"out_features": linear.out_features}, rule=rule, step=step,
            )  # fmt: skip


TIED = "its weight is tied to an embedding, which keeps it: nothing would be saved"


def reason_against_storing(view: View, linear: Linear) -> str | None:
    """Why a linear's weight cannot be stored in another form; ``None`` where it can."""
    if view.op(linear.node) != "linear":
        bits = view.attrs(linear.node).get("bits")
        return "its weight is quantized already" + (f", to {bits} bits" if bits else "")
    weight = view.weight(linear.weight)
    if weight is None or not weight.dtype.is_floating_point:
        return "its weight is not a floating-point constant"
    if any(view.op(user) != "linear" for user in readers(view, linear.weight)):
        return f"{TIED}; quantize{{embeddings=8}} stores both"
    return None
