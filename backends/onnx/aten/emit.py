"""What a form of an ATen op builds with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import onnx_ir
import torch
from onnx_ir import Value
from onnx_ir.tensor_adapters import from_torch_dtype
from torch.fx.node import Node as FxNode

from ....ir.core.errors import Refusal
from ....ir.core.types import Dim, Type
from ....ir.onnx.builder import OnnxBuilder
from ....ir.onnx.parts import End, Operand, set_type
from ....ir.onnx.view import OnnxView

aten = torch.ops.aten
Form = Callable[..., Any]


class Emit(OnnxBuilder):
    """Builds at the end of an ONNX graph, in the name and scope of one FX node.

    ``e.add(x, 1)`` builds an op of the vocabulary, ``e.native`` a node that it has no word for.
    """

    def __init__(self, view: OnnxView, node: FxNode, place: End, result: Type) -> None:
        super().__init__(view, place)
        self.node = node
        self.result = result

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the node's result."""
        if self.result.dtype is None:
            raise Refusal("the result is not a tensor", self.node)
        return self.result.dtype

    def native(
        self, op_type: str, inputs: Sequence[Value | None],
        attrs: Mapping[str, Any] | None = None, type_: Type | None = None,
    ) -> Value:  # fmt: skip
        """A node of stock ONNX; its type is that of the FX node unless another is given."""
        self.view.at(self.before)
        value = self.view.emit(op_type, inputs, attrs).outputs[0]
        set_type(value, self.result if type_ is None else type_)
        return value

    def shape(self, x: Value) -> tuple[Dim, ...]:
        shape = self.view.type(x).shape
        if shape is None:
            raise Refusal(f"the shape of {self.view.name(x)} is not known", self.node)
        return shape

    def rank(self, x: Value) -> int:
        return len(self.shape(x))

    def dims(self, x: Value) -> list[Operand]:
        """The sizes of a value: numbers where they are known, else taken in the graph."""
        sizes = enumerate(self.shape(x))
        return [d if isinstance(d, int) else self.size(x, dim=i) for i, d in sizes]

    def number(self, number: Operand, dtype: torch.dtype) -> Value:
        """A number, or a size, as a tensor without dimensions."""
        if isinstance(number, Value):
            return self.cast_to(number, dtype)
        if not dtype.is_floating_point:
            number = bool(number) if dtype == torch.bool else int(number or 0)
        like = Value(name=None, type=onnx_ir.TensorType(from_torch_dtype(dtype)))
        return self.view.scalar(number, like)

    @overload
    def cast_to(self, x: Value, dtype: torch.dtype) -> Value: ...

    @overload
    def cast_to(self, x: Operand, dtype: torch.dtype) -> Operand: ...

    def cast_to(self, x: Operand, dtype: torch.dtype) -> Operand:
        """A tensor in a dtype. A number takes that of the tensor that it meets, and of whole
        numbers as many bits as that has: torch compares a u8 with 255 where -1 is written."""
        if isinstance(x, int) and dtype != torch.bool and not dtype.is_floating_point:
            return int(torch.tensor(x).to(dtype))
        if not isinstance(x, Value) or self.view.type(x).dtype == dtype:
            return x
        return self.cast(x, dtype=dtype)

    def vector(self, items: Sequence[Operand]) -> Value:
        """Numbers and sizes in a row: i64 ``[len(items)]``."""
        numbers = [item for item in items if isinstance(item, int)]
        if len(numbers) == len(items):
            return self.view.integers(numbers)
        parts = [
            self.view.integers([item]) if isinstance(item, int) else self.reshape(item, 1)
            for item in items
        ]
        return self.concat(*parts, dim=0)
