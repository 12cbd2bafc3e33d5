"""From the vocabulary to ATen: how each op is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from ..vocab import spec
from .table import is_integral, rank_of

aten = torch.ops.aten

Builder = Callable[[Graph, Sequence[Any], Mapping[str, Any]], Node]


def call(
    graph: Graph, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Node:
    """Insert a call node, named after its op.

    Its arguments are set after it is made: FX walks those that it is made with through pytree, in
    search of raw symbolic numbers, and that takes more time than all the rest of the node.
    """
    node = graph.call_function(target, name=getattr(target, "_opname", target.__name__))
    node.args = args
    if kwargs:
        node.kwargs = dict(kwargs)
    return node


def _tensor_or_scalar(op: str) -> Builder:
    overloads = getattr(aten, op)

    def build(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
        a, b = operands
        if not isinstance(a, Node):
            a, b = call(graph, aten.full_like.default, (b, a)), b
        target = overloads.Tensor if isinstance(b, Node) else overloads.Scalar
        return call(graph, target, (a, b))

    return build


def _build_div(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    if not all(is_integral(o) for o in operands):
        return _tensor_or_scalar("div")(graph, operands, attrs)
    a, b = operands
    if not isinstance(a, Node):
        a = call(graph, aten.full_like.default, (b, a))
    target = aten.div.Tensor_mode if isinstance(b, Node) else aten.div.Scalar_mode
    return call(graph, target, (a, b), {"rounding_mode": "trunc"})


def _pow(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    a, b = operands
    name = "Scalar" if not isinstance(a, Node) else "Tensor_" + (
        "Tensor" if isinstance(b, Node) else "Scalar"
    )
    return call(graph, getattr(aten.pow, name), (a, b))


def _call(target: Any, *order: str) -> Builder:
    """A builder that passes the operands and then the named attributes positionally."""

    def build(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
        rest = [list(v) if isinstance(v, tuple) else v for v in (attrs[name] for name in order)]
        return call(graph, target, (*operands, *rest))

    return build


def _build_where(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    _, a, b = operands
    if isinstance(a, Node):
        target = aten.where.self if isinstance(b, Node) else aten.where.ScalarOther
    else:
        target = aten.where.ScalarSelf if isinstance(b, Node) else aten.where.Scalar
    return call(graph, target, tuple(operands))


def _build_gelu(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    kwargs = {} if attrs["approximate"] == "none" else {"approximate": attrs["approximate"]}
    return call(graph, aten.gelu.default, tuple(operands), kwargs)


def _build_cast(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    return call(graph, aten._to_copy.default, tuple(operands), {"dtype": attrs["dtype"]})


def _trailing_shape(x: Node, dims: int) -> list[int]:
    return list(x.meta["val"].shape[-dims:])


def _build_layer_norm(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    x, weight, bias = (*operands, None, None)[:3]
    shape = _trailing_shape(x, attrs["dims"])
    return call(graph, aten.layer_norm.default, (x, shape, weight, bias, attrs["eps"]))


def _build_rms_norm(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    x, weight = (*operands, None)[:2]
    shape = _trailing_shape(x, 1)
    return call(graph, aten.rms_norm.default, (x, shape, weight, attrs["eps"]))


def _build_sdpa(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    if attrs["softcap"] is not None:  # aten has no such attention
        return _build_own("sdpa")(graph, operands, attrs)
    q, k, v, mask = (*operands, None)[:4]
    kwargs: dict[str, Any] = {}
    if attrs["scale"] is not None:
        kwargs["scale"] = attrs["scale"]
    if attrs["gqa"]:
        kwargs["enable_gqa"] = True
    args = (q, k, v, mask, 0.0, attrs["causal"])
    return call(graph, aten.scaled_dot_product_attention.default, args, kwargs)


def _build_shaped(target: Any) -> Builder:
    def build(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
        return call(graph, target, (operands[0], list(operands[1:])))

    return build


def _build_expand(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    x, *sizes = operands
    rank = rank_of(x)
    new = 0 if rank is None else len(sizes) - rank
    kept = [-1 if i >= new and isinstance(s, int) and s == 1 else s for i, s in enumerate(sizes)]
    return call(graph, aten.expand.default, (x, kept))


def _build_unsqueeze(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    node = operands[0]
    for dim in sorted(attrs["dims"]):
        node = call(graph, aten.unsqueeze.default, (node, dim))
    return node  # type: ignore[no-any-return]


def _build_concat(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    return call(graph, aten.cat.default, (list(operands), attrs["dim"]))


def _build_slice(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    x, start, end = operands
    return call(graph, aten.slice.Tensor, (x, attrs["dim"], start, end, attrs["step"]))


def _build_indexed(target: Any) -> Builder:
    def build(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
        return call(graph, target, (operands[0], attrs["dim"], operands[1]))

    return build


def _build_arange(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    kwargs = {"dtype": attrs["dtype"], "device": torch.device("cpu"), "pin_memory": False}
    return call(graph, aten.arange.start_step, tuple(operands), kwargs)


def _build_conv(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
    x, weight, bias = (*operands, None)[:3]
    zeros = [0] * len(attrs["stride"])
    window = (list(attrs["stride"]), list(attrs["padding"]), list(attrs["dilation"]))
    args = (x, weight, bias, *window, False, zeros, attrs["groups"])
    return call(graph, aten.convolution.default, args)


def _builders() -> dict[str, Builder]:
    table: dict[str, Builder] = {
        op: _tensor_or_scalar(op)
        for op in ("add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge")
    }
    for op in ("neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "erf", "tanh", "sigmoid",
               "sin", "cos", "floor", "relu", "silu", "isnan", "maximum", "minimum", "matmul",
               "linear", "logical_not", "logical_and", "logical_or", "embedding"):  # fmt: skip
        table[op] = _call(getattr(aten, op).default)
    for op in ("amax", "amin"):
        table[op] = _call(getattr(aten, op).default, "dims", "keepdim")
    table |= {
        "identity": _call(aten.alias.default),
        "pow": _pow,
        "div": _build_div,
        "gelu": _build_gelu,
        "clamp": _call(aten.clamp.default, "min", "max"),
        "cast": _build_cast,
        "where": _build_where,
        "mean": _call(aten.mean.dim, "dims", "keepdim"),
        "sum": _call(aten.sum.dim_IntList, "dims", "keepdim"),
        "softmax": _call(aten.softmax.int, "dim"),
        "cumsum": _call(aten.cumsum.default, "dim"),
        "conv": _build_conv,
        "layer_norm": _build_layer_norm,
        "rms_norm": _build_rms_norm,
        "sdpa": _build_sdpa,
        "reshape": _build_shaped(aten.reshape.default),
        "expand": _build_expand,
        "transpose": _call(aten.permute.default, "perm"),
        "unsqueeze": _build_unsqueeze,
        "squeeze": _call(aten.squeeze.dims, "dims"),
        "concat": _build_concat,
        "slice": _build_slice,
        "gather": _build_indexed(aten.gather.default),
        "index_select": _build_indexed(aten.index_select.default),
        "split": _call(aten.split_with_sizes.default, "sizes", "dim"),
        "topk": _call(aten.topk.default, "k", "dim", "largest", "sorted"),
        "arange": _build_arange,
        "size": _call(aten.sym_size.int, "dim"),
    }
    return table


BUILDERS: dict[str, Builder] = _builders()


def builder_of(op: str) -> Builder:
    """The builder of an op of the vocabulary, our own ops included."""
    found = BUILDERS.get(op)
    return _build_own(op) if found is None else found


def _build_own(op: str) -> Builder:
    from ..ops import torch_op

    count = len(spec(op).operands)
    target = torch_op(op)

    def build(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
        padded = (*operands, *[None] * (count - len(operands)))
        return call(graph, target, padded, dict(attrs))

    return build
