"""From an FX graph to an ONNX graph, node by node over the vocabulary.

A node of the vocabulary is built as it is read; one of ``aten`` by its form there. What is in
neither goes through ``torch.onnx``, that node alone, or the whole graph where that fails: the
graph's metadata says so under ``TRANSLATION_KEY``. No weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir
import torch
from onnx_ir import Value
from torch.fx.node import Node as FxNode
from torch.fx.node import map_arg

from ...ir.core.errors import BadInput, InvalidGraph, Refusal
from ...ir.core.heap import uncollected
from ...ir.core.tensors import tensor_of
from ...ir.core.types import UNKNOWN_DIM, Type, mentions
from ...ir.core.weights import MemoryWeight
from ...ir.fx.read import Operand as FxOperand
from ...ir.fx.read import item_index
from ...ir.fx.view import FxView
from ...ir.onnx.parts import End, Names, Operand, set_type
from ...ir.onnx.view import OnnxView
from ...ir.rewrite.cleanup import clean, fold_constants
from ...ir.vocab import rules, spec
from .aten import FORMS, Emit
from .aten.elementwise import OF_BOOLS
from .aten.sizes import is_never_negative

OPSET = 21
"""The ONNX opset of an export.

It has ``Gelu`` (20) and block-wise ``DequantizeLinear`` (21). A target whose forms need more
raises it (``forms.attention_node``: 23).
"""
IR_VERSION = 10
SCOPE_KEY = "graphwright.scope"
TRANSLATION_KEY = "graphwright.translation"
"""Metadata: what of the graph ``torch.onnx`` has translated, one remark a line."""
_FOLD_BYTES = 1 << 16
"""Enough for shapes, positions and masks of a fixed size; weights are left as they are."""
_REDUCTION = spec("sum").infer
_ONE_DTYPE = (rules.same, rules.elementwise, _REDUCTION)
"""Type rules of ops that ONNX wants all operands of in the dtype of the result."""


@uncollected()
def translated(view: FxView) -> OnnxView:
    """The FX graph as an ONNX graph, our own ops still in their own domain; ``view`` stays.

    Inputs, outputs, weights and named dimensions keep their names, nodes their module and the rule
    that made them. Constants are folded, repeated work is merged. Raises ``BadInput`` where an op
    has no ONNX form, naming it and its module.
    """
    try:
        onnx = _Translator(view).run()
    except _WholeGraph as reason:
        onnx = _by_exporter(view, str(reason))
    onnx.metadata().update(view.metadata())
    return onnx


class _WholeGraph(Exception):
    """Why a graph cannot be translated node by node."""


def _by_exporter(view: FxView, reason: str) -> OnnxView:
    from .torch_onnx import to_onnx

    cleaned = view.copy()
    clean(cleaned)
    model = to_onnx(
        cleaned.to_program(), cleaned.weights(), view.input_names(), view.output_names(),
        view.symbols,
    )  # fmt: skip
    onnx = OnnxView(model, source=view.source)
    onnx.metadata()[TRANSLATION_KEY] = f"the whole graph went through torch.onnx: {reason}"
    return onnx


class _Translator:
    """One FX graph on its way. ``values`` holds what stands for each FX value."""

    def __init__(self, view: FxView) -> None:
        self.fx = view
        self.live = _live(view)
        self.values: dict[FxNode, Value] = {}
        self.new_names = _edited_names(view)
        self.remarks: dict[str, None] = {}
        self.exported: dict[str, onnx_ir.Model] = {}
        self.onnx = OnnxView(self._start(), source=view.source)
        self.onnx.journal = []

    def _start(self) -> onnx_ir.Model:
        """A model that has inputs and weights, and nothing else."""
        names = Names((*self.fx.input_names(), *self.fx.output_names()))
        inputs = []
        for name, node in zip(self.fx.input_names(), self.fx.inputs(), strict=True):
            self.values[node] = Value(name=name)
            set_type(self.values[node], self.fx.type(node))
            inputs.append(self.values[node])
        graph = onnx_ir.Graph(inputs, [], nodes=[], opset_imports={"": OPSET}, name="main_graph")
        for node in self.fx.graph.nodes:
            if node.op == "placeholder" and "weight" in node.meta and node in self.live:
                self.values[node] = _weight(self.fx, node, names)
                graph.register_initializer(self.values[node])
        return onnx_ir.Model(graph, ir_version=IR_VERSION, producer_name="graphwright")

    def run(self) -> OnnxView:
        for node in self.fx.nodes():
            if node in self.live:
                self._translate(node)
        self.onnx.origin = self.onnx.journal = None
        outputs = [self.values[node] for node in self.fx.outputs()]
        self.onnx.set_outputs(dict(zip(self.fx.output_names(), outputs, strict=True)))
        fold_constants(self.onnx, max_bytes=_FOLD_BYTES)
        clean(self.onnx)
        if self.remarks:
            self.onnx.metadata()[TRANSLATION_KEY] = "\n".join(self.remarks)
        return self.onnx

    # --- one node -------------------------------------------------------------------------------

    def _translate(self, node: FxNode) -> None:
        assert self.onnx.journal is not None
        self.onnx.journal.clear()
        self.onnx.origin = node.meta.get("graphwright")
        emit = Emit(self.onnx, node, self._place(node), self.fx.type(node))
        reading = self.fx.read(node)
        if reading is None:
            self._note(node, self._of_table(emit, node))
        else:
            self._note(node, self._of_vocabulary(emit, node, *reading))

    def _place(self, node: FxNode) -> End:
        scope = self.fx.scope(node)
        return End(self.onnx.model.graph, node.name, {SCOPE_KEY: scope} if scope else {})

    def _of_vocabulary(
        self, emit: Emit, node: FxNode, op: str, operands: tuple[FxOperand, ...],
        attrs: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        mapped = [self._mapped(operand) for operand in operands]
        if op == "identity":
            return mapped[0]
        if op == "cast":
            return emit.cast_to(mapped[0], attrs["dtype"])
        if op == "arange":
            counted = _arange(emit, mapped, emit.dtype)
            set_type(counted, self._joined(node, self.onnx.type(counted), emit.result))
            return counted
        op, mapped, attrs = _fitted(emit, op, mapped, attrs)
        kinds = [self.onnx.type(o) if isinstance(o, Value) else o for o in mapped]
        try:
            inferred = spec(op).infer(kinds, {**spec(op).attrs, **attrs})
        except (ValueError, IndexError) as error:
            raise InvalidGraph(f"{node.name}: {op} does not fit its operands: {error}") from None
        if not _is_several(node):
            like = _typed(self._joined(node, inferred[0], emit.result, op == "slice"))
            return emit.build(op, *mapped, like=like, **attrs)
        value = emit.build(op, *mapped, **attrs)
        results = self.onnx.results(self.onnx.maker(value))
        for item in self.fx.results(node):
            place = item_index(item)
            set_type(results[place], self._joined(node, inferred[place], self.fx.type(item)))
        return results

    def _of_table(self, emit: Emit, node: FxNode) -> Any:
        if _is_complex(node):
            raise _WholeGraph(f"{node.name} computes with complex numbers")
        form = FORMS.get(node.target)
        if form is None:
            return self._by_exporter(emit, node, "")
        try:
            output = form(emit, *self._arguments(node))
        except Refusal as refusal:
            return self._by_exporter(emit, node, f" ({refusal.reason})")
        if not _is_several(node) and output.producer() in (self.onnx.journal or ()):
            set_type(output, self._joined(node, self.onnx.type(output), emit.result))
        return output

    def _by_exporter(self, emit: Emit, node: FxNode, why: str) -> Any:
        """``torch.onnx``'s form of a node that we have none for."""
        # Here, as it loads all of the exporter, which most graphs do without.
        from .torch_onnx import NoForm
        from .torch_onnx_node import export_node

        native = self.fx.native_op(node)
        for part in reversed(list(self.onnx.journal or ())):
            self.onnx.erase(part)  # what a form had built before it refused
        fresh = Emit(self.onnx, node, self._place(node), emit.result)  # its place was behind those
        try:
            output = export_node(fresh, self.fx, self.values, self.exported)
        except NoForm:
            known = _known(self.fx, node)
            if known is None:
                raise
            return self.onnx.add_weight(node.name, MemoryWeight(known))
        except BadInput as error:
            raise _WholeGraph(f"{native} ({node.name}) does not go through it alone") from error
        self.remarks[f"{native} went through torch.onnx{why}"] = None
        return output

    def _joined(
        self, node: FxNode, inferred: Type, declared: Type, is_slice: bool = False
    ) -> Type:
        """The type that follows from the operands, its dimensions in the names of the FX graph.

        A tracer vouches for every dimension. What an edit of the graph made a number may be a size
        of the example (how many tokens a step drops), and a cache that lost tokens is no longer as
        long as its name says: there a number, and what a slice leaves, stay open unless they follow
        from the operands, or an edit has given them a name.
        """
        if declared.shape is None or inferred.rank not in (None, declared.rank):
            return inferred if declared.dtype is None else declared
        if "graphwright" not in node.meta:
            return declared
        dims = []
        for a, b in zip(inferred.shape or declared.shape, declared.shape, strict=True):
            named = isinstance(b, str) and (
                not is_slice or any(mentions(b, name) for name in self.new_names)
            )
            dims.append(b if named and not isinstance(a, int) else a)
        if inferred.shape is None:
            dims = [d if isinstance(d, str) else UNKNOWN_DIM for d in dims]
        return Type(declared.dtype, tuple(dims))

    def _arguments(self, node: FxNode) -> list[Any]:
        if not isinstance(node.target, torch._ops.OpOverload):
            return [self._mapped(arg) for arg in node.args]
        schema = node.target._schema.arguments
        arguments = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
        return [self._mapped(arguments.get(a.name, a.default_value)) for a in schema]

    def _mapped(self, arg: Any) -> Any:
        if isinstance(arg, FxNode):
            return self.values[arg]
        if isinstance(arg, list | tuple):
            return [self._mapped(item) for item in arg]
        return arg

    def _note(self, node: FxNode, output: Any) -> None:
        """Let what was made stand for the node; what is new bears the node's name."""
        results = dict.fromkeys([node], output)
        if _is_several(node):
            items = [item for item in self.fx.results(node) if item in self.live]
            results = {item: output[item_index(item)] for item in items}
        for result, value in results.items():
            if value.producer() in (self.onnx.journal or ()):
                self.onnx.rename(value, result.name)
            self.values[result] = value


def _live(view: FxView) -> set[FxNode]:
    """What the outputs are made of: checks and what nobody reads are not translated."""
    live: set[FxNode] = set()
    pending: list[FxNode] = list(view.outputs())
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(node.all_input_nodes)
    return live


def _known(view: FxView, node: FxNode) -> torch.Tensor | None:
    """What a node of constants gives; ``None`` where it is made of inputs, or of large weights."""
    if "weight" in node.meta:
        handle = view.weights()[view.name(node)]
        return handle.read() if handle.nbytes <= _FOLD_BYTES else None
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    known = {part: _known(view, part) for part in node.all_input_nodes}
    if any(tensor is None for tensor in known.values()):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
    result = node.target(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else None


def _weight(view: FxView, node: FxNode, names: Names) -> Value:
    """An initializer that wraps the handle of a weight."""
    name = view.name(node)
    handle, declared = view.weights()[name], view.type(node)
    if handle.dtype.is_complex:
        raise _WholeGraph(f"the weight {name} is complex")
    if handle.shape != declared.shape:
        shape = list(declared.shape or ())
        raise BadInput(f"weight {name}: the graph has {shape}, its handle {handle}")
    name = names.take(name)
    value = Value(name=name, const_value=tensor_of(handle, name))
    set_type(value, Type(handle.dtype, handle.shape))
    return value


def _is_several(node: FxNode) -> bool:
    return isinstance(node.meta.get("val"), tuple | list)


def _is_complex(node: FxNode) -> bool:
    vals = (n.meta.get("val") for n in (node, *node.all_input_nodes))
    return any(isinstance(v, torch.Tensor) and v.is_complex() for v in vals)


def _edited_names(view: FxView) -> set[str]:
    """Names of dimensions that edits have made: the tracer's are in the types of the inputs."""
    dims = [d for value in view.inputs() for d in view.type(value).shape or ()]
    return {n for n in view.symbols.values() if not any(mentions(d, n) for d in dims)}


def _typed(type_: Type) -> Value:
    """A value that is nowhere, to build results ``like``."""
    value = Value(name=None)
    set_type(value, type_)
    return value


# --- what ATen leaves to the runtime and ONNX wants to be said ---------------------------------


def _fitted(
    e: Emit, op: str, operands: Sequence[Operand], attrs: Mapping[str, Any]
) -> tuple[str, list[Operand], Mapping[str, Any]]:
    """The operands in the dtypes that ONNX takes together, and a reduction's dimensions."""
    declared = spec(op)
    if declared.own or _is_several(e.node):
        return op, list(operands), attrs
    if op in _LOGICAL:
        return op, [_boolean(e, o) for o in operands], attrs
    if declared.infer is rules.comparison and len(operands) == 2:
        kinds = [e.view.type(o) if isinstance(o, Value) else o for o in operands]
        dtype = rules.promote(kinds)
        if dtype == torch.bool and op in _ORDERS:
            dtype = torch.int32
        return op, [o if dtype is None else e.cast_to(o, dtype) for o in operands], attrs
    if op == "where" and e.dtype == torch.bool:
        bits = [e.number(e.cast_to(o, torch.uint8), torch.uint8) for o in operands[1:]]
        return "cast", [e.where(operands[0], *bits)], {"dtype": torch.bool}
    if op == "where":
        return op, [operands[0], *_alternatives(e, operands[1:])], attrs
    if declared.infer not in _ONE_DTYPE:
        return op, list(operands), attrs
    if op in _OF_INTEGERS and not e.dtype.is_floating_point:
        op, attrs = _OF_INTEGERS[op]
        return op, list(operands), attrs
    if e.dtype == torch.bool:
        op = OF_BOOLS.get(op, op)
    x = operands[0]
    if declared.infer is _REDUCTION and isinstance(x, Value) and not attrs["dims"]:
        attrs = {**attrs, "dims": tuple(range(e.rank(x)))}
    return op, [e.cast_to(o, e.dtype) for o in operands], attrs


_LOGICAL = frozenset({"logical_and", "logical_or", "logical_not"})
_OF_INTEGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("clamp", {"min": 0}), "floor": ("identity", {}),
}  # fmt: skip
"""What these ops are on whole numbers, which ONNX Runtime has them not of."""
_ORDERS = frozenset({"lt", "le", "gt", "ge"})
"""Comparisons that ONNX has of numbers only."""


def _boolean(e: Emit, operand: Operand) -> Operand:
    return e.cast_to(operand, torch.bool) if isinstance(operand, Value) else bool(operand)


def _alternatives(e: Emit, operands: Sequence[Operand]) -> list[Operand]:
    if any(isinstance(o, Value) for o in operands):
        return [e.cast_to(o, e.dtype) for o in operands]
    return [e.number(o, e.dtype) for o in operands]


def _arange(e: Emit, operands: Sequence[Operand], dtype: torch.dtype) -> Value:
    """arange of sizes counts in int64 and is cast: ONNX's Range has the dtype of its operands."""
    if not any(isinstance(o, Value) for o in operands):
        return e.arange(*operands, dtype=dtype)
    whole = not any(isinstance(o, float) for o in operands)
    base = torch.int64 if whole else dtype
    start, end, step = (e.cast_to(o, base) for o in operands)
    if whole and isinstance(step, int) and not (step > 0 and _starts_at_zero_or_above(e.node)):
        return e.cast_to(_counted(e, start, end, step), dtype)
    return e.cast_to(e.arange(start, end, step, dtype=base), dtype)


def _starts_at_zero_or_above(node: FxNode) -> bool:
    return len(node.args) == 1 or is_never_negative(node.args[0])


def _counted(e: Emit, start: Operand, end: Operand, step: int) -> Value:
    """arange(start, end, step) => start + step arange(0, count)

    Where a Range is an index, ONNX Runtime's optimizer (1.31) makes a Slice of its three operands,
    to which the end -1 is the last place and the start -n the first one.
    """
    distance = e.sub(end, start) if step > 0 else e.sub(start, end)
    count = e.div(e.add(distance, abs(step) - 1), abs(step))
    return e.add(e.mul(e.arange(0, count, 1, dtype=torch.int64), step), start)
