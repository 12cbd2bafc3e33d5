"""One ONNX node on real tensors: by the vocabulary's reference, or by onnx's own evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir
import torch

from ..core.errors import BadInput
from ..core.view import NATIVE
from ..vocab import spec
from .read import OnnxReader


def execute(
    view: OnnxReader, node: onnx_ir.Node, env: Mapping[onnx_ir.Value, Any]
) -> tuple[Any, ...]:
    """Results of one node; ``env`` holds a tensor for each of its arguments."""
    op = view.op(node)
    if op == NATIVE:
        return _execute_native(view, node, env)
    operands = [
        env[o] if isinstance(o, onnx_ir.Value) else o for o in view.operands(node)
    ]
    value = spec(op).reference(*operands, **view.attrs(node))
    results = value if isinstance(value, tuple) else (value,)
    return tuple(_typed(r, v) for r, v in zip(results, node.outputs, strict=True))


def _typed(result: Any, value: onnx_ir.Value) -> torch.Tensor:
    if isinstance(result, torch.Tensor):
        return result
    return torch.as_tensor(result, dtype=torch.int64)


def _execute_native(
    view: OnnxReader, node: onnx_ir.Node, env: Mapping[onnx_ir.Value, Any]
) -> tuple[Any, ...]:
    evaluator, names = _evaluator(view.model, node, tuple(env))
    feeds = {name: _numpy(env[value]) for name, value in names.items()}
    outputs = evaluator.run(None, feeds)
    return tuple(_torch(np.asarray(o)) for o in outputs)


def _evaluator(
    model: onnx_ir.Model, node: onnx_ir.Node, values: tuple[onnx_ir.Value, ...]
) -> tuple[Any, dict[str, onnx_ir.Value]]:
    names = {str(v.name): v for v in values}
    cached = node.meta.get("graphwright.evaluator")
    if cached is None or cached[1] != names:  # an edit may rename what a node reads
        cached = (_make_evaluator(model, node, values), names)
        node.meta["graphwright.evaluator"] = cached
    return cached[0], names


_TRUE = "graphwright.true"


def _make_evaluator(
    model: onnx_ir.Model, node: onnx_ir.Node, values: tuple[onnx_ir.Value, ...]
) -> Any:
    """onnx's reference evaluator of a model that holds this node alone."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    inputs = [
        onnx.helper.make_tensor_value_info(str(v.name), _onnx_type(v), None) for v in values
    ]
    outputs = [
        onnx.helper.make_tensor_value_info(str(v.name), onnx.TensorProto.UNDEFINED, None)
        for v in node.outputs
    ]
    proto = onnx_ir.serde.serialize_node(node)
    constants = []
    if node.op_type == "Loop" and node.domain == "" and node.inputs[1] is None:
        # onnx 1.23's evaluator takes an absent condition for a false one and never enters the loop.
        constants.append(onnx.helper.make_tensor(_TRUE, onnx.TensorProto.BOOL, [], [True]))
        proto.input[1] = _TRUE
    graph = onnx.helper.make_graph([proto], "node", inputs, outputs, initializer=constants)
    opsets = [
        onnx.helper.make_opsetid(domain, version)
        for domain, version in model.graph.opset_imports.items()
    ]
    functions = [onnx_ir.serde.serialize_function(f) for f in model.functions.values()]
    made = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions)
    try:
        return ReferenceEvaluator(made)
    except (NotImplementedError, RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise BadInput(
            f"{node.name}: the op {node.domain or 'ai.onnx'}::{node.op_type} has no reference "
            f"implementation, so the graph cannot be checked ({error})"
        ) from None


def _onnx_type(value: onnx_ir.Value) -> int:
    return int(value.dtype) if value.dtype is not None else 0


def _numpy(tensor: Any) -> np.ndarray[Any, Any]:
    if not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    if tensor.dtype in _BITS:
        import ml_dtypes

        return _bits(tensor).view(getattr(ml_dtypes, _BITS[tensor.dtype]))
    return tensor.detach().cpu().numpy()


_BITS = {
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}


def _bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    bits = torch.uint16 if tensor.element_size() == 2 else torch.uint8
    return tensor.contiguous().view(bits).numpy()


def _torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    for dtype, name in _BITS.items():
        if array.dtype.name == name:
            raw = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
            return torch.from_numpy(raw).view(dtype)
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


