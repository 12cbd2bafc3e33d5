"""``FxView``: the graph of a ``torch.export`` program seen through the vocabulary."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph
from torch.fx.node import Node as FxNode
from torch.fx.node import map_arg

from .errors import InvalidGraph, Refusal
from .fx_build import builder_of, call
from .fx_program import input_names, output_names, program_weight, refuse_mutation
from .fx_table import READERS, is_plain, own_op
from .infer import agree
from .types import UNKNOWN, Type
from .view import NATIVE, Attr, Node, Operand, Origin, Source, Value, View
from .vocab import complete_attrs, spec
from .weights import Weight

_GETITEM = operator.getitem
_SEVERAL = frozenset({"split", "topk"})
"""Ops with several results: their types are needed at once, to make the ``getitem`` nodes."""
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class FxView(View):
    """A functional FX graph whose weights are placeholders bound to lazy handles.

    Build one with ``from_program``. ``weight_names`` maps each weight placeholder to its qualified
    name, ``program`` is the export that the graph came from (for its calling convention; ``None``
    for a graph that was parsed or built, which can be rewritten and run but not exported).
    """

    kind: ClassVar[Literal["fx", "onnx"]] = "fx"

    def __init__(
        self,
        graph: Graph,
        program: ExportedProgram | None,
        weights: dict[str, Weight],
        names: tuple[tuple[str, ...], tuple[str, ...]],
        source: Source,
        symbols: Mapping[str, str],
    ) -> None:
        self.graph = graph
        self.program = program
        self.source = source
        self.origin: Origin | None = None
        self.symbols = dict(symbols)
        self._weights = weights
        self._names = names
        self._metadata: dict[str, str] = {}
        self._placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self._output = next(n for n in reversed(graph.nodes) if n.op == "output")
        self._by_key: dict[Any, FxNode] = {}
        self._dim_text: dict[Any, str] = {}

    @classmethod
    def from_program(
        cls,
        program: ExportedProgram,
        *,
        weights: Mapping[str, Weight] | None = None,
        source: Source | None = None,
        dim_names: Mapping[str, str] | None = None,
    ) -> FxView:
        """View a program that ``run_decompositions({})`` has made functional.

        ``weights`` gives handles by qualified name for parameters whose tensors in the program are
        fake; ``dim_names`` maps the exporter's symbols (``s43``) to names (``batch``). Raises
        ``BadInput`` where the graph mutates its inputs or holds in-place ops.
        """
        refuse_mutation(program)
        graph = Graph()
        mapping: dict[FxNode, FxNode] = {}
        outputs = graph.graph_copy(program.graph, mapping)
        graph.output(outputs)
        handles: dict[str, Weight] = {}
        specs = {s.arg.name: s for s in program.graph_signature.input_specs}
        for original, node in mapping.items():
            if node.target in _VIEWS:
                # A view is legal by the clone before it, which `clean` drops; a reshape always is.
                node.target = torch.ops.aten.reshape.default
                _write_out_size(node)
            if node.op != "placeholder":
                continue
            spec_ = specs[original.name]
            if spec_.kind not in _WEIGHT_KINDS:
                continue
            target = str(spec_.target)
            node.meta["weight"] = target
            handles[target] = (weights or {}).get(target) or program_weight(program, target)
        names = input_names(program), output_names(program)
        return cls(graph, program, handles, names, source or Source(), dim_names or {})

    # --- reading -----------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target is not _GETITEM:
                yield node

    def op(self, node: Node) -> str:
        entry = READERS.get(node.target)
        if entry is None:
            return own_op(node.target)
        name, reader, partial = entry
        return NATIVE if partial and reader(node) is None else name

    def native_op(self, node: Node) -> str:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            return str(target)
        return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"

    def operands(self, node: Node) -> tuple[Operand, ...]:
        reading = self.read(node)
        return tuple(node.all_input_nodes) if reading is None else reading[1]

    def attrs(self, node: Node) -> Mapping[str, Attr]:
        reading = self.read(node)
        if reading is not None:
            return reading[2]
        plain = {f"arg{i}": a for i, a in enumerate(node.args) if is_plain(a)}
        return plain | {k: v for k, v in node.kwargs.items() if is_plain(v)}

    def read(self, node: Node) -> tuple[str, tuple[Operand, ...], Mapping[str, Attr]] | None:
        entry = READERS.get(node.target)
        if entry is not None:
            reading = entry[1](node)
            return None if reading is None else (entry[0], *reading)
        name = own_op(node.target)
        if name == NATIVE:
            return None
        operands = list(node.args)
        while operands and operands[-1] is None:
            operands.pop()
        return name, tuple(operands), {**spec(name).attrs, **node.kwargs}

    def results(self, node: Node) -> tuple[Value, ...]:
        if not isinstance(node.meta.get("val"), (tuple, list)):
            return (node,)
        items = [u for u in node.users if u.target is _GETITEM]
        return tuple(sorted(items, key=lambda u: u.args[1]))

    def producer(self, value: Value) -> Node | None:
        if value.op != "call_function":
            return None
        return value.args[0] if value.target is _GETITEM else value

    def users(self, value: Value) -> tuple[Node, ...]:
        return tuple(u for u in value.users if u.op != "output")

    def is_output(self, value: Value) -> bool:
        return self._output in value.users

    def inputs(self) -> tuple[Value, ...]:
        return tuple(n for n in self._placeholders if "weight" not in n.meta)

    def outputs(self) -> tuple[Value, ...]:
        return tuple(self._output.args[0])

    def input_names(self) -> tuple[str, ...]:
        return self._names[0]

    def output_names(self) -> tuple[str, ...]:
        return self._names[1]

    def type(self, value: Value) -> Type:
        val = value.meta.get("val")
        if val is None and value.op == "call_function":
            val = self._refresh(value)
        if isinstance(val, torch.Tensor):
            return Type(val.dtype, tuple(self._dim(d) for d in val.shape))
        if isinstance(val, int | torch.SymInt):
            return Type(torch.int64, ())
        return UNKNOWN

    def _dim(self, dim: int | torch.SymInt) -> int | str:
        if isinstance(dim, int):
            return dim
        expr = dim.node.expr
        text = self._dim_text.get(expr)
        if text is None:
            text = re.sub(r"[a-z]+\d+", lambda m: self.symbols.get(m[0], m[0]), str(expr))
            self._dim_text[expr] = text
        return int(text) if text.isdigit() else text

    def _refresh(self, node: FxNode) -> Any:
        """Compute the fake value of a node whose type an edit left open, its operands first."""
        pending = [node]
        while pending:
            current = pending[-1]
            open_ = [n for n in current.all_input_nodes if n.meta.get("val") is None]
            if open_:
                pending.extend(open_)
                continue
            args, kwargs = map_arg((current.args, current.kwargs), lambda n: n.meta["val"])
            try:
                with self._fake_mode():
                    current.meta["val"] = current.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise Refusal(
                    f"{self.native_op(current)} does not fit its operands: {error}", current
                ) from None
            pending.pop()
        return node.meta["val"]

    def _fake_mode(self) -> Any:
        for node in self._placeholders:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None:
                return mode
        raise InvalidGraph("the graph has no typed input")

    def name(self, item: Node | Value) -> str:
        weight = item.meta.get("weight")
        return str(weight) if weight is not None else str(item.name)

    def scope(self, node: Node) -> str:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return ""
        path = str(list(stack.values())[-1][0])
        return re.sub(r"^L(?:__self___?|\['self'\])\.?", "", path)

    def weight(self, value: Operand) -> Weight | None:
        if not isinstance(value, FxNode):
            return None
        name = value.meta.get("weight") if value.op == "placeholder" else None
        return None if name is None else self._weights[name]

    def weights(self) -> Mapping[str, Weight]:
        return self._weights

    def metadata(self) -> dict[str, str]:
        return self._metadata

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
        for operand in operands:
            # Readers and builders look at the ranks of operands.
            if isinstance(operand, FxNode) and operand.meta.get("val") is None:
                self._refresh(operand)
        first = before.prev
        with self.graph.inserting_before(before):
            node = builder_of(op)(self.graph, operands, full)
            if name is not None:
                node._rename(name)
            for made in _between(first, before):
                self._adopt(made, before)
            try:
                return self._typed(op, node, like, before)
            except Refusal:
                while before.prev is not first:
                    self.graph.erase_node(before.prev)
                raise
            finally:
                if self.journal is not None:
                    inserted = _between(first, before)
                    self.journal.extend(n for n in inserted if n.target is not _GETITEM)

    def _typed(self, op: str, node: FxNode, like: Value | None, before: FxNode) -> FxNode:
        """Type what must be typed at once: parts of a spelling, and several results."""
        if node.prev in node.all_input_nodes and node.prev.meta.get("val") is None:
            self._refresh(node.prev)
        if like is not None and like.meta.get("val") is not None:
            node.meta["val"] = like.meta["val"]
            return node
        if op not in _SEVERAL or not isinstance(self._refresh(node), (tuple, list)):
            return node
        items = [call(self.graph, _GETITEM, (node, i)) for i in range(len(node.meta["val"]))]
        for item in items:
            self._adopt(item, before)
        return items[0]

    def retype(self, value: Value, like: Value) -> None:
        if value.meta.get("val") is not None:
            return
        declared = like.meta.get("val")
        if isinstance(declared, torch.Tensor):
            self._check_fit(value, self.type(like))
        value.meta["val"] = declared

    def _check_fit(self, node: FxNode, declared: Type) -> None:
        """Refuse a node whose operands, as far as they are typed, contradict its declared type."""
        reading = self.read(node)
        if reading is None or any(
            isinstance(o, FxNode) and o.meta.get("val") is None for o in reading[1]
        ):
            return
        op, operands, attrs = reading
        types = [self.type(o) if isinstance(o, FxNode) else o for o in operands]
        try:
            found = spec(op).infer(types, attrs)[0]
        except (ValueError, IndexError) as error:
            raise Refusal(f"{op} does not fit its operands: {error}", node) from None
        if not agree(found, declared):
            raise Refusal(f"the replacement is {found}, {declared} is needed", node)

    def rewire(self, node: Node, old: Value, new: Value) -> None:
        node.replace_input_with(old, new)
        if not self._same_type(old, new):
            self.refresh_types([node])

    def clone(
        self, node: Node, values: Mapping[Value, Value], *, before: Node
    ) -> tuple[Value, ...]:
        mapping: dict[FxNode, FxNode] = {}
        with self.graph.inserting_before(before):
            for old in dict.fromkeys((node, *self.results(node))):
                new = self.graph.node_copy(
                    old, lambda n: mapping.get(n) or values.get(n) or n
                )
                new.meta = dict(old.meta)
                if self.origin is not None:
                    new.meta["graphwright"] = self.origin
                mapping[old] = new
        if self.journal is not None:
            self.journal.append(mapping[node])
        return tuple(mapping[value] for value in self.results(node))

    def _adopt(self, node: FxNode, near: FxNode) -> None:
        stack = near.meta.get("nn_module_stack")
        meta = node.meta
        if stack is not None:
            meta.setdefault("nn_module_stack", stack)
        if self.origin is not None:
            meta["graphwright"] = self.origin

    def add_weight(self, name: str, weight: Weight) -> Value:
        shared = self._by_key.get(weight.key)
        # A key may be an address, and what was stored there may be gone by now.
        if shared is not None and self._weights[shared.meta["weight"]].key == weight.key:
            return shared
        unique = name
        count = 1
        while unique in self._weights:
            unique = f"{name}_{count}"
            count += 1
        inputs = (i for i, n in enumerate(self._placeholders) if "weight" not in n.meta)
        place = next(inputs, len(self._placeholders))
        following = next(iter(self.graph.nodes))
        if place:
            following = self._placeholders[place - 1].next
        with self.graph.inserting_before(following):
            node = self.graph.placeholder(re.sub(r"\W", "_", f"w_{unique}"))
        with self._fake_mode():
            node.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype)
        node.meta["weight"] = unique
        self._weights[unique] = weight
        self._by_key[weight.key] = node
        self._placeholders.insert(place, node)
        return node

    def replace(self, old: Value, new: Value) -> None:
        maker = self.producer(new)
        users = [user for user in old.users if user is not maker]
        for user in users:
            user.replace_input_with(old, new)
        if not self._same_type(old, new):
            self.refresh_types(u for u in users if u.op == "call_function")

    def _same_type(self, old: FxNode, new: FxNode) -> bool:
        before = old.meta.get("val")
        if before is None or before is new.meta.get("val"):
            return True
        return agree(self.type(old), self.type(new))

    def refresh_type(self, node: Node) -> bool:
        before = [self.type(value) for value in self.results(node)]
        items = [u for u in node.users if u.target is _GETITEM]
        for stale in (node, *items):
            stale.meta["val"] = None
            self._refresh(stale)
        after = [self.type(value) for value in self.results(node)]
        return not all(agree(a, b) for a, b in zip(before, after, strict=True))

    def name_dim(self, value: Value, axis: int, name: str) -> None:
        """A dimension that is a symbol has a name; one that the example made a number becomes a
        symbol of its own."""
        # Here, as they load half of the compiler.
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        known = value.meta["val"] if value.meta.get("val") is not None else self._refresh(value)
        if not isinstance(known.shape[axis], int):
            return
        mode = self._fake_mode()
        source = ConstantSource(f"dim_{len(self.symbols)}_{value.name}")
        symbol = mode.shape_env.create_symbol(
            known.shape[axis], source, DimDynamic.DYNAMIC, None, do_not_specialize_zero_one=True
        )
        size = mode.shape_env.create_symintnode(symbol, hint=known.shape[axis], source=source)
        self.symbols[str(symbol)] = name
        shape = [size if i == axis else d for i, d in enumerate(known.shape)]
        with mode:
            value.meta["val"] = torch.empty(shape, dtype=known.dtype)

    def renew_types(self, nodes: Iterable[Node], old: str, new: str) -> None:
        for node in nodes:
            try:
                self.refresh_type(node)
            except Refusal as refusal:
                raise InvalidGraph(f"{node.name}: {refusal.reason}") from None

    def set_operand(self, node: Node, index: int, operand: Operand) -> None:
        reading = self.read(node)
        if reading is None:
            node.replace_input_with(node.all_input_nodes[index], operand)
            old = None
        else:
            op, operands, attrs = reading
            old = operands[index]
            changed = [operand if i == index else o for i, o in enumerate(operands)]
            with self.graph.inserting_before(node):
                spelled = builder_of(op)(self.graph, changed, attrs)
            node.target, node.args, node.kwargs = spelled.target, spelled.args, spelled.kwargs
            self.graph.erase_node(spelled)
        values = (v for v in (old, operand) if isinstance(v, FxNode))
        if len(pair := tuple(values)) < 2 or not self._same_type(*pair):
            self.refresh_types([node])

    def erase(self, node: Node) -> None:
        for item in [u for u in node.users if u.target is _GETITEM and not u.users]:
            self.graph.erase_node(item)
        if node.users:
            users = ", ".join(u.name for u in node.users)
            raise InvalidGraph(f"{node.name} is still used by {users}")
        self.graph.erase_node(node)

    def erase_dead(self, node: Node) -> list[Node]:
        erased: list[Node] = []
        stack = [node]
        while stack:
            current = stack.pop()
            items = [u for u in current.users if u.target is _GETITEM and not u.users]
            if len(items) < len(current.users):
                continue
            producers = current.all_input_nodes
            for item in items:
                self.graph.erase_node(item)
            self.graph.erase_node(current)
            erased.append(current)
            for value in producers:
                maker = None if value.users else self.producer(value)
                if maker is not None and maker not in stack:
                    stack.append(maker)
        return erased

    def set_weight(self, value: Value, weight: Weight) -> None:
        old = self._weights[value.meta["weight"]]
        if (old.shape, old.dtype) != (weight.shape, weight.dtype):
            raise InvalidGraph(f"{self.name(value)}: {weight} cannot stand for {old}")
        self._weights[value.meta["weight"]] = weight

    def drop_unused_weights(self) -> int:
        dead = [n for n in self._placeholders if "weight" in n.meta and not n.users]
        for node in dead:
            del self._weights[node.meta["weight"]]
            self.graph.erase_node(node)
        gone = set(dead)
        self._placeholders = [n for n in self._placeholders if n not in gone]
        self._by_key = {k: n for k, n in self._by_key.items() if n not in gone}
        return len(dead)

    def add_input(self, name: str, like: Value) -> Value:
        with self.graph.inserting_after(self._placeholders[-1]):
            node = self.graph.placeholder(re.sub(r"\W", "_", name))
        node.meta["val"] = like.meta.get("val")
        self._placeholders.append(node)
        self._names = ((*self._names[0], name), self._names[1])
        return node

    def set_inputs(self, named: Mapping[str, Value]) -> None:
        kept = list(named.values())
        gone = set(self.inputs()) - set(kept)
        for node in gone:
            if node.users:
                raise InvalidGraph(f"the input {node.name} is still used")
        for node in gone:
            self.graph.erase_node(node)
        weights = [n for n in self._placeholders if "weight" in n.meta]
        self._placeholders = [*weights, *kept]
        for before, node in zip(self._placeholders, self._placeholders[1:], strict=False):
            before.append(node)
        self._names = (tuple(named), self._names[1])

    def set_outputs(self, named: Mapping[str, Value]) -> None:
        self._output.args = (tuple(named.values()),)
        self._names = (self._names[0], tuple(named))

    def copy(self) -> FxView:
        graph = Graph()
        mapping: dict[FxNode, FxNode] = {}
        graph.output(graph.graph_copy(self.graph, mapping))
        view = FxView(
            graph, self.program, dict(self._weights), self._names, self.source, self.symbols
        )
        view._metadata = dict(self._metadata)
        view.origin = self.origin
        view._by_key = {key: mapping[node] for key, node in self._by_key.items()}
        return view

    def after(self, node: Node) -> Node:
        place = node.next
        while place.target is _GETITEM and place.args[0] is node:
            place = place.next
        return place

    def to_module(self) -> torch.nn.Module:
        """A module that runs the graph, all weights read into memory; inputs are positional.

        It returns a tuple of the outputs.
        """
        from .fx_program import to_module

        return to_module(self)

    def to_program(self) -> ExportedProgram:
        """The graph as an exported program whose weights are fake; see ``fx_program``."""
        from .fx_program import to_program

        return to_program(self)

    def arguments(self, node: Node) -> tuple[Value, ...]:
        return tuple(node.all_input_nodes)

    def execute(self, node: Node, args: Sequence[Any]) -> tuple[Any, ...]:
        env = dict(zip(node.all_input_nodes, args, strict=True))
        call_args, call_kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        value = node.target(*call_args, **call_kwargs)
        if isinstance(node.meta.get("val"), tuple | list):
            return tuple(value[item.args[1]] for item in self.results(node))
        return (value,)


def _write_out_size(node: FxNode) -> None:
    """Replace the size -1 by the number that it stands for: of an empty tensor it may be any."""
    sizes = zip(node.args[1], node.meta["val"].shape, strict=True)  # type: ignore[arg-type]
    found = [size if given == -1 and isinstance(size, int) else given for given, size in sizes]
    node.args = (node.args[0], found)


def _between(first: FxNode, last: FxNode) -> Iterator[FxNode]:
    node = first.next
    while node is not last:
        yield node
        node = node.next
