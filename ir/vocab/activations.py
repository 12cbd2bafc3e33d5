"""The nonlinearities between linears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir
import torch
from torch import Tensor
from torch.fx import Graph, Node

from . import fx, onnx
from .elementwise import unary
from .fx import AtenForm, aten
from .onnx import OnnxForm
from .rules import same
from .spec import Attrs, OpSpec


def _lower_silu(e: onnx.Lowering) -> onnx_ir.Value:
    """silu(x) => mul(x, sigmoid(x))"""
    return e.mul(e.operands[0], e.sigmoid(e.operands[0]))


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


def _decode_gelu(node: Node) -> fx.Reading | None:
    return node.args[:1], {"approximate": node.kwargs.get("approximate", "none")}


def _build_gelu(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    kwargs = {} if attrs["approximate"] == "none" else {"approximate": attrs["approximate"]}
    return fx.call(graph, aten.gelu.default, tuple(operands), kwargs)


def _read_gelu(node: onnx_ir.Node) -> onnx.Reading | None:
    return tuple(node.inputs), {"approximate": onnx.attribute(node, "approximate", "none")}


def _lower_gelu(e: onnx.Lowering) -> onnx_ir.Value:
    """gelu(x) => Gelu(x), or x (1 + erf(x / √2)) 0.5, or the tanh form.

    Gelu is of opset 20, and ONNX Runtime has it in float32. It makes one node of the second form
    where √2 divides: 128 rows of 1536 take 77 us in one node, and 132 in five (1.31, one AVX-512
    core); 4,096 rows 2.5 and 7.7 ms. It makes none of the tanh form.
    """
    x = e.operands[0]
    if e.view.model.opset_imports.get("", 0) >= 20 and e.view.type(x).dtype == torch.float32:
        e.view.at(e.node)
        node: onnx_ir.Node = e.view.emit("Gelu", [x], {"approximate": e.attrs["approximate"]})
        return node.outputs[0]
    if e.attrs["approximate"] == "tanh":
        inner = e.add(x, e.mul(e.pow(x, 3.0), 0.044715))
        gate = e.tanh(e.mul(inner, math.sqrt(2 / math.pi)))
        return e.mul(e.mul(x, 0.5), e.add(gate, 1.0))
    return e.mul(e.mul(x, e.add(e.erf(e.div(x, math.sqrt(2))), 1.0)), 0.5)


OPS = (
    unary("relu", "Relu", activation=True),
    unary("tanh", "Tanh", activation=True),
    unary("sigmoid", "Sigmoid", activation=True),
    unary("silu", reference=torch.nn.functional.silu, lower=_lower_silu, activation=True),
    OpSpec(
        name="gelu", operands=("x",), attrs={"approximate": "none"}, infer=same, reference=_gelu,
        activation=True,
        aten=AtenForm(_build_gelu, (fx.always(_decode_gelu, aten.gelu.default),)),
        onnx=OnnxForm(decoders=(onnx.always(_read_gelu, "Gelu"),), lower=_lower_gelu),
    ),
)  # fmt: skip
