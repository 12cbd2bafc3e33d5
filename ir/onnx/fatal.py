"""Nodes at which ONNX Runtime ends the process instead of raising an error: they never get there.

Seen in ONNX Runtime 1.31 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class _Node(Protocol):
    """A node of onnx or of onnx-ir; an input that is left out is empty or ``None``."""

    @property
    def domain(self) -> str: ...
    @property
    def op_type(self) -> str: ...


def why_fatal(node: _Node, inputs: Sequence[Any]) -> str:
    """Why a node would end the process that runs it, and what would work; empty for all others."""
    if (node.domain, node.op_type) == ("com.microsoft", "Attention") and not any(inputs[2:3]):
        # Its kernel reads the bias's dtype unasked, though the op's schema calls it optional.
        return (
            "has no bias, at which ONNX Runtime's kernel ends the process: give it a bias of "
            "zeros, as wide as its weight"
        )
    return ""
