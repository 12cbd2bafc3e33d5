"""Ops that multiply by a matrix: matmul, linear, convolution, embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir
import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..core.types import UNKNOWN_DIM, Dim, Type, broadcast
from . import fx, onnx
from .fx import AtenForm, aten
from .onnx import OnnxForm
from .rules import promote, same_size
from .spec import REQUIRED, Attrs, Macs, OpSpec, Shape, Types

# --- matmul ---------------------------------------------------------------------------------------


def _infer_matmul(operands: Sequence[Any], attrs: Attrs) -> Types:
    a, b = operands
    dtype = promote(operands)
    if a.shape is None or b.shape is None:
        return (Type(dtype, None),)
    left = a.shape if len(a.shape) > 1 else (1, *a.shape)
    right = b.shape if len(b.shape) > 1 else (*b.shape, 1)
    same_size(left[-1], right[-2], "matmul")
    batch = broadcast(left[:-2], right[:-2]) or ()
    tail = ([left[-2]] if len(a.shape) > 1 else []) + ([right[-1]] if len(b.shape) > 1 else [])
    return (Type(dtype, (*batch, *tail)),)


def linear_macs(operands: Sequence[Any], out: Shape) -> int:
    """Each number of the result is a sum over the columns of the first operand."""
    return int(math.prod(out) * operands[0][-1])


# --- linear ---------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; weight is [out, in], or [in] of a result without that axis."""
    return torch.nn.functional.linear(x, weight, bias)


def _infer_linear(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, weight = operands[:2]
    if x.shape is None or weight.shape is None:
        return (Type(x.dtype, None),)
    same_size(x.shape[-1], weight.shape[-1], "linear")
    return (x.with_shape((*x.shape[:-1], *weight.shape[:-1])),)


def _dense(columns: int, operands: Sequence[Tensor | None], attrs: Attrs) -> Tensor:
    weight = operands[0]
    assert weight is not None
    return weight.float()


def _lower_linear(e: onnx.Lowering) -> onnx_ir.Value:
    """linear(x, w, b) => add(matmul(x, wᵀ), b), the transposition taken on the lazy handle.

    A weight that something else reads as it is, the table of a tied head, is not written a second
    time: ``FusedMatMul`` takes it transposed. ONNX Runtime repacks both alike when it loads; over
    151,936 x 896 they take as long (1 row 18 ms, 16 rows 43 ms, one AVX-512 core).
    """
    return _by_fused_matmul(e, (torch.float32,))


def _lower_linear_of_any_float(e: onnx.Lowering) -> onnx_ir.Value:
    """The same for a runtime whose ``FusedMatMul`` takes half floats too."""
    return _by_fused_matmul(e, (torch.float32, torch.float16, torch.bfloat16))


def _by_fused_matmul(e: onnx.Lowering, dtypes: Sequence[torch.dtype]) -> onnx_ir.Value:
    x, weight, *bias = e.operands
    if e.view.type(weight).rank == 1:
        product = e.matmul(x, weight)
    elif e.view.type(x).dtype in dtypes and _is_read_elsewhere(e, weight):
        e.view.at(e.node)
        node = e.view.emit("FusedMatMul", [x, weight], {"transB": 1}, domain=onnx.MICROSOFT)
        product = node.outputs[0]
        e.view.retype(product, e.node.outputs[0])
    else:
        product = e.matmul(x, _transposed(e, weight))
    return e.add(product, bias[0]) if bias and bias[0] is not None else product


def _lower_linear_in_standard_ops(e: onnx.Lowering) -> onnx_ir.Value:
    """linear(x, w, b) => add(matmul(x, wᵀ), b); a table that is read elsewhere is transposed in the
    graph."""
    x, weight, *bias = e.operands
    if e.view.type(weight).rank == 1:
        turned = weight
    elif _is_read_elsewhere(e, weight):
        turned = e.transpose(weight, perm=(1, 0))
    else:
        turned = _transposed(e, weight)
    product = e.matmul(x, turned)
    return e.add(product, bias[0]) if bias and bias[0] is not None else product


def _is_read_elsewhere(e: onnx.Lowering, weight: onnx_ir.Value) -> bool:
    """Whether the constant behind a weight has a use that is not a linear."""
    view, (stored, cast) = e.view, _stored(e, weight)
    users = [node for node in view.users(stored) if node is not cast]
    return view.weight(stored) is not None and any(view.op(node) != "linear" for node in users)


def _transposed(e: onnx.Lowering, weight: onnx_ir.Value) -> onnx_ir.Value:
    view, (stored, cast) = e.view, _stored(e, weight)
    handle = view.weight(stored)
    if handle is None:
        return e.transpose(weight, perm=(1, 0))
    turned = view.add_weight(_transposed_name(view.name(stored)), handle.transposed())
    return turned if cast is None else e.cast(turned, dtype=view.type(weight).dtype)


def _stored(
    e: onnx.Lowering, weight: onnx_ir.Value
) -> tuple[onnx_ir.Value, onnx_ir.Node | None]:
    """What a weight is stored as, and the cast behind that, if there is one."""
    maker = e.view.producer(weight)
    if maker is None or e.view.op(maker) != "cast":
        return weight, None
    return e.view.tensor(maker), maker


def _transposed_name(name: str) -> str:
    return name[:-2] if name.endswith(".T") else f"{name}.T"


# --- convolution ----------------------------------------------------------------------------------


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Cross-correlation of [N, C, *space] with weight [M, C/groups, *kernel]."""
    zeros = [0] * len(stride)
    return torch.convolution(
        x, weight, bias, list(stride), list(padding), list(dilation), False, zeros, groups
    )


def _infer_conv(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, weight = operands[:2]
    if x.shape is None or weight.shape is None:
        return (Type(x.dtype, None),)
    if isinstance(x.shape[1], int):
        same_size(x.shape[1] // attrs["groups"], weight.shape[1], "conv", "channel")
    out: list[Dim] = [x.shape[0], weight.shape[0]]
    for i, size in enumerate(x.shape[2:]):
        if not isinstance(size, int):
            out.append(UNKNOWN_DIM)
            continue
        reach = attrs["dilation"][i] * (weight.shape[2 + i] - 1) + 1
        out.append((size + 2 * attrs["padding"][i] - reach) // attrs["stride"][i] + 1)
    return (x.with_shape(out),)


def _conv_macs(operands: Sequence[Any], out: Shape) -> int:
    return int(math.prod(out) * math.prod(operands[1][1:]))


_BY_WORD = (aten.conv1d.padding, aten.conv2d.padding)


def _padding(
    word: str, kernel: Sequence[object], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...] | None:
    """``valid`` is none; ``same`` keeps the size at a stride of 1, by d (k - 1) in all, of which
    both ends get a half: ``None`` where that is no whole number, or the kernel is not known."""
    if word.lower() == "valid":
        return (0,) * len(stride)
    sizes = [size for size in kernel if isinstance(size, int)]
    if len(sizes) != len(stride) or any(step != 1 for step in stride):
        return None
    added = [d * (size - 1) for d, size in zip(dilation, sizes, strict=True)]
    return None if any(both % 2 for both in added) else tuple(both // 2 for both in added)


def _decode_conv(node: Node) -> fx.Reading | None:
    x, weight, bias = node.args[:3] if len(node.args) > 2 else (*node.args, None)
    rank = fx.rank_of(x)
    if rank is None:
        return None
    by_word = node.target in _BY_WORD
    values = [fx.argument(node, 3, "stride", 1),
              fx.argument(node, 4, "padding", "valid" if by_word else 0),
              fx.argument(node, 5, "dilation", 1)]  # fmt: skip
    groups = fx.argument(node, 6, "groups", 1)
    if node.target is aten.convolution.default:
        if node.args[6]:
            return None
        groups = node.args[8]
    wide = [tuple(v) * (rank - 2 if len(v) == 1 else 1) if isinstance(v, list | tuple)
            else (v,) * (rank - 2) for v in values]  # fmt: skip
    stride, padding, dilation = wide
    if by_word:
        val = weight.meta.get("val") if isinstance(weight, Node) else None
        kernel = () if val is None else tuple(val.shape[2:])
        meant = _padding(str(values[1]), kernel, stride, dilation)
        if meant is None:
            return None
        padding = meant
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return fx.strip((x, weight, bias)), attrs


def _build_aten_conv(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    x, weight, bias = (*operands, None, None)[:3]
    zeros = [0] * len(attrs["stride"])
    window = (list(attrs["stride"]), list(attrs["padding"]), list(attrs["dilation"]))
    args = (x, weight, bias, *window, False, zeros, attrs["groups"])
    return fx.call(graph, aten.convolution.default, args)


def _read_conv(node: onnx_ir.Node) -> onnx.Reading | None:
    weight = node.inputs[1]
    if weight is None or weight.shape is None:
        return None
    space = len(weight.shape) - 2
    stride = tuple(onnx.attribute(node, "strides", (1,) * space))
    dilation = tuple(onnx.attribute(node, "dilations", (1,) * space))
    word = onnx.attribute(node, "auto_pad", "NOTSET")
    if word == "NOTSET":
        pads = tuple(onnx.attribute(node, "pads") or (0,) * (2 * space))
        padding = pads[:space] if pads[:space] == pads[space:] else None
    elif word != "VALID" and set(dilation) != {1}:
        return None  # which ONNX Runtime does not take
    else:
        kernel = onnx.attribute(node, "kernel_shape") or tuple(weight.shape)[2:]
        padding = _padding(word.removesuffix("_UPPER").removesuffix("_LOWER"), kernel, stride,
                           dilation)  # fmt: skip
    if padding is None:
        return None
    attrs = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": onnx.attribute(node, "group", 1),
    }
    return tuple(node.inputs), attrs


def _build_conv(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    return b.emit("Conv", operands, {
        "strides": attrs["stride"], "dilations": attrs["dilation"], "group": attrs["groups"],
        "pads": (*attrs["padding"], *attrs["padding"]),
    })  # fmt: skip


# --- embedding ------------------------------------------------------------------------------------


def _embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of ``weight`` along its first dimension; negative ids count from the end."""
    ids = torch.where(ids < 0, ids + weight.shape[0], ids)
    return torch.nn.functional.embedding(ids, weight)


def _infer_embedding(operands: Sequence[Any], attrs: Attrs) -> Types:
    weight, ids = operands
    if weight.shape is None or ids.shape is None:
        return (Type(weight.dtype, None),)
    return (Type(weight.dtype, (*ids.shape, *weight.shape[1:])),)


def _decode_embedding(node: Node) -> fx.Reading | None:
    return node.args[:2], {}


def _read_embedding(node: onnx_ir.Node) -> onnx.Reading | None:
    data = node.inputs[0]
    if onnx.attribute(node, "axis", 0) != 0 or data is None or data.const_value is None:
        return None
    return (tuple(node.inputs), {}) if onnx.rank_of(data) == 2 else None


OPS = (
    OpSpec(
        name="matmul", operands=("a", "b"), infer=_infer_matmul, reference=torch.matmul,
        macs=Macs(linear_macs),
        aten=AtenForm(
            fx.calls(aten.matmul.default),
            (fx.always(fx.plain, aten.matmul.default, aten.mm.default, aten.bmm.default),),
        ),
        onnx=OnnxForm(onnx.same("MatMul"), (onnx.always(onnx.plain, "MatMul"),)),
    ),
    OpSpec(
        name="linear", operands=("x", "weight", "bias?"), infer=_infer_linear, reference=_linear,
        heavy=True, macs=Macs(linear_macs), dense=_dense,
        aten=AtenForm(
            fx.calls(aten.linear.default), (fx.always(fx.plain, aten.linear.default),)
        ),
        onnx=OnnxForm(
            lower=_lower_linear,
            forms={
                "transpose": _lower_linear_in_standard_ops,
                "fused-matmul": _lower_linear_of_any_float,
            },
        ),
    ),
    OpSpec(
        name="conv", operands=("x", "weight", "bias?"),
        attrs={"stride": REQUIRED, "padding": REQUIRED, "dilation": REQUIRED, "groups": 1},
        infer=_infer_conv, reference=_conv, heavy=True, macs=Macs(_conv_macs, reads=2),
        aten=AtenForm(_build_aten_conv, (fx.sometimes(
            _decode_conv, aten.conv1d.default, aten.conv2d.default, aten.convolution.default,
            *_BY_WORD,
        ),)),
        onnx=OnnxForm(_build_conv, (onnx.sometimes(_read_conv, "Conv"),)),
    ),
    OpSpec(
        name="embedding", operands=("weight", "ids"), infer=_infer_embedding,
        reference=_embedding, heavy=True, picks=True, table=0,
        aten=AtenForm(
            fx.calls(aten.embedding.default),
            (fx.always(_decode_embedding, aten.embedding.default),),
        ),
        onnx=OnnxForm(
            onnx.with_attrs("Gather"), (onnx.sometimes(_read_embedding, "Gather"),)
        ),
    ),
)  # fmt: skip
