"""One ONNX node on real values: by the vocabulary's reference, or as the native node that it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir
import torch

from ..core.errors import NodeFailed
from ..core.values import is_opaque
from ..core.view import NATIVE
from ..vocab import spec
from ..vocab.onnx import DOMAIN
from .native import NativeNodes
from .parts import is_untyped_constant
from .read import OnnxReader


def execute(
    view: OnnxReader, natives: NativeNodes, node: onnx_ir.Node, env: Mapping[onnx_ir.Value, Any]
) -> tuple[Any, ...]:
    """Results of one node; ``env`` holds a value for each of its arguments.

    Raises ``NodeFailed`` where the node does not take them.
    """
    op = view.op(node)
    if op == NATIVE or _beyond_torch(node, env):
        return natives.run(node, env)
    operands = [env[o] if isinstance(o, onnx_ir.Value) else o for o in view.operands(node)]
    try:
        value = spec(op).reference(*operands, **view.attrs(node))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # torch's words
        reason = str(error).partition("\n")[0]
        raise NodeFailed(
            f"{node.name} ({node.op_type}) does not take its operands: {reason}"
        ) from error
    results = value if isinstance(value, tuple) else (value,)
    return tuple(_typed(r) for r in results)


def _beyond_torch(node: onnx_ir.Node, env: Mapping[onnx_ir.Value, Any]) -> bool:
    """Whether a node of ONNX, which the vocabulary reads, has an operand that torch has not."""
    if node.domain == DOMAIN:
        return False
    inputs = [value for value in node.inputs if value is not None]
    return any(map(is_untyped_constant, inputs)) or any(map(is_opaque, env.values()))


def _typed(result: Any) -> torch.Tensor:
    if isinstance(result, torch.Tensor):
        return result
    return torch.as_tensor(result, dtype=torch.int64)
