"""Small ONNX files for tests, and what ONNX Runtime computes of them, its optimisation off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from graphwright.ir.core.view import View
from graphwright.ir.load.onnx_file import load_onnx
from graphwright.ir.run.sweep import sweep
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node


def random_numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def const(name: str, values: Any) -> Any:
    return numpy_helper.from_array(np.asarray(values), name)


def save(
    path: Path, nodes: Sequence[Any], constants: Sequence[Any] = (), *, opset: int = 18,
    ir: int = 9, x: Sequence[Any] = ("b", 6), inputs: Sequence[Any] = (),
    outputs: Sequence[str] = ("y",), functions: Sequence[Any] = (), domains: Sequence[str] = (),
    edit: Callable[[Any], Any] = lambda model: None,
) -> Path:  # fmt: skip
    """A file of a graph with the input ``x``, of float32; ``edit`` may damage it."""
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x)), *inputs],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs], constants,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=ir, functions=list(functions)
    )
    edit(model)
    path.write_bytes(model.SerializeToString())
    return path


def runtime(path: Path, **feeds: Any) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, feeds)
    return outputs


def check(path: Path, **feeds: Any) -> View:
    """Our reading of a file agrees with the runtime's on an input."""
    view = load_onnx(path)
    ours = sweep(view, {name: torch.from_numpy(array) for name, array in feeds.items()})
    for mine, theirs in zip(ours.values(), runtime(path, **feeds), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-5, atol=1e-6)
    return view


def set_to(path: str, value: Any) -> Callable[[Any], None]:
    """``a.b.0.c`` of the model set to a value."""

    def edit(model: Any) -> None:
        *parts, last = path.split(".")
        for part in parts:
            model = model[int(part)] if part.isdigit() else getattr(model, part)
        if last.isdigit():
            model[int(last)] = value
        else:
            setattr(model, last, value)

    return edit


def stored_outside(**entries: str) -> Callable[[Any], None]:
    """The model's first initializer, in a file beside it."""

    def edit(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "w.data", **entries}.items():
            tensor.external_data.add(key=key, value=value)

    return edit


MATMUL = node("MatMul", ["x", "w"], ["y"], name="mm")
W = const("w", random_numbers(6, 4))
