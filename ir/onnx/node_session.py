"""One native node made ready to run: in an ONNX Runtime session, or in onnx's evaluator.

A session runs in this process: a kernel that ends it instead of raising an error ends all of us.
The nodes that are known to are in ``fatal``, and refused before they come here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype

from ..core.errors import BadInput
from ..core.values import to_numpy, to_value
from .bounded_memory import bound_memory, run_options, why_short
from .node_model import initializer, node_model
from .parts import captured, has_subgraph, is_untyped_constant
from .trips import is_open, run_watched

CONSTANT_BYTES = 1 << 26
"""Bytes of operands that are written into a node's model where a kernel wants them constant."""
_Dtype = onnx_ir.DataType
_NARROW = {
    _Dtype.INT4: ml_dtypes.int4, _Dtype.UINT4: ml_dtypes.uint4,
    _Dtype.INT2: ml_dtypes.int2, _Dtype.UINT2: ml_dtypes.uint2,
}  # fmt: skip
"""The dtypes that values have one number to a byte."""
_CARRIERS = {
    _Dtype.INT4: _Dtype.INT8, _Dtype.UINT4: _Dtype.UINT8,
    _Dtype.INT2: _Dtype.INT8, _Dtype.UINT2: _Dtype.UINT8,
    _Dtype.BFLOAT16: _Dtype.FLOAT,
    _Dtype.FLOAT8E4M3FN: _Dtype.FLOAT, _Dtype.FLOAT8E4M3FNUZ: _Dtype.FLOAT,
    _Dtype.FLOAT8E5M2: _Dtype.FLOAT, _Dtype.FLOAT8E5M2FNUZ: _Dtype.FLOAT,
}  # fmt: skip
"""The dtypes that the runtime does not exchange with numpy, and those that hold their numbers."""
_BY_THREAD = frozenset({"DynamicQuantizeLSTM"})
"""Ops whose kernels round together the rows that one thread computes, so that their numbers depend
on how many there are (a trained LSTM of 8 bits, 1 thread beside 2: .0059 relative L2)."""
_CARRIED = "/carried"
_SMALL = 1024
"""Numbers of a constant that may be a shape."""
_DTYPES = {f"tensor({dtype.name.lower()})": dtype for dtype in _Dtype}
"""Dtypes by the runtime's names."""

Feeds = Mapping[onnx_ir.Value, Any]
"""The values that a node reads: its inputs, and what its subgraphs capture."""
Run = Callable[[Feeds], Sequence[Any]]
"""The results of a node that was made ready; those that it omits are not among them."""


class Unfit(Exception):
    """A way of running a node that there is no point in trying."""


# --- ONNX Runtime ---------------------------------------------------------------------------------


def session(
    model: onnx_ir.Model, node: onnx_ir.Node, feeds: Feeds, constants: Feeds | None = None
) -> Run:
    """A session of a node. ``constants`` are written into it, all else is given at each run."""
    import onnx

    varying = [value for value in feeds if value not in (constants or {})]
    types = {value: _runtime_type(value, feeds[value]) for value in varying}
    initializers = [
        onnx.numpy_helper.from_array(_declared_array(v, constant), str(v.name))
        for v, constant in (constants or {}).items()
    ]
    proto = node_model(model, node, types, initializers)
    dtypes = {v: _dtype(v, feeds[v]) for v in varying}
    carried = {v: dtype for v, dtype in dtypes.items() if dtype is not None and dtype in _CARRIERS}
    for value, dtype in carried.items():
        _cast_input(proto.graph, str(value.name), dtype)
    threads = 0 if node.op_type in _BY_THREAD else 1
    bounded = has_subgraph(node)  # else what it takes is told before: see ``bounds``
    session = _start(proto, threads, bounded)
    outputs = [_DTYPES.get(o.type) for o in session.get_outputs()]
    narrow = {i: d for i, d in enumerate(outputs) if d is not None and d in _CARRIERS}
    for index, dtype in narrow.items():
        _cast_output(proto.graph, index, _CARRIERS[dtype])
    session = _start(proto, threads, bounded) if narrow else session
    watched = is_open(node)

    def run(feeds: Feeds) -> list[Any]:
        inputs = {
            f"{v.name}{_CARRIED if v in carried else ''}": _fed(feeds[v], v in carried)
            for v in varying
        }
        options = run_options() if bounded else None
        try:
            results = run_watched(session, inputs, node, options) if watched \
                else session.run(None, inputs, options)  # fmt: skip
        except Exception as error:  # the runtime's errors share no base
            short = why_short(str(error)) if bounded else ""
            if short:
                raise BadInput(f"in {node.name} ({node.op_type}): {short}") from error
            raise
        return [_to_tensor(r, d) for r, d in zip(results, outputs, strict=True)]

    return run


def declared_outputs(
    model: onnx_ir.Model, node: onnx_ir.Node
) -> list[tuple[onnx_ir.DataType | None, onnx_ir.Shape | None]]:
    """What the runtime infers of a node's results, those that it omits left out; empty where it
    does not know the op, or the graph an operand's dtype.

    A dtype is ``None`` for what is not a tensor. A shape is ``None`` where the rank is not known,
    and for a tensor without dimensions, which the runtime does not tell apart.
    """
    read = (v for v in (*node.inputs, *captured(node)) if v is not None)
    values = [v for v in dict.fromkeys(read) if not is_untyped_constant(v)]
    small = [v for v in values if _is_constant(v) and _count(v) <= _SMALL]
    types = {v: onnx_ir.serde.serialize_value(v).type for v in values if v not in small}
    try:
        proto = node_model(model, node, types, [initializer(v) for v in small])
        outputs = _start(proto).get_outputs()
    except Exception:  # the runtime's errors share no base
        return []
    return [(_DTYPES.get(o.type), onnx_ir.Shape(o.shape) if o.shape else None) for o in outputs]


def _count(value: onnx_ir.Value) -> int:
    return 0 if value.const_value is None else int(value.const_value.size)


def _is_constant(value: onnx_ir.Value) -> bool:
    """Whether a caller cannot give other numbers."""
    return value.const_value is not None and not value.is_graph_input()


def session_with_constants(model: onnx_ir.Model, node: onnx_ir.Node, feeds: Feeds) -> Run:
    """Some kernels want a weight to be a constant of the graph."""
    stored = {v: x for v, x in feeds.items() if _is_constant(v)}
    held = sum(x.numel() * x.element_size() for x in stored.values())
    if not stored or held > CONSTANT_BYTES:
        raise Unfit
    return session(model, node, feeds, stored)


def _start(proto: Any, threads: int = 1, bounded: bool = False) -> Any:
    """A session of that many threads, of as many as the runtime likes where it is 0."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.graph_optimization_level = level
    if bounded:
        bound_memory(options)
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _dtype(value: onnx_ir.Value, feed: Any) -> onnx_ir.DataType | None:
    """The dtype of a tensor; ``None`` for anything else, and for strings."""
    if isinstance(feed, torch.Tensor):
        return value.dtype if value.dtype in _NARROW else from_torch_dtype(feed.dtype)
    return None


def _declared_array(value: onnx_ir.Value, feed: Any) -> Any:
    """A value as an array of its dtype in ONNX, also where that is narrower than a byte."""
    array, dtype = to_numpy(feed), _dtype(value, feed)
    narrow = None if dtype is None else _NARROW.get(dtype)
    return array if narrow is None else array.astype(narrow)


def _runtime_type(value: onnx_ir.Value, feed: Any) -> Any:
    """The type that a session declares for what it is given: of its rank, sizes left open."""
    import onnx

    dtype = _dtype(value, feed)
    if dtype is not None:
        declared = int(_CARRIERS.get(dtype, dtype))
        return onnx.helper.make_tensor_type_proto(declared, [None] * feed.dim())
    if isinstance(feed, np.ndarray):
        known = onnx.helper.np_dtype_to_tensor_dtype(feed.dtype)
        return onnx.helper.make_tensor_type_proto(known, [None] * feed.ndim)
    if isinstance(value.type, onnx_ir.SequenceType | onnx_ir.OptionalType):
        return onnx_ir.serde.serialize_type(value.type)
    return _type_of_python(feed)


def _type_of_python(feed: Any) -> Any:
    """The type of a sequence or map that the graph does not declare."""
    import onnx

    if isinstance(feed, list) and feed:
        return onnx.helper.make_sequence_type_proto(_type_of_python(feed[0]))
    if isinstance(feed, dict) and feed:
        name, number = next(iter(feed.items()))
        key = onnx.TensorProto.STRING if isinstance(name, str) else onnx.TensorProto.INT64
        return onnx.helper.make_map_type_proto(key, _type_of_python(np.asarray(number)))
    if isinstance(feed, np.ndarray):
        dtype = (
            onnx.TensorProto.FLOAT
            if feed.ndim == 0
            else onnx.helper.np_dtype_to_tensor_dtype(feed.dtype)
        )
        return onnx.helper.make_tensor_type_proto(dtype, None)
    raise ValueError("an empty sequence whose type the graph does not declare")


def _fed(feed: Any, carried: bool) -> Any:
    wide = carried and feed.dtype.is_floating_point
    return to_numpy(feed.float() if wide else feed)


def _to_tensor(result: Any, dtype: onnx_ir.DataType | None) -> Any:
    value = to_value(result)
    if dtype in _CARRIERS and dtype not in _NARROW:
        return value.to(to_torch_dtype(dtype))
    return value


def _cast_input(graph: Any, name: str, dtype: onnx_ir.DataType) -> None:
    """Let an input come in the dtype that carries ``dtype``."""
    import onnx

    carrier = f"{name}{_CARRIED}"
    info = next(i for i in graph.input if i.name == name)
    info.name = carrier
    graph.node.insert(0, onnx.helper.make_node("Cast", [carrier], [name], to=int(dtype)))


def _cast_output(graph: Any, index: int, carrier: onnx_ir.DataType) -> None:
    """Let an output go out in another dtype."""
    import onnx

    name = graph.output[index].name
    carried = f"{name}{_CARRIED}"
    graph.output[index].name = carried
    graph.node.append(onnx.helper.make_node("Cast", [name], [carried], to=int(carrier)))


# --- onnx's evaluator -----------------------------------------------------------------------------

_TRUE = "graphwright.true"


def evaluator(model: onnx_ir.Model, node: onnx_ir.Node, feeds: Feeds) -> Run:
    """onnx's reference evaluator of a node."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    undeclared = onnx.TypeProto()
    proto = node_model(model, node, dict.fromkeys(feeds, undeclared))
    if node.op_type == "Loop" and node.domain == "" and node.inputs[1] is None:
        # onnx 1.23's evaluator takes an absent condition for a false one and never enters the loop.
        always = onnx.helper.make_tensor(_TRUE, onnx.TensorProto.BOOL, [], [True])
        proto.graph.initializer.append(always)
        proto.graph.node[0].input[1] = _TRUE
    reference = ReferenceEvaluator(proto)

    def run(feeds: Feeds) -> list[Any]:
        inputs = {str(v.name): _declared_array(v, x) for v, x in feeds.items()}
        return [to_value(result) for result in reference.run(None, inputs)]

    return run
