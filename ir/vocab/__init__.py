"""The vocabulary: the ops in which patterns, structure and passes speak, each declared once.

One file a family; ``spec.OpSpec`` says what a declaration holds. What is not declared stays a
``native`` node of its graph.
"""

from __future__ import annotations

from .dense import dense_weight
from .registry import (
    ATEN_DECODERS,
    ONNX_DECODERS,
    VOCABULARY,
    check_arity,
    check_known,
    complete_attrs,
    declared,
    is_known,
    load_dialects,
    ops_with,
    register,
    spec,
    traits,
)
from .spec import END, REQUIRED, Macs, OpSpec, StoredLinear

__all__ = [
    "ATEN_DECODERS", "END", "ONNX_DECODERS", "REQUIRED", "VOCABULARY", "Macs", "OpSpec",
    "StoredLinear", "check_arity", "check_known", "complete_attrs", "declared", "dense_weight",
    "is_known", "load_dialects", "ops_with", "register", "spec", "traits",
]  # fmt: skip
