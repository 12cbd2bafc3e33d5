"""Two ops as a package outside would declare them: a native one, and a stored linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
import torch
from graphwright.ir.core.errors import Refusal
from graphwright.ir.core.types import Type
from graphwright.ir.core.view import Node, View
from graphwright.ir.ops import Sample, StockDecoder, own_op
from graphwright.ir.vocab import Macs, OpSpec, fx, onnx
from graphwright.ir.vocab.linear import linear_macs
from torch import Tensor

softplus = torch.ops.aten.softplus.default

SOFTPLUS = OpSpec(
    name="softplus", operands=("x",), infer=lambda operands, attrs: (operands[0],),
    reference=torch.nn.functional.softplus, activation=True,
    aten=fx.AtenForm(fx.calls(softplus), (fx.always(fx.plain, softplus),)),
    onnx=onnx.OnnxForm(onnx.same("Softplus"), (onnx.always(onnx.plain, "Softplus"),)),
)  # fmt: skip


def linear_int8(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, *,
    in_features: int, out_features: int,
) -> Tensor:  # fmt: skip
    """``x @ (codes * scales).T + bias``; codes int8 [out, in], scales f32 [out, 1]."""
    weight = codes.float() * scales
    return torch.nn.functional.linear(x.float(), weight, bias).to(x.dtype)


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x, codes = operands[:2]
    if codes.shape != (attrs["out_features"], attrs["in_features"]):
        raise ValueError(f"linear_int8: codes are {codes}")
    return (x.with_shape((*x.shape[:-1], attrs["out_features"])),)


def _record(tape: Any, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Value:
    x, codes, scales, bias = (*operands, None)[:4]
    wide = tape.op("Cast", [codes], {"to": onnx_ir.DataType.FLOAT})
    turned = tape.op("Transpose", [tape.op("Mul", [wide, scales])], {"perm": [1, 0]})
    y = tape.op("MatMul", [x, turned])
    return y if bias is None else tape.op("Add", [y, bias])


def _decode(view: View, node: Node) -> tuple[Sequence[Any], Mapping[str, Any]]:
    x, value = view.operands(node)
    for op in ("transpose", "mul"):
        maker = view.producer(value)
        if maker is None or view.op(maker) != op:
            raise Refusal("the matrix is not made from codes and scales", node)
        value, *others = view.operands(maker)
    cast = view.producer(value)
    codes = None if cast is None else view.operands(cast)[0]
    handle = view.weight(codes)
    if handle is None or handle.dtype != torch.int8:
        raise Refusal("the codes are not int8", node)
    rows, columns = handle.shape
    return (x, codes, *others), {"in_features": columns, "out_features": rows}


def _dense(columns: int, operands: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Tensor:
    codes, scales = operands[:2]
    assert codes is not None
    assert scales is not None
    return codes.float() * scales


def stored(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, rounded to 8 bits a row."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return torch.round(weight / scales).to(torch.int8), scales


def _samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    weight, x = (torch.from_numpy(rng.normal(size=s).astype("f4")) for s in ((5, 7), (3, 7)))
    return [Sample((x, *stored(weight), None), {"in_features": 7, "out_features": 5}, "5x7")]


LINEAR_INT8 = own_op(
    linear_int8, infer=_infer, record=_record, samples=_samples, heavy=True,
    macs=Macs(linear_macs), dense=_dense, stored_linear=lambda attrs: "int8 rows",
    decoders=(StockDecoder("matmul", _decode),),
)  # fmt: skip
