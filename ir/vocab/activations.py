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
    """gelu(x) => 0.5 x (1 + erf(x/√2)), or the tanh form (opsets before 20 have no Gelu)."""
    x = e.operands[0]
    if e.attrs["approximate"] == "tanh":
        inner = e.add(x, e.mul(e.pow(x, 3.0), 0.044715))
        gate = e.tanh(e.mul(inner, math.sqrt(2 / math.pi)))
    else:
        gate = e.erf(e.mul(x, math.sqrt(0.5)))
    return e.mul(e.mul(x, 0.5), e.add(gate, 1.0))


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
