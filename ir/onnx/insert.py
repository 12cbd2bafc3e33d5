"""``OnnxInserter``: how nodes, constants and weights come into an ``onnx_ir.Model``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
import torch

from ..core.errors import Refusal
from ..core.tensors import WeightTensor, tensor_of
from ..core.types import Type
from ..core.view import Attr, Source
from ..core.weights import Weight
from ..vocab import check_arity, complete_attrs, spec
from ..vocab.onnx import DOMAIN
from .parts import (
    RULE_KEY,
    SCOPE_KEYS,
    STEP_KEY,
    After,
    Operand,
    Place,
    encode,
    has_subgraph,
    insert,
    set_type,
)
from .read import OnnxReader


class OnnxInserter(OnnxReader):
    """The building half of ``onnx.OnnxView``: also the ``Emitter`` of ``vocab.onnx``."""

    def __init__(self, model: onnx_ir.Model, *, source: Source | None = None) -> None:
        super().__init__(model, source=source)
        self._before: Place | None = None
        self._emitted: list[onnx_ir.Node] = []
        self._constants: dict[Any, onnx_ir.Value] = {}
        self._by_key: dict[Any, onnx_ir.Value] = {}

    def build(
        self,
        op: str,
        operands: Sequence[Operand],
        attrs: Mapping[str, Attr] | None = None,
        *,
        before: Place | None,
        name: str | None = None,
        like: onnx_ir.Value | None = None,
    ) -> onnx_ir.Value:
        full = complete_attrs(op, attrs)
        check_arity(op, operands, before)
        types = self._infer(op, operands, full, before) if like is None else (self.type(like),)
        self._before = before
        self._emitted.clear()
        try:
            return self._write(op, operands, full, types, name)
        except Refusal:
            for node in reversed(self._emitted):
                self._remove(node)
                if self.journal is not None:
                    self.journal.remove(node)
            raise

    def _write(
        self,
        op: str,
        operands: Sequence[Operand],
        attrs: Mapping[str, Attr],
        types: tuple[Type, ...],
        name: str | None,
    ) -> onnx_ir.Value:
        form = spec(op).onnx
        if form is None or form.build is None:
            outputs = len(types)
            node = self.emit(op, self._as_values(operands), attrs, domain=DOMAIN, outputs=outputs)
        else:
            node = form.build(self, operands, attrs)
        if name is not None:
            self._rename(node, name)
        for value, type_ in zip(node.outputs, types, strict=True):
            set_type(value, type_)
        for part in self._emitted:
            if part is not node:
                self._type_part(part)
        return node.outputs[0]

    def _type_part(self, node: onnx_ir.Node) -> None:
        """Type a node that is only a part of how an op is written."""
        reading = self.read(node)
        if reading is None:
            return
        op, operands, attrs = reading
        for value, type_ in zip(
            node.outputs, self._infer(op, operands, attrs, node), strict=False
        ):
            set_type(value, type_)

    def _as_values(self, operands: Sequence[Operand]) -> list[onnx_ir.Value | None]:
        like = next((o for o in operands if isinstance(o, onnx_ir.Value)), None)
        return [
            o if o is None or isinstance(o, onnx_ir.Value) else self.scalar(o, like)
            for o in operands
        ]

    def _infer(
        self, op: str, operands: Sequence[Operand], attrs: Mapping[str, Attr], before: Place | None
    ) -> tuple[Type, ...]:
        types = [self.type(o) if isinstance(o, onnx_ir.Value) else o for o in operands]
        try:
            return spec(op).infer(types, attrs)
        except (ValueError, IndexError) as error:
            raise Refusal(f"{op} does not fit its operands: {error}", before) from None

    def _rename(self, node: onnx_ir.Node, name: str) -> None:
        self._node_names.free(node.name)
        node.name = self._node_names.take(name)

    def rename(self, value: onnx_ir.Value, name: str) -> None:
        """Name a value, and the node whose first result it is; a taken name gets a number."""
        self.edits += 1
        self.value_names.free(value.name)
        value.name = self.value_names.take(name)
        maker = value.producer()
        if maker is not None and value.index() == 0:
            self._rename(maker, name)

    def emit(
        self,
        op_type: str,
        inputs: Sequence[Any],
        attrs: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> onnx_ir.Node:
        """Insert one native node before the place that ``build`` or ``at`` has set."""
        node = onnx_ir.Node(
            domain,
            op_type,
            list(inputs),
            encode(attrs or {}),
            num_outputs=outputs,
        )
        self._place(node)
        return node

    def _place(self, node: onnx_ir.Node) -> None:
        self.edits += 1
        base = self._before.name if self._before is not None else None
        label = f"{base}/{node.op_type}" if base else str(node.op_type)
        node.name = self._node_names.take(label)
        for value in node.outputs:
            value.name = self.value_names.take(f"{node.name}:{value.index()}")
        if self.origin is not None:
            node.metadata_props[RULE_KEY] = self.origin.rule
            node.metadata_props[STEP_KEY] = str(self.origin.step)
        if self._before is None:
            self.model.graph.append(node)
        else:
            for key in SCOPE_KEYS:
                if key in self._before.metadata_props:
                    node.metadata_props[key] = self._before.metadata_props[key]
            insert(node, self._before)
        if node.domain:
            self.model.graph.opset_imports.setdefault(node.domain, 1)
        self._emitted.append(node)
        if self.journal is not None:
            self.journal.append(node)

    def clone(
        self, node: onnx_ir.Node, values: Mapping[onnx_ir.Value, onnx_ir.Value],
        *, before: Place,
    ) -> tuple[onnx_ir.Value, ...]:
        if has_subgraph(node):
            raise Refusal("a node that holds a subgraph is not copied", node)
        inputs = [None if v is None else values.get(v, v) for v in node.inputs]
        copied = onnx_ir.Node(
            node.domain, node.op_type, inputs, list(node.attributes.values()),
            overload=node.overload, num_outputs=len(node.outputs),
        )  # fmt: skip
        self._before = before
        self._place(copied)
        for key in SCOPE_KEYS:
            if key in node.metadata_props:
                copied.metadata_props[key] = node.metadata_props[key]
        for old, new in zip(node.outputs, copied.outputs, strict=True):
            set_type(new, self.type(old))
        return tuple(copied.outputs)

    def adopt(self, initializers: Iterable[onnx_ir.Value]) -> None:
        """Take recorded initializers into the graph, under names of their own.

        A handle that the graph has taken in before is shared.
        """
        for value in initializers:
            if isinstance(value.const_value, WeightTensor):
                shared = self.add_weight(str(value.name), value.const_value.raw)
                value.replace_all_uses_with(shared)
                continue
            self.edits += 1
            value.name = self.value_names.take(str(value.name))
            self.model.graph.register_initializer(value)

    def splice(self, nodes: Sequence[onnx_ir.Node], *, before: Place) -> None:
        """Insert recorded native nodes, named and marked as if they were built here.

        ``Constant`` nodes among them become initializers; equal ones are shared.
        """
        self._before = before
        for node in nodes:
            if node.op_type == "Constant" and node.domain == "":
                value = self._constant(node.attributes["value"].value.numpy())
                node.outputs[0].replace_all_uses_with(value)
                continue
            self._place(node)

    def at(self, before: Place | None) -> None:
        """Let ``emit`` insert before this node (``build`` sets the place itself)."""
        self._before = before

    def integers(self, values: Sequence[int]) -> onnx_ir.Value:
        return self._constant(np.asarray(list(values), dtype=np.int64))

    def scalar(self, number: Any, like: onnx_ir.Value | None) -> onnx_ir.Value:
        if isinstance(number, torch.Tensor):
            return self._constant(number.numpy())
        dtype = like.dtype.numpy() if like is not None and like.dtype is not None else None
        if isinstance(number, float) and dtype is not None and dtype.kind in "iub":
            raise Refusal(f"the number {number:g} meets a tensor of {dtype}: cast it first")
        if dtype is None:
            dtype = np.dtype(np.float32 if isinstance(number, float) else np.int64)
        return self._constant(np.asarray(number, dtype=dtype))

    def _constant(self, array: np.ndarray[Any, Any]) -> onnx_ir.Value:
        key = (str(array.dtype), array.shape, array.tobytes())
        known = self._constants.get(key)
        # Its name may be another's by now, if nothing used it for a while.
        if known is not None and self.model.graph.initializers.get(str(known.name)) is known:
            return known
        value = self._register("const", onnx_ir.Tensor(array))
        self._constants[key] = value
        return value

    def _register(self, base: str, tensor: onnx_ir.TensorProtocol) -> onnx_ir.Value:
        self.edits += 1
        name = self.value_names.take(base)
        value = onnx_ir.Value(
            name=name,
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.model.graph.register_initializer(value)
        return value

    def add_weight(self, name: str, weight: Weight) -> onnx_ir.Value:
        shared = self._by_key.get(weight.key)
        # A key may be an address, and what was stored there may be gone by now.
        if shared is not None and self.model.graph.initializers.get(str(shared.name)) is shared:
            held = self.weight(shared)
            if held is not None and held.key == weight.key:
                return shared
        value = self._register(name, tensor_of(weight, name))
        assert value.const_value is not None
        value.const_value.name = value.name
        self._by_key[weight.key] = value
        return value

    def _remove(self, node: onnx_ir.Node) -> None:
        self.edits += 1
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
        self._node_names.free(node.name)
        self.model.graph.remove(node)

    def after(self, node: onnx_ir.Node) -> After:
        return After(node)
