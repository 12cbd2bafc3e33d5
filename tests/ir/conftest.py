"""Small graphs of either kind, drawn in the words of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir
import pytest
import torch
from graphwright.ir.core.view import Source, Value, View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.fx.view import FxView
from graphwright.ir.onnx.view import OnnxView
from torch._subclasses import FakeTensorMode

KINDS = ("fx", "onnx")


class Draft:
    """A graph in the making: ``op`` and ``native`` append a node, ``finish`` names the outputs.

    Every input is float32 and of the shape given.
    """

    view: View

    def __init__(self, kind: str, shapes: Mapping[str, tuple[int, ...]], outputs: int = 1) -> None:
        self.kind = kind
        self.shapes = dict(shapes)
        self._end: Any
        if kind == "fx":
            self._start_fx(tuple(f"out{i}" for i in range(outputs)))
        else:
            self._start_onnx()
        for name, value in zip(shapes, self.view.inputs(), strict=True):
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Value:
        raise AttributeError(f"the draft has no input {name!r}")

    def _start_fx(self, outputs: tuple[str, ...]) -> None:
        graph, mode = torch.fx.Graph(), FakeTensorMode()
        for name, shape in self.shapes.items():
            with mode:
                graph.placeholder(name).meta["val"] = torch.empty(shape)
        self._end = graph.output(())
        self.view = FxView(graph, None, {}, (tuple(self.shapes), outputs), Source(), {})

    def _start_onnx(self) -> None:
        inputs = [
            onnx_ir.Value(
                name=name,
                type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
                shape=onnx_ir.Shape(shape),
            )
            for name, shape in self.shapes.items()
        ]
        self._end = onnx_ir.Node("", "Identity", inputs[:1], name="end")
        graph = onnx_ir.Graph(inputs, [], nodes=[self._end], opset_imports={"": 20}, name="draft")
        self.view = OnnxView(onnx_ir.Model(graph, ir_version=10))

    def op(self, op: str, *operands: Any, **attrs: Any) -> Value:
        return self.view.build(op, operands, attrs, before=self._end)

    def native(self, target: Any, op_type: str, *operands: Value) -> Value:
        """A node outside the vocabulary: ``target`` in FX, ``op_type`` in ONNX."""
        if isinstance(self.view, FxView):
            with self.view.graph.inserting_before(self._end):
                value = self.view.graph.call_function(target, operands)
            self.view.type(value)
            return value
        assert isinstance(self.view, OnnxView)
        self.view.at(self._end)
        return self.view.emit(op_type, operands).outputs[0]

    def weight(self, name: str, tensor: torch.Tensor) -> Value:
        return self.view.add_weight(name, MemoryWeight(tensor))

    def finish(self, *outputs: Value) -> View:
        if isinstance(self.view, FxView):
            self._end.args = (outputs,)
        else:
            assert isinstance(self.view, OnnxView)
            self.view.erase(self._end)
            self.view.model.graph.outputs.extend(outputs)
        return self.view


@pytest.fixture(scope="session")
def draft_of() -> Callable[..., Draft]:
    """``draft_of(kind, shapes, outputs=1)``."""
    return Draft


@pytest.fixture(params=KINDS)
def draft(request: pytest.FixtureRequest) -> Callable[..., Draft]:
    """``draft(outputs=1, x=(3, 5), ...)`` on each graph kind in turn."""

    def make(outputs: int = 1, **shapes: tuple[int, ...]) -> Draft:
        return Draft(request.param, shapes or {"x": (3, 5), "y": (3, 5)}, outputs)

    return make
