"""How often the bodies of a node run: bounded before, or watched while they do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir

from ..core.errors import BadInput
from ..core.memory import available_bytes

MOST_TRIPS = 1 << 20
"""Trips of loops that nothing ends before, those within each other multiplied: 5 seconds for a body
of two nodes, and more than any model makes."""
MOST_SECONDS = 120.0
"""Of the processor, that loops may take whose trips nobody can tell before."""
LEAST_BYTES = 1 << 28
"""Memory of the machine below which they end."""
_EVERY = 0.25
"""Seconds between two looks at them."""
_ONE = 1.0

Env = Mapping[onnx_ir.Value, Any]


def check_trips(node: onnx_ir.Node, env: Env) -> None:
    """Raise ``BadInput`` for a node whose loops make more trips than ``MOST_TRIPS``.

    ``env`` holds a value for each of the node's arguments, captured ones among them.
    """
    trips = _trips(node, env)
    if trips <= MOST_TRIPS:
        return
    holds = "" if node.op_type == "Loop" and _own(node, env) == trips else "and what it holds "
    raise BadInput(
        f"{node.name} ({node.op_type}) {holds}makes {int(trips):,} trips, which nothing ends "
        f"before; up to {MOST_TRIPS:,} are run"
    )


def is_open(node: onnx_ir.Node) -> bool:
    """Whether a loop in it may go on for longer than can be told: it ends by a condition that it
    computes, or a body computes its trips."""
    loop = node.op_type == "Loop" and node.domain == ""
    return (loop and _may_end(node)) or any(
        is_open(inner) or _counts(inner) for body in _bodies(node) for inner in body
    )


def _counts(node: onnx_ir.Node) -> bool:
    """Whether the trips of a loop in a body are computed there."""
    return node.op_type == "Loop" and node.inputs[0] is not None and _number(
        node.inputs[0], {}
    ) is None  # fmt: skip


def _trips(node: onnx_ir.Node, env: Env) -> float:
    """The trips of all loops in a node, as far as its operands and its constants tell."""
    inner = [sum(_trips(one, env) for one in body) for body in _bodies(node)]
    return _own(node, env) * max([*inner, _ONE]) if inner else 0.0


def _own(node: onnx_ir.Node, env: Env) -> float:
    """How often a node runs its body: once where it does not say, or may end before."""
    if node.domain != "":
        return _ONE
    if node.op_type == "Loop" and not _may_end(node):
        count = _number(node.inputs[0], env)
        return _ONE if count is None else max(count, 0.0)
    if node.op_type == "Scan":
        return max([_ONE, *(float(n) for n in _scanned(node, env))])
    return _ONE


def _scanned(node: onnx_ir.Node, env: Env) -> Iterator[int]:
    """The lengths of what a Scan goes through, where they are known."""
    count = node.attributes["num_scan_inputs"].as_int()
    axes = node.attributes["scan_input_axes"].as_ints() if "scan_input_axes" in node.attributes \
        else [0] * count  # fmt: skip
    for value, axis in zip(node.inputs[-count:], axes, strict=False):
        if value is None:
            continue
        shape = env[value].shape if hasattr(env.get(value), "shape") else _shape(value)
        if shape is not None and -len(shape) <= axis < len(shape) and isinstance(shape[axis], int):
            yield shape[axis]


def _shape(value: onnx_ir.Value) -> Any:
    return None if value.shape is None else tuple(value.shape)


def _number(value: onnx_ir.Value | None, env: Env) -> float | None:
    """The one number that a value holds; ``None`` where that is not known."""
    while value is not None and value not in env and value.const_value is None:
        maker = value.producer()
        if maker is None or maker.op_type not in ("Identity", "Constant"):
            return None
        if maker.op_type == "Constant":
            entry = next(iter(maker.attributes.values())).value
            return float(entry.numpy().reshape(-1)[0]) if hasattr(entry, "numpy") else float(entry)
        value = maker.inputs[0]
    if value is None:
        return None
    held: Any = env.get(value, value.const_value)
    numbers = held if hasattr(held, "reshape") else held.numpy()
    return float(numbers.reshape(-1)[0])


def _bodies(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def _may_end(node: onnx_ir.Node) -> bool:
    """Whether the body computes its condition."""
    body = node.attributes["body"].as_graph()
    value: onnx_ir.Value | None = body.outputs[0]
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type != "Identity":
            return maker.op_type != "Constant"
        value = maker.inputs[0]
    return False


def run_watched(session: Any, inputs: Mapping[str, Any], node: onnx_ir.Node, options: Any) -> Any:
    """``session.run`` of a node that ``is_open``, with these options.

    Raises ``BadInput`` after ``MOST_SECONDS``, or where little memory is left.
    """
    done = threading.Event()

    def watch() -> None:
        start = time.process_time()
        while not done.wait(_EVERY):
            if time.process_time() - start > MOST_SECONDS or available_bytes() < LEAST_BYTES:
                options.terminate = True

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return session.run(None, inputs, options)
    except Exception as error:
        if not options.terminate:
            raise
        raise BadInput(
            f"{node.name} ({node.op_type}) had come to no end after {MOST_SECONDS:g} seconds, or "
            "held all memory that there was: its loops end by what they compute"
        ) from error
    finally:
        done.set()
        watcher.join()
