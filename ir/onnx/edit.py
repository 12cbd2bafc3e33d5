"""``OnnxEditor``: how what an ``onnx_ir.Model`` holds is replaced, typed anew and removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir

from ..core.errors import InvalidGraph, Refusal
from ..core.tensors import tensor_of
from ..core.types import UNKNOWN_DIM, Type, agree, substitute, unify
from ..core.weights import Weight
from .insert import OnnxInserter
from .parts import Operand, is_used, set_type


class OnnxEditor(OnnxInserter):
    """The changing half of ``onnx.OnnxView``."""

    def rewire(self, node: onnx_ir.Node, old: onnx_ir.Value, new: onnx_ir.Value) -> None:
        self.edits += 1
        for index, value in enumerate(node.inputs):
            if value is old:
                node.replace_input_with(index, new)
        if not self._same_type(old, new):
            self.refresh_types([node])

    def replace(self, old: onnx_ir.Value, new: onnx_ir.Value) -> None:
        self.edits += 1
        maker = new.producer()
        uses = [(node, index) for node, index in old.uses() if node is not maker]
        for node, index in uses:
            node.replace_input_with(index, new)
        if uses and not self._same_type(old, new):
            self.refresh_types(self._owners.get(node.graph, node) for node, _ in uses)
        if old.is_graph_output():
            outputs = self.model.graph.outputs
            for i in [i for i, output in enumerate(outputs) if output is old]:
                self._take_output(i, old, new)

    def _take_output(self, index: int, old: onnx_ir.Value, new: onnx_ir.Value) -> None:
        """The graph's outputs keep their names whichever value they are made by."""
        if new.is_graph_output() or new.producer() is None:
            self._before = None
            passed = self.emit("Identity", [new]).outputs[0]
            set_type(passed, self.type(new))
            new = passed
        public = old.name
        self.model.graph.outputs[index] = new
        old.name = self.value_names.take(f"{public}/replaced")
        new.name = public

    def set_operand(self, node: onnx_ir.Node, index: int, operand: Operand) -> None:
        current = self.operands(node)[index]
        if not isinstance(current, onnx_ir.Value):
            raise Refusal(f"operand {index} of {node.name} is written as a number", node)
        if not isinstance(operand, onnx_ir.Value):
            operand = self.scalar(operand, current)
        self.edits += 1
        places = [i for i, value in enumerate(node.inputs) if value is current]
        before = [o is current for o in self.operands(node)[:index]].count(True)
        node.replace_input_with(places[before], operand)
        if not self._same_type(current, operand):
            self.refresh_types([node])

    def erase(self, node: onnx_ir.Node) -> None:
        if is_used(node):
            users = [str(u.name) for v in node.outputs for u in v.consumers()]
            used = ", ".join(users) or "the graph's output"
            raise InvalidGraph(f"{node.name} is still used by {used}")
        self._remove(node)

    def erase_dead(self, node: onnx_ir.Node) -> list[onnx_ir.Node]:
        erased: list[onnx_ir.Node] = []
        stack = [node]
        while stack:
            current = stack.pop()
            if is_used(current):
                continue
            values = self.arguments(current)
            self._remove(current)
            erased.append(current)
            for value in values:
                maker = value.producer()
                if maker is not None and maker not in stack and not value.uses():
                    stack.append(maker)
        return erased

    def set_weight(self, value: onnx_ir.Value, weight: Weight) -> None:
        old = self.weight(value)
        if old is None or (old.shape, old.dtype) != (weight.shape, weight.dtype):
            raise InvalidGraph(f"{value.name}: {weight} cannot stand for {old}")
        self.edits += 1
        value.const_value = tensor_of(weight, str(value.name))

    def resize_weight(self, value: onnx_ir.Value, weight: Weight) -> None:
        self.edits += 1
        value.const_value = tensor_of(weight, str(value.name))
        self._handles.pop(value, None)
        set_type(value, Type(weight.dtype, weight.shape))
        self.refresh_types(self._owners.get(node.graph, node) for node, _ in value.uses())

    def drop_unused_weights(self) -> int:
        graph = self.model.graph
        dead = [
            name
            for name, value in graph.initializers.items()
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input()
        ]
        self.edits += len(dead)
        for name in dead:
            self._handles.pop(graph.initializers[name], None)
            del graph.initializers[name]
            self.value_names.free(name)
        return len(dead)

    def add_input(self, name: str, like: onnx_ir.Value) -> onnx_ir.Value:
        self.edits += 1
        value = onnx_ir.Value(name=self.value_names.take(name))
        set_type(value, self.type(like))
        self.model.graph.inputs.append(value)
        return value

    def set_inputs(self, named: Mapping[str, onnx_ir.Value]) -> None:
        self.edits += 1
        initializers = self.model.graph.initializers
        values, inputs = list(named.values()), self.model.graph.inputs
        gone = set(self.inputs()) - set(values)
        for value in gone:
            if value.uses() or value.is_graph_output():
                raise InvalidGraph(f"the input {value.name} is still used")
        for value in gone:
            self._set_aside(value)
        overridable = [v for v in inputs if v.name in initializers]
        inputs.clear()
        inputs.extend([*values, *overridable])
        self._name_values(named)

    def set_outputs(self, named: Mapping[str, onnx_ir.Value]) -> None:
        self.edits += 1
        values = set(named.values())
        for value in set(self.outputs()) - values:
            self._set_aside(value)
        self.model.graph.outputs.clear()
        outputs: dict[str, onnx_ir.Value] = {}
        for name, value in named.items():
            outputs[name] = value
            # An output bears its own name, and an input or a second output cannot.
            if value.producer() is None or value in list(outputs.values())[:-1]:
                self._before = None
                outputs[name] = self.emit("Identity", [value]).outputs[0]
                set_type(outputs[name], self.type(value))
        self.model.graph.outputs.extend(outputs.values())
        self._name_values(outputs)

    def _set_aside(self, value: onnx_ir.Value) -> None:
        """Free the name of a value that is not an input or output any more."""
        public = value.name
        value.name = self.value_names.take(f"{public}/replaced")
        self.value_names.free(public)

    def _name_values(self, named: Mapping[str, onnx_ir.Value]) -> None:
        """Give values names that others of them, or no others in the graph, may bear now."""
        for name, value in named.items():
            if value.name != name:
                self.value_names.free(value.name)
                value.name = None
        for name, value in named.items():
            if value.name is None:
                value.name = self.value_names.take(name)

    def retype(self, value: onnx_ir.Value, like: onnx_ir.Value) -> None:
        if value.dtype == like.dtype and value.shape is not None and value.shape == like.shape:
            return
        known, declared = self.type(value), self.type(like)
        if not agree(known, declared):
            raise Refusal(f"the replacement is {known}, {declared} is needed", value.producer())
        set_type(value, unify(declared, known))

    def _same_type(self, old: onnx_ir.Value, new: onnx_ir.Value) -> bool:
        if old.dtype == new.dtype and old.shape is not None and old.shape == new.shape:
            return True
        return agree(self.type(old), self.type(new))

    def refresh_type(self, node: onnx_ir.Node) -> bool:
        before = [self.type(value) for value in node.outputs]
        reading = self.read(node)
        if reading is None:
            after = [t.with_shape(t.shape and [UNKNOWN_DIM] * len(t.shape)) for t in before]
        else:
            op, operands, attrs = reading
            after = list(self._infer(op, operands, attrs, node))
        for value, type_ in zip(node.outputs, after, strict=False):
            set_type(value, type_)
        return before != after

    def name_dim(self, value: onnx_ir.Value, axis: int, name: str) -> None:
        shape = list(self.type(value).shape or ())
        if shape and shape[axis] == UNKNOWN_DIM:
            shape[axis] = name
            set_type(value, self.type(value).with_shape(shape))

    def renew_types(self, nodes: Iterable[onnx_ir.Node], old: str, new: str) -> None:
        for node in nodes:
            for value in node.outputs:
                known = self.type(value)
                shape = [substitute(d, old, new) for d in known.shape or ()]
                set_type(value, known if known.shape is None else known.with_shape(shape))
