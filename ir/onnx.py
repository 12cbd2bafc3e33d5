"""``OnnxView``: an ``onnx_ir.Model`` seen through the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from .errors import InvalidGraph, Refusal
from .infer import agree
from .onnx_parts import (
    PLAIN,
    SCOPE_KEYS,
    TORCH_DTYPES,
    After,
    captured,
    decode,
    dim_of,
    encode,
    has_subgraph,
    innermost_scope,
    insert,
    is_plain_model,
    is_used,
    name_everything,
    set_type,
    subgraphs,
)
from .onnx_table import BUILDERS, DOMAIN, READERS
from .tensors import WeightTensor, has_weight, tensor_of, weight_of
from .types import UNKNOWN, UNKNOWN_DIM, Type, substitute, unify
from .view import NATIVE, Attr, Node, Operand, Origin, Source, Value, View
from .vocab import complete_attrs, spec
from .weights import Weight

RULE_KEY = "graphwright.rule"
STEP_KEY = "graphwright.pass"


class OnnxView(View):
    """An ONNX graph. Constant nodes become initializers; functions and subgraphs stay as they are.

    ``model`` is owned by the view and edited in place (a copy of it, where torch's exporter has
    just made it); ``copy`` gives an independent one.
    """

    kind: ClassVar[Literal["fx", "onnx"]] = "onnx"

    def __init__(self, model: onnx_ir.Model, *, source: Source | None = None) -> None:
        # Values of torch's exporter build nodes when compared; copies are plain.
        model = model if is_plain_model(model) else model.clone()
        self.model = model
        self.source = source or Source()
        self.origin: Origin | None = None
        self._before: onnx_ir.Node | None = None
        self._constants: dict[Any, onnx_ir.Value] = {}
        self._handles: dict[onnx_ir.Value, tuple[Any, Weight]] = {}
        self._by_key: dict[Any, onnx_ir.Value] = {}
        self._emitted: list[onnx_ir.Node] = []
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        self.value_names, self._node_names = name_everything(model.graph)
        # Nodes inside a subgraph stand for the node of the graph that holds it.
        self._owners = {g: node for node in model.graph for g in subgraphs(node)}

    # --- reading -----------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        return iter(self.model.graph)

    def op(self, node: Node) -> str:
        if node.domain == DOMAIN:
            return str(node.op_type)
        for name, reader, partial in READERS.get((node.domain, node.op_type), ()):
            if not partial or reader(node) is not None:
                return name
        return NATIVE

    def native_op(self, node: Node) -> str:
        return f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type)

    def read(self, node: Node) -> tuple[str, tuple[Operand, ...], Mapping[str, Attr]] | None:
        if node.domain == DOMAIN:
            inputs = list(node.inputs)
            while inputs and inputs[-1] is None:
                inputs.pop()
            return str(node.op_type), tuple(inputs), decode(node)
        for name, reader, _ in READERS.get((node.domain, node.op_type), ()):
            reading = reader(node)
            if reading is not None:
                return name, *reading
        return None

    def operands(self, node: Node) -> tuple[Operand, ...]:
        reading = self.read(node)
        return tuple(v for v in node.inputs if v is not None) if reading is None else reading[1]

    def attrs(self, node: Node) -> Mapping[str, Attr]:
        reading = self.read(node)
        if reading is not None:
            return reading[2]
        return {k: a.value for k, a in node.attributes.items() if a.type in PLAIN}

    def results(self, node: Node) -> tuple[Value, ...]:
        return tuple(node.outputs)

    def producer(self, value: Value) -> Node | None:
        node: Node | None = value.producer()
        return node

    def users(self, value: Value) -> tuple[Node, ...]:
        nodes = value.consumers()
        if not self._owners:
            return tuple(nodes)
        return tuple(dict.fromkeys(self._owners.get(node.graph, node) for node in nodes))

    def is_output(self, value: Value) -> bool:
        return bool(value.is_graph_output())

    def inputs(self) -> tuple[Value, ...]:
        initializers = self.model.graph.initializers
        return tuple(v for v in self.model.graph.inputs if v.name not in initializers)

    def outputs(self) -> tuple[Value, ...]:
        return tuple(self.model.graph.outputs)

    def input_names(self) -> tuple[str, ...]:
        return tuple(str(v.name) for v in self.inputs())

    def output_names(self) -> tuple[str, ...]:
        return tuple(str(v.name) for v in self.outputs())

    def type(self, value: Value) -> Type:
        shape, dtype = value.shape, value.dtype
        if shape is None or dtype is None:
            const = value.const_value
            shape = getattr(const, "shape", None) if shape is None else shape
            dtype = getattr(const, "dtype", None) if dtype is None else dtype
            if shape is None and dtype is None:
                return UNKNOWN
        return Type(
            None if dtype is None else TORCH_DTYPES.get(dtype),
            None if shape is None else tuple([dim_of(d) for d in shape.dims]),
        )

    def name(self, item: Node | Value) -> str:
        return str(item.name)

    def scope(self, node: Node) -> str:
        for key in SCOPE_KEYS:
            text = node.metadata_props.get(key)
            if text:
                return innermost_scope(text)
        return ""

    def weight(self, value: Operand) -> Weight | None:
        if not isinstance(value, onnx_ir.Value) or value.const_value is None:
            return None
        tensor = value.const_value
        cached = self._handles.get(value)
        if cached is not None and cached[0] is tensor:
            return cached[1]
        if not has_weight(tensor):
            return None
        weight = weight_of(tensor)
        self._handles[value] = (tensor, weight)
        return weight

    def weights(self) -> Mapping[str, Weight]:
        found = {n: self.weight(v) for n, v in self.model.graph.initializers.items()}
        return {name: weight for name, weight in found.items() if weight is not None}

    def metadata(self) -> dict[str, str]:
        return self.model.metadata_props

    # --- editing -----------------------------------------------------------------------------

    def build(
        self,
        op: str,
        operands: Sequence[Operand],
        attrs: Mapping[str, Attr] | None = None,
        *,
        before: Node,
        name: str | None = None,
        like: Value | None = None,
    ) -> Value:
        full = complete_attrs(op, attrs)
        least, most = spec(op).arity
        if len(operands) < least or (most is not None and len(operands) > most):
            raise Refusal(f"{op} takes {least} to {most} operands, not {len(operands)}", before)
        types = self._infer(op, operands, full, before) if like is None else (self.type(like),)
        self._before = before
        self._emitted.clear()
        try:
            return self._spell(op, operands, full, types, name)
        except Refusal:
            for node in reversed(self._emitted):
                self._remove(node)
                if self.journal is not None:
                    self.journal.remove(node)
            raise

    def _spell(
        self,
        op: str,
        operands: Sequence[Operand],
        attrs: Mapping[str, Attr],
        types: tuple[Type, ...],
        name: str | None,
    ) -> Value:
        builder = BUILDERS.get(op)
        if builder is None or not self._spells(op):
            outputs = len(types)
            node = self.emit(op, self._as_values(operands), attrs, domain=DOMAIN, outputs=outputs)
        else:
            node = builder(self, operands, attrs)
        if name is not None:
            self._rename(node, name)
        for value, type_ in zip(node.outputs, types, strict=True):
            set_type(value, type_)
        for part in self._emitted:
            if part is not node:
                self._type_part(part)
        return node.outputs[0]

    def _type_part(self, node: onnx_ir.Node) -> None:
        """Type a node that is only a part of how an op is spelled."""
        reading = self.read(node)
        if reading is None:
            return
        op, operands, attrs = reading
        for value, type_ in zip(
            node.outputs, self._infer(op, operands, attrs, node), strict=False
        ):
            set_type(value, type_)

    def retype(self, value: Value, like: Value) -> None:
        if value.dtype == like.dtype and value.shape is not None and value.shape == like.shape:
            return
        known, wanted = self.type(value), self.type(like)
        if not agree(known, wanted):
            raise Refusal(f"the replacement is {known}, {wanted} is needed", value.producer())
        set_type(value, unify(wanted, known))

    def _spells(self, op: str) -> bool:
        return op != "gelu" or self.model.graph.opset_imports.get("", 0) >= 20

    def _as_values(self, operands: Sequence[Operand]) -> list[onnx_ir.Value | None]:
        like = next((o for o in operands if isinstance(o, onnx_ir.Value)), None)
        return [
            o if o is None or isinstance(o, onnx_ir.Value) else self.scalar(o, like)
            for o in operands
        ]

    def _infer(
        self, op: str, operands: Sequence[Operand], attrs: Mapping[str, Attr], before: Node
    ) -> tuple[Type, ...]:
        types = [self.type(o) if isinstance(o, onnx_ir.Value) else o for o in operands]
        try:
            return spec(op).infer(types, attrs)
        except (ValueError, IndexError) as error:
            raise Refusal(f"{op} does not fit its operands: {error}", before) from None

    def _rename(self, node: Node, name: str) -> None:
        self._node_names.free(node.name)
        node.name = self._node_names.take(name)

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

    def rewire(self, node: Node, old: Value, new: Value) -> None:
        for index, value in enumerate(node.inputs):
            if value is old:
                node.replace_input_with(index, new)
        if not self._same_type(old, new):
            self.refresh_types([node])

    def clone(
        self, node: Node, values: Mapping[Value, Value], *, before: Node
    ) -> tuple[Value, ...]:
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
            value.name = self.value_names.take(str(value.name))
            self.model.graph.register_initializer(value)

    def splice(self, nodes: Sequence[onnx_ir.Node], *, before: Node) -> None:
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

    def at(self, before: Node) -> None:
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
        found = self._constants.get(key)
        if found is not None and found.name in self.model.graph.initializers:
            return found
        value = self._register("const", onnx_ir.Tensor(array))
        self._constants[key] = value
        return value

    def _register(self, base: str, tensor: onnx_ir.TensorProtocol) -> onnx_ir.Value:
        name = self.value_names.take(base)
        value = onnx_ir.Value(
            name=name,
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.model.graph.register_initializer(value)
        return value

    def add_weight(self, name: str, weight: Weight) -> Value:
        shared = self._by_key.get(weight.key)
        # A key may be an address, and what was stored there may be gone by now.
        if shared is not None and shared.name in self.model.graph.initializers:
            held = self.weight(shared)
            if held is not None and held.key == weight.key:
                return shared
        value = self._register(name, tensor_of(weight, name))
        assert value.const_value is not None
        value.const_value.name = value.name
        self._by_key[weight.key] = value
        return value

    def replace(self, old: Value, new: Value) -> None:
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

    def _same_type(self, old: onnx_ir.Value, new: onnx_ir.Value) -> bool:
        if old.dtype == new.dtype and old.shape is not None and old.shape == new.shape:
            return True
        return agree(self.type(old), self.type(new))

    def refresh_type(self, node: Node) -> bool:
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

    def name_dim(self, value: Value, axis: int, name: str) -> None:
        shape = list(self.type(value).shape or ())
        if shape and shape[axis] == UNKNOWN_DIM:
            shape[axis] = name
            set_type(value, self.type(value).with_shape(shape))

    def renew_types(self, nodes: Iterable[Node], old: str, new: str) -> None:
        for node in nodes:
            for value in node.outputs:
                known = self.type(value)
                shape = [substitute(d, old, new) for d in known.shape or ()]
                set_type(value, known if known.shape is None else known.with_shape(shape))

    def _take_output(self, index: int, old: Value, new: Value) -> None:
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

    def set_operand(self, node: Node, index: int, operand: Operand) -> None:
        current = self.operands(node)[index]
        if not isinstance(current, onnx_ir.Value):
            raise Refusal(f"operand {index} of {node.name} is spelled as a number", node)
        if not isinstance(operand, onnx_ir.Value):
            operand = self.scalar(operand, current)
        places = [i for i, value in enumerate(node.inputs) if value is current]
        before = [o is current for o in self.operands(node)[:index]].count(True)
        node.replace_input_with(places[before], operand)
        if not self._same_type(current, operand):
            self.refresh_types([node])

    def erase(self, node: Node) -> None:
        if is_used(node):
            users = [str(u.name) for v in node.outputs for u in v.consumers()]
            used = ", ".join(users) or "the graph's output"
            raise InvalidGraph(f"{node.name} is still used by {used}")
        self._remove(node)

    def _remove(self, node: onnx_ir.Node) -> None:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
        self._node_names.free(node.name)
        self.model.graph.remove(node)

    def erase_dead(self, node: Node) -> list[Node]:
        erased: list[Node] = []
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

    def set_weight(self, value: Value, weight: Weight) -> None:
        old = self.weight(value)
        if old is None or (old.shape, old.dtype) != (weight.shape, weight.dtype):
            raise InvalidGraph(f"{value.name}: {weight} cannot stand for {old}")
        value.const_value = tensor_of(weight, str(value.name))

    def drop_unused_weights(self) -> int:
        graph = self.model.graph
        dead = [
            name
            for name, value in graph.initializers.items()
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input()
        ]
        for name in dead:
            self._handles.pop(graph.initializers[name], None)
            del graph.initializers[name]
            self.value_names.free(name)
        return len(dead)

    def add_input(self, name: str, like: Value) -> Value:
        value = onnx_ir.Value(name=self.value_names.take(name))
        set_type(value, self.type(like))
        self.model.graph.inputs.append(value)
        return value

    def set_inputs(self, named: Mapping[str, Value]) -> None:
        initializers = self.model.graph.initializers
        kept, inputs = list(named.values()), self.model.graph.inputs
        gone = set(self.inputs()) - set(kept)
        for value in gone:
            if value.uses() or value.is_graph_output():
                raise InvalidGraph(f"the input {value.name} is still used")
        for value in gone:
            self._set_aside(value)
        overridable = [v for v in inputs if v.name in initializers]
        inputs.clear()
        inputs.extend([*kept, *overridable])
        self._name_values(named)

    def set_outputs(self, named: Mapping[str, Value]) -> None:
        kept = set(named.values())
        for value in set(self.outputs()) - kept:
            self._set_aside(value)
        self.model.graph.outputs.clear()
        given: dict[str, Value] = {}
        for name, value in named.items():
            given[name] = value
            # An output bears its own name, and an input or a second output cannot.
            if value.producer() is None or value in list(given.values())[:-1]:
                self._before = None
                given[name] = self.emit("Identity", [value]).outputs[0]
                set_type(given[name], self.type(value))
        self.model.graph.outputs.extend(given.values())
        self._name_values(given)

    def _set_aside(self, value: onnx_ir.Value) -> None:
        """Free the name of a value that is no input or output any more."""
        public = value.name
        value.name = self.value_names.take(f"{public}/replaced")
        self.value_names.free(public)

    def _name_values(self, named: Mapping[str, Value]) -> None:
        """Give values names that others of them, or no others in the graph, may bear now."""
        for name, value in named.items():
            if value.name != name:
                self.value_names.free(value.name)
                value.name = None
        for name, value in named.items():
            if value.name is None:
                value.name = self.value_names.take(name)

    def copy(self) -> OnnxView:
        view = OnnxView(self.model.clone(), source=self.source)
        view.origin = self.origin
        return view

    def after(self, node: Node) -> Node:
        return After(node)

    def arguments(self, node: Node) -> tuple[Value, ...]:
        values = dict.fromkeys(v for v in node.inputs if v is not None)
        if has_subgraph(node):
            values.update(dict.fromkeys(captured(node)))
        return tuple(values)

    def execute(self, node: Node, args: Sequence[Any]) -> tuple[Any, ...]:
        from .onnx_execute import execute

        return execute(self, node, dict(zip(self.arguments(node), args, strict=True)))
