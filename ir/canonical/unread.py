"""Products with a constant matrix that no rule made a linear, and why: nothing is silent.

A vector that multiplies, such as the frequencies of rotary positions, is not a matrix; a factor of
a low-rank path, stored narrow and cast, belongs to the linear that it corrects.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from ..core.errors import Refusal
from ..core.view import NATIVE, Node, Operand, Value, View, is_value
from ..onnx.forms import as_node, native_node
from ..onnx.parts import subgraphs
from ..rewrite.rule import Rule
from . import einsum, linear
from .families import FUSED

_FACTORS = {"matmul": 2, "linear": 2, "conv": 2, "sdpa": 3}
"""How many of the first operands of an op of the vocabulary are factors of a product."""
_NATIVE_PRODUCTS = frozenset({
    "Gemm", "Einsum", "MatMulInteger", "QLinearMatMul", "Conv", "ConvInteger", "QLinearConv",
    "ConvTranspose", "DeformConv", "LSTM", "GRU", "RNN", "Attention",
    "aten.addmm.default", "aten.baddbmm.default", "aten.einsum.default", "aten.mv.default",
    "aten.bilinear.default", "aten.addbmm.default", "aten.addmv.default", "aten.tensordot.default",
    "aten.conv1d.default", "aten.conv1d.padding", "aten.conv2d.default", "aten.conv2d.padding",
    "aten.conv3d.default", "aten.conv3d.padding", "aten.convolution.default",
    "aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input",
    "aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input",
    "aten._grouped_mm.default", "aten._int_mm.default", "aten._scaled_mm.default",
})  # fmt: skip
"""The native ops that multiply by matrices, under the names of ONNX and of ATen."""
_OF_CODES = frozenset({"MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv"})
"""Those of them whose operands are whole numbers."""


@dataclass(frozen=True)
class UnreadProduct:
    """A product with a constant matrix that is not a linear."""

    name: str
    reason: str
    size: int
    """Numbers of the constant."""


def unread_products(view: View, linears: Container[Node]) -> list[UnreadProduct]:
    """The products with a constant of two or more dimensions that are not among ``linears``, those
    in the bodies of ``If``, ``Loop`` and ``Scan`` too; linear in the size of the graph."""
    reasons = _Reasons(view)
    products: list[UnreadProduct] = []
    computed: set[Value] = set()
    for node, holder in _all_nodes(view):
        arguments = view.arguments(node)
        if arguments and all(_is_constant(view, v, computed) for v in arguments):
            computed.update(view.results(node))
            continue
        if node in linears:
            continue
        constant = _matrix(view, node, computed)
        if constant is None or _is_factor(view, node, constant):
            continue
        reason = reasons.of(node, constant) if holder is None else _inside(view, holder)
        name = _name(view, node, constant)
        products.append(UnreadProduct(name, reason, view.type(constant).numel or 0))
    return products


def _all_nodes(view: View) -> Iterator[tuple[Node, Node | None]]:
    """The nodes of the graph, and those of inner graphs with the node that holds them."""
    for node in view.nodes():
        yield node, None
        if view.kind == "onnx":
            for graph in subgraphs(native_node(node)):
                yield from ((as_node(inner), node) for inner in graph)


def _is_constant(view: View, value: Value, computed: Container[Value]) -> bool:
    return value in computed or view.weight(value) is not None


def _matrix(view: View, node: Node, computed: Container[Value]) -> Value | None:
    """The constant matrix that a node multiplies by."""
    op = view.op(node)
    operands: Iterable[Operand] = view.operands(node)[: _FACTORS.get(op, 0)]
    if op == NATIVE and _multiplies(view, node):
        operands = view.arguments(node)
    for operand in operands:
        if is_value(operand) and _is_constant(view, operand, computed):
            shape = view.type(operand).shape
            if shape is None or sum(size != 1 for size in shape) > 1:
                return operand
    return None


def _is_factor(view: View, node: Node, constant: Value) -> bool:
    """Structure takes a linear whose weight is cast for a site, unless it is such a factor."""
    maker = view.producer(constant)
    return view.op(node) == "linear" and maker is not None and view.op(maker) == "cast"


def _multiplies(view: View, node: Node) -> bool:
    """Whether a native op may multiply by a matrix: of those of other domains all may, but those
    that look up rows."""
    name = view.native_op(node)
    if name in _NATIVE_PRODUCTS:
        return True
    foreign = "::" in name if view.kind == "onnx" else not name.startswith("aten.")
    return foreign and "::Gather" not in name


# --- names and reasons ----------------------------------------------------------------------------


def _name(view: View, node: Node, constant: Value) -> str:
    """The path of the module that made the node, or the constant's name, or the node's."""
    stored = view.name(constant).removesuffix(".weight") if view.weight(constant) else ""
    return view.scope(node) or stored or view.name(node)


class _Reasons:
    """Why a product is not a linear: what the rule that would make it one says."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._rules: dict[str, list[Rule]] = {}
        for rule in (*linear.RULES, *einsum.RULES, *FUSED):
            instance = rule()
            self._rules.setdefault(instance.matcher().pattern.op, []).append(instance)

    def of(self, node: Node, constant: Value) -> str:
        view, op = self._view, self._view.op(node)
        native = view.native_op(node)
        if view.weight(constant) is None:
            maker = view.maker(constant)
            maker_op = view.native_op(maker) if view.op(maker) == NATIVE else view.op(maker)
            return f"its matrix is computed from constants by `{maker_op}`"
        if op == "matmul" and view.operands(node)[0] is constant:
            return "its constant is the left factor, which joins tokens rather than features"
        for rule in self._rules.get(native if op == NATIVE else op, ()):
            match = rule.matcher().match(view, node)
            if match is None:
                continue
            try:
                rule.where(match)
            except Refusal as refusal:
                return refusal.reason
        if op == NATIVE and native in _OF_CODES:
            return f"`{native}` multiplies codes of 8 bits: the file is quantized already"
        return f"`{native if op == NATIVE else op}` is not read as a linear"


def _inside(view: View, holder: Node) -> str:
    return f"it stands in a graph inside of `{view.native_op(holder)}` {view.name(holder)}"
