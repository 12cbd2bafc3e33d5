"""Ops on each number by itself: arithmetic, comparisons, logic, functions of one operand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
import torch
from torch import Tensor
from torch.fx import Graph, Node

from . import fx, onnx
from .fx import AtenForm, aten
from .onnx import OnnxForm
from .rules import comparison, elementwise, same
from .spec import Attrs, OpSpec

# --- two operands ---------------------------------------------------------------------------------


def _overloaded(
    name: str, op_type: str, *, commutative: bool = False, rule: Any = elementwise,
    also: tuple[onnx.Decoder, ...] = (), alias: str = "",
) -> OpSpec:  # fmt: skip
    """An op of the name that torch has it by, with an overload for a number; read by another name
    of torch's too."""
    overloads = getattr(aten, name)
    others = (getattr(aten, alias),) if alias else ()
    return OpSpec(
        name=name, operands=("a", "b"), infer=rule, reference=getattr(torch, name),
        commutative=commutative,
        aten=AtenForm(
            fx.tensor_or_scalar(overloads),
            (fx.sometimes(fx.binary, *(o for of in (overloads, *others)
                                       for o in (of.Tensor, of.Scalar))),),
        ),
        onnx=OnnxForm(onnx.same(op_type), (onnx.always(onnx.plain, op_type), *also)),
    )  # fmt: skip


def _two_inputs(node: onnx_ir.Node) -> onnx.Reading | None:
    return (tuple(node.inputs), {}) if len(node.inputs) == 2 else None


def _is_float(operand: Any) -> bool:
    return operand.is_floating_point() if isinstance(operand, Tensor) else type(operand) is float


def _div(a: Any, b: Any) -> Tensor:
    """Quotient; of integers it is truncated towards zero, as ONNX has it."""
    exact = _is_float(a) or _is_float(b)
    return torch.div(a, b, rounding_mode=None if exact else "trunc")


def _decode_div(node: Node) -> fx.Reading | None:
    """ATen divides integers into floats where the vocabulary truncates, as ONNX does."""
    if len(node.args) != 2 or node.kwargs.get("rounding_mode") == "floor":
        return None
    if all(map(fx.is_integral, node.args)) != (node.kwargs.get("rounding_mode") == "trunc"):
        return None
    return node.args, {}


def _build_div(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    if not all(fx.is_integral(o) for o in operands):
        return fx.tensor_or_scalar(aten.div)(graph, operands, attrs)
    a, b = operands
    if not isinstance(a, Node):
        a = fx.call(graph, aten.full_like.default, (b, a))
    target = aten.div.Tensor_mode if isinstance(b, Node) else aten.div.Scalar_mode
    return fx.call(graph, target, (a, b), {"rounding_mode": "trunc"})


def _build_pow(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    a, b = operands
    name = (
        "Scalar"
        if not isinstance(a, Node)
        else "Tensor_" + ("Tensor" if isinstance(b, Node) else "Scalar")
    )
    return fx.call(graph, getattr(aten.pow, name), (a, b))


def _read_pow(node: onnx_ir.Node) -> onnx.Reading | None:
    """ONNX gives the dtype of the base, torch that of both."""
    base, exponent = (None if value is None else value.dtype for value in node.inputs)
    if base is None or exponent is None or base == exponent:
        return tuple(node.inputs), {}
    keeps = base.is_floating_point() and not exponent.is_floating_point()
    return (tuple(node.inputs), {}) if keeps else None


def _pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(a, Tensor):
        a = torch.as_tensor(a, dtype=b.dtype)
    if not isinstance(b, Tensor):
        b = torch.as_tensor(b, dtype=a.dtype)
    return a, b


def _extremum(name: str, op_type: str, *others: Any) -> OpSpec:
    function = getattr(torch, name)
    target = getattr(aten, name).default
    return OpSpec(
        name=name, operands=("a", "b"), infer=elementwise, commutative=True,
        reference=lambda a, b: function(*_pair(a, b)),
        aten=AtenForm(fx.calls(target), (fx.sometimes(fx.binary, target, *others),)),
        onnx=OnnxForm(onnx.same(op_type), (onnx.sometimes(_two_inputs, op_type),)),
    )  # fmt: skip


ARITHMETIC = (
    _overloaded("add", "Add", commutative=True, also=(onnx.sometimes(_two_inputs, "Sum"),)),
    _overloaded("sub", "Sub"),
    _overloaded("mul", "Mul", commutative=True, alias="multiply"),
    OpSpec(
        name="div", operands=("a", "b"), infer=elementwise, reference=_div,
        aten=AtenForm(_build_div, (fx.sometimes(
            _decode_div, aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode,
            aten.div.Scalar_mode,
        ),)),
        onnx=OnnxForm(onnx.same("Div"), (onnx.always(onnx.plain, "Div"),)),
    ),
    OpSpec(
        name="pow", operands=("a", "b"), infer=elementwise, reference=torch.pow,
        aten=AtenForm(_build_pow, (fx.sometimes(
            fx.binary, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar,
        ),)),
        onnx=OnnxForm(onnx.same("Pow"), (onnx.sometimes(_read_pow, "Pow"),)),
    ),
    _extremum("maximum", "Max", aten.max.other),
    _extremum("minimum", "Min", aten.min.other),
)  # fmt: skip


# --- truth values ---------------------------------------------------------------------------------


def _build_ne(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    return b.emit("Not", [onnx.same("Equal")(b, operands, attrs).outputs[0]])


def _ne() -> OpSpec:
    overloads = aten.ne
    return OpSpec(
        name="ne", operands=("a", "b"), infer=comparison, reference=torch.ne, commutative=True,
        aten=AtenForm(
            fx.tensor_or_scalar(overloads),
            (fx.sometimes(fx.binary, overloads.Tensor, overloads.Scalar),),
        ),
        onnx=OnnxForm(_build_ne),
    )  # fmt: skip


def _logical(name: str, op_type: str, *bitwise: Any) -> OpSpec:
    target = getattr(aten, name).default
    return OpSpec(
        name=name, operands=("a", "b"), infer=comparison, reference=getattr(torch, name),
        commutative=True,
        aten=AtenForm(
            fx.calls(target),
            (fx.sometimes(fx.boolean, *bitwise), fx.sometimes(fx.binary, target)),
        ),
        onnx=OnnxForm(onnx.same(op_type), (onnx.always(onnx.plain, op_type),)),
    )  # fmt: skip


TRUTH = (
    _overloaded("eq", "Equal", commutative=True, rule=comparison),
    _ne(),
    _overloaded("lt", "Less", rule=comparison),
    _overloaded("le", "LessOrEqual", rule=comparison),
    _overloaded("gt", "Greater", rule=comparison),
    _overloaded("ge", "GreaterOrEqual", rule=comparison),
    _logical("logical_and", "And", aten.bitwise_and.Tensor, aten.__and__.Tensor),
    _logical("logical_or", "Or", aten.bitwise_or.Tensor, aten.__or__.Tensor),
    OpSpec(
        name="logical_not", operands=("x",), infer=comparison, reference=torch.logical_not,
        aten=AtenForm(
            fx.calls(aten.logical_not.default),
            (
                fx.sometimes(fx.boolean, aten.bitwise_not.default),
                fx.always(fx.plain, aten.logical_not.default),
            ),
        ),
        onnx=OnnxForm(onnx.same("Not"), (onnx.always(onnx.plain, "Not"),)),
    ),
)  # fmt: skip


# --- one operand ----------------------------------------------------------------------------------


def unary(
    name: str, op_type: str = "", *, rule: Any = same, reference: Callable[..., Any] | None = None,
    lower: onnx.Lower | None = None, activation: bool = False,
) -> OpSpec:  # fmt: skip
    """An op of one operand, of the name that torch has it by."""
    target = getattr(aten, name).default
    form = OnnxForm(lower=lower)
    if op_type:
        form = OnnxForm(onnx.same(op_type), (onnx.always(onnx.plain, op_type),))
    return OpSpec(
        name=name, operands=("x",), infer=rule, reference=reference or getattr(torch, name),
        activation=activation, onnx=form,
        aten=AtenForm(fx.calls(target), (fx.always(fx.plain, target),)),
    )  # fmt: skip


def _lower_rsqrt(e: onnx.Lowering) -> onnx_ir.Value:
    """rsqrt(x) => reciprocal(sqrt(x))"""
    return e.reciprocal(e.sqrt(e.operands[0]))


FUNCTIONS = (
    unary("neg", "Neg"), unary("abs", "Abs"), unary("sqrt", "Sqrt"),
    unary("rsqrt", lower=_lower_rsqrt), unary("reciprocal", "Reciprocal"), unary("exp", "Exp"),
    unary("log", "Log"), unary("erf", "Erf"), unary("sin", "Sin"), unary("cos", "Cos"),
    unary("floor", "Floor"), unary("isnan", "IsNaN", rule=comparison),
)  # fmt: skip


OPS = (*ARITHMETIC, *TRUTH, *FUNCTIONS)
