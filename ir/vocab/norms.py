"""Norms over the last dimensions. Half-precision reductions are taken in float32 and cast back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir
import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..core.errors import InvalidGraph
from ..core.weights import ComputedWeight
from . import fx, onnx
from .fx import AtenForm, aten
from .onnx import DOMAIN, OnnxForm
from .rules import same
from .spec import Attrs, OpSpec

_HALF = (torch.float16, torch.bfloat16)


def _trailing_shape(x: Node, dims: int) -> list[int]:
    return list(x.meta["val"].shape[-dims:])


# --- layer norm -----------------------------------------------------------------------------------


def _layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dims: int = 1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise over the last ``dims`` dimensions with the biased variance (arXiv 1607.06450)."""
    return torch.nn.functional.layer_norm(x, x.shape[-dims:], weight, bias, eps)


def _decode_layer_norm(node: Node) -> fx.Reading | None:
    shape: Any = node.args[1]
    weight, bias = fx.argument(node, 2, "weight"), fx.argument(node, 3, "bias")
    eps = fx.argument(node, 4, "eps", 1e-5)
    return fx.strip((node.args[0], weight, bias)), {"dims": len(shape), "eps": float(eps)}


def _build_aten_layer_norm(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    x, weight, bias = (*operands, None, None)[:3]
    shape = _trailing_shape(x, attrs["dims"])
    return fx.call(graph, aten.layer_norm.default, (x, shape, weight, bias, attrs["eps"]))


def _read_layer_norm(node: onnx_ir.Node) -> onnx.Reading | None:
    rank = onnx.rank_of(node.inputs[0])
    axis = onnx.attribute(node, "axis", -1)
    if len(node.outputs) > 1 or (axis >= 0 and rank is None):
        return None
    dims = -axis if axis < 0 else rank - axis
    return tuple(node.inputs), {"dims": dims, "eps": float(onnx.attribute(node, "epsilon", 1e-5))}


def _build_layer_norm(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    if len(operands) < 2 or operands[1] is None:  # ONNX's has a weight
        return b.emit("layer_norm", operands, attrs, domain=DOMAIN)
    return b.emit("LayerNormalization", operands, {"axis": -attrs["dims"], "epsilon": attrs["eps"]})


def _lower_layer_norm(e: onnx.Lowering) -> onnx_ir.Value:
    """layer_norm(x) without a weight => layer_norm with a weight of ones."""
    x = e.operands[0]
    type_ = e.view.type(x)
    dims = e.attrs["dims"]
    shape = () if type_.shape is None else type_.shape[-dims:]
    if type_.dtype is None or not shape or not all(isinstance(d, int) for d in shape):
        raise InvalidGraph(f"{e.view.name(e.node)}: layer_norm over dimensions of unknown size")
    sizes = tuple(int(d) for d in shape)
    weight = _ones(e, sizes)
    return e.layer_norm(x, weight, *e.operands[2:], dims=dims, eps=e.attrs["eps"])


def _ones(e: onnx.Lowering, sizes: tuple[int, ...]) -> onnx_ir.Value:
    """A weight of ones in the dtype of the first operand."""
    dtype = e.view.type(e.operands[0]).dtype
    key = ("ones", sizes, dtype)
    ones = ComputedWeight(lambda: torch.ones(sizes, dtype=dtype), sizes, dtype, key)
    weight: onnx_ir.Value = e.view.add_weight("ones", ones)
    return weight


# --- RMS norm -------------------------------------------------------------------------------------


def _rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension (arXiv 1910.07467)."""
    wide = x.float() if x.dtype in _HALF else x
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else weight * normed


def _decode_rms_norm(node: Node) -> fx.Reading | None:
    shape: Any = node.args[1]
    eps = fx.argument(node, 3, "eps")
    if eps is None or len(shape) != 1:
        return None
    return fx.strip((node.args[0], fx.argument(node, 2, "weight"))), {"eps": float(eps)}


def _build_aten_rms_norm(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    x, weight = (*operands, None)[:2]
    shape = _trailing_shape(x, 1)
    return fx.call(graph, aten.rms_norm.default, (x, shape, weight, attrs["eps"]))


def _read_rms_norm(node: onnx_ir.Node) -> onnx.Reading | None:
    rank = onnx.rank_of(node.inputs[0])
    if onnx.attribute(node, "axis", -1) not in (-1, None if rank is None else rank - 1):
        return None
    return tuple(node.inputs), {"eps": float(onnx.attribute(node, "epsilon", 1e-5))}


def _lower_rms_norm(e: onnx.Lowering) -> onnx_ir.Value:
    """rms_norm(x, w) => x / sqrt(mean(x²) + eps) · w, in float32 for half types.

    ONNX Runtime makes one node of it when it loads, as it does not where the root's reciprocal is
    multiplied by: with ONNX Runtime 1.31 on one core, 896 wide, 4.7 us a row against 6.4, and for
    64 rows 20 against 41.
    """
    x, *weight = e.operands
    type_ = e.view.type(x)
    half = type_.dtype in _HALF
    wide = e.cast(x, dtype=torch.float32) if half else x
    mean = e.mean(e.pow(wide, 2.0), dims=(-1,), keepdim=True)
    normed = e.div(wide, e.sqrt(e.add(mean, float(e.attrs["eps"]))))
    if half:
        normed = e.cast(normed, dtype=type_.dtype)
    return e.mul(weight[0], normed) if weight and weight[0] is not None else normed


def _lower_rms_norm_with_sum(e: onnx.Lowering) -> onnx_ir.Value:
    """rms_norm(add(x, y), w) => SkipSimplifiedLayerNormalization(x, y, w), whose fourth result is
    the sum for all others who read it; of anything else SimplifiedLayerNormalization.

    Both compute in float32 inside, whatever they take.
    """
    x, *weight = e.operands
    known = e.view.type(x)
    if known.dtype is None or not known.shape or not isinstance(known.shape[-1], int):
        return _lower_rms_norm(e)
    scale = weight[0] if weight and weight[0] is not None else _ones(e, (known.shape[-1],))
    if e.view.type(scale).dtype != known.dtype or e.view.weight(scale) is None:
        return _lower_rms_norm(e)
    eps = {"epsilon": float(e.attrs["eps"])}
    addition = _sum_before(e, x)
    if addition is None:
        e.view.at(e.node)
        attrs = {"axis": -1, **eps, "stash_type": 1}
        normed: onnx_ir.Node = e.view.emit("SimplifiedLayerNormalization", [x, scale], attrs)
        return normed.outputs[0]
    # Where the sum was, before all who read it.
    e.view.at(addition)
    node: onnx_ir.Node = e.view.emit(
        "SkipSimplifiedLayerNormalization", [*e.view.operands(addition), scale], eps,
        domain=onnx.MICROSOFT, outputs=4,
    )  # fmt: skip
    node.outputs[1].name = node.outputs[2].name = ""
    e.view.retype(node.outputs[3], x)
    e.view.replace(x, node.outputs[3])
    e.view.erase(addition)
    return node.outputs[0]


def _sum_before(e: onnx.Lowering, x: onnx_ir.Value) -> onnx_ir.Node | None:
    """The addition that makes ``x`` of two values of its own type; ``None`` where there is none."""
    node = e.view.producer(x)
    if node is None or e.view.op(node) != "add" or e.view.is_output(x):
        return None
    parts, type_ = e.view.operands(node), e.view.type(x)
    alike = all(isinstance(p, onnx_ir.Value) and e.view.type(p) == type_ for p in parts)
    return node if alike and type_.rank in (2, 3) else None


OPS = (
    OpSpec(
        name="layer_norm", operands=("x", "weight?", "bias?"), attrs={"dims": 1, "eps": 1e-5},
        infer=same, reference=_layer_norm,
        aten=AtenForm(
            _build_aten_layer_norm, (fx.always(_decode_layer_norm, aten.layer_norm.default),)
        ),
        onnx=OnnxForm(
            _build_layer_norm, (onnx.sometimes(_read_layer_norm, "LayerNormalization"),),
            _lower_layer_norm,
        ),
    ),
    OpSpec(
        name="rms_norm", operands=("x", "weight?"), attrs={"eps": 1e-6}, infer=same,
        reference=_rms_norm,
        aten=AtenForm(
            _build_aten_rms_norm, (fx.sometimes(_decode_rms_norm, aten.rms_norm.default),)
        ),
        onnx=OnnxForm(
            decoders=(onnx.sometimes(_read_rms_norm, "RMSNormalization"),), lower=_lower_rms_norm,
            forms={"skip-simplified-layer-norm": _lower_rms_norm_with_sum},
        ),
    ),
)  # fmt: skip
