"""ONNX models written by hand, as ONNX Runtime computes them and as we read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from graphwright.ir.onnx.view import OnnxView
from onnx import helper, numpy_helper

Arrays = Mapping[str, np.ndarray[Any, Any]]
RNG = np.random.default_rng(0)


def rand(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def written(
    nodes: Sequence[onnx.NodeProto], feeds: Arrays, constants: Arrays, outputs: Sequence[str],
    shapes: Mapping[str, Sequence[Any]] | None = None, opset: int = 20,
) -> onnx.ModelProto:  # fmt: skip
    """A model of that opset and of Microsoft's ops; inputs have the types of ``feeds``, and their
    shapes where ``shapes`` does not say other ones."""
    inputs = []
    for name, array in feeds.items():
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        shape = (shapes or {}).get(name, array.shape)
        inputs.append(helper.make_tensor_value_info(name, dtype, shape))
    single = onnx.TensorProto.FLOAT
    results = [helper.make_tensor_value_info(name, single, None) for name in outputs]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "written", inputs, results, stored)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def in_runtime(model: onnx.ModelProto, feeds: Arrays) -> list[torch.Tensor]:
    """What ONNX Runtime computes, node by node as it is written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [torch.from_numpy(array) for array in session.run(None, dict(feeds))]


def read(model: onnx.ModelProto) -> OnnxView:
    return OnnxView(onnx_ir.from_proto(model))


def tensors(feeds: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feeds.items()}
