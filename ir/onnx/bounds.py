"""Nodes that ask for more memory or more steps than there are, told before they run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir

from ..core.memory import refuse_beyond_memory
from .read import OnnxReader
from .trips import check_trips

_ALWAYS = 1 << 26
"""Bytes that a result may take whatever the machine has."""

Env = Mapping[onnx_ir.Value, Any]
Predict = Callable[[onnx_ir.Node, Env], float]


def refuse_unbounded(view: OnnxReader, node: onnx_ir.Node, env: Env) -> None:
    """Raise ``BadInput`` for a node whose result does not fit into memory, and for loops without
    an end; ``env`` holds a tensor for each of its arguments."""
    check_trips(node, env)
    count = _predicted(view, node, env)
    if count is not None and count > _ALWAYS:
        refuse_beyond_memory(count, f"{node.name} ({node.op_type}): its result")


def _predicted(view: OnnxReader, node: onnx_ir.Node, env: Env) -> int | None:
    """Bytes of the result of an op that grows with the numbers in its operands; what grows with
    their shapes alone is told before a sweep (``run.predict``)."""
    predict = _GROWING.get(view.op(node)) or _NATIVE.get(node.op_type)
    if predict is None:
        return None
    dtype = node.outputs[0].dtype
    return int(predict(node, env)) * (4 if dtype is None else max(1, dtype.bitwidth // 8))


def _numbers(node: onnx_ir.Node, index: int, env: Env) -> list[float]:
    value = node.inputs[index] if index < len(node.inputs) else None
    return [] if value is None else [float(n) for n in env[value].reshape(-1).tolist()]


def _shape(node: onnx_ir.Node, env: Env) -> list[int]:
    value = node.inputs[0]
    return [] if value is None else list(env[value].shape)


def _expanded(node: onnx_ir.Node, env: Env) -> float:
    return math.prod(max(a, b) for a, b in itertools.zip_longest(
        reversed(_shape(node, env)), reversed(_numbers(node, 1, env)), fillvalue=1
    ))  # fmt: skip


def _counted(node: onnx_ir.Node, env: Env) -> float:
    start, end, step = (_numbers(node, index, env)[0] for index in range(3))
    return abs(end - start) / abs(step) if step else 0


def _repeated(node: onnx_ir.Node, env: Env) -> float:
    return math.prod(_shape(node, env)) * math.prod(_numbers(node, 1, env))


def _padded(node: onnx_ir.Node, env: Env) -> float:
    added = sum(max(0.0, pad) for pad in _numbers(node, 1, env))
    return math.prod(size + added for size in _shape(node, env))


def _resized(node: onnx_ir.Node, env: Env) -> float:
    sizes, scales = _numbers(node, 3, env), _numbers(node, 2, env)
    return math.prod(sizes) if sizes else math.prod(_shape(node, env)) * math.prod(scales)


_GROWING: dict[str, Predict] = {"expand": _expanded, "arange": _counted}
_NATIVE: dict[str, Predict] = {
    "ConstantOfShape": lambda node, env: math.prod(_numbers(node, 0, env)),
    "Tile": _repeated, "OneHot": _repeated, "Pad": _padded, "Resize": _resized,
}  # fmt: skip
"""Ops whose result grows with numbers that they are given: how many it has, at most."""
