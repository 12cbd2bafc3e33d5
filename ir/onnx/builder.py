"""``OnnxBuilder``: the vocabulary's builder where a graph is known to be an ONNX one."""

from __future__ import annotations

import onnx_ir

from ..vocab.builder import GraphBuilder
from .parts import Place
from .view import OnnxView


class OnnxBuilder(GraphBuilder[Place, onnx_ir.Value]):
    """Its places and values are those of ``onnx_ir``."""

    view: OnnxView
