"""``OnnxView``: an ``onnx_ir.Model`` seen through the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir

from ..core.view import Source, View
from .bounds import refuse_unbounded
from .edit import OnnxEditor
from .execute import execute
from .infer import infer_unknown, untyped_sequences
from .native import NativeNodes


class OnnxView(OnnxEditor):
    """An ONNX graph. Constant nodes become initializers; functions and subgraphs stay as they are.

    ``model`` is owned by the view and edited in place (a copy of it, where torch's exporter has
    just made it); ``copy`` gives an independent one. What it answers is in ``read``, what it
    adds in ``insert``, and what it changes in ``edit``.
    """

    def __init__(self, model: onnx_ir.Model, *, source: Source | None = None) -> None:
        super().__init__(model, source=source)
        self._natives = NativeNodes(self.model)

    def infer_types(self) -> bool:
        sequences = untyped_sequences(self.model.graph)
        by_onnx = super().infer_types()
        for value in sequences:
            value.type = value.shape = None
        return infer_unknown(self) or by_onnx

    def copy(self) -> OnnxView:
        view = OnnxView(self.model.clone(), source=self.source)
        view.origin, view.edits, view.canonical = self.origin, self.edits, self.canonical
        return view

    def execute(self, node: onnx_ir.Node, args: Sequence[Any]) -> tuple[Any, ...]:
        env = dict(zip(self.arguments(node), args, strict=True))
        refuse_unbounded(self, node, env)
        return execute(self, self._natives, node, env)


def native_view(view: View) -> OnnxView:
    """A view of an ONNX graph as what it is: its nodes and values are those of ``onnx_ir``."""
    assert isinstance(view, OnnxView)
    return view
