"""One forward sweep over a graph: topological order, values freed after their last use.

Weights are read when a node needs them and dropped at once, so that peak memory is one node's
weights plus the live activations, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .errors import BadInput
from .view import Node, Value, View

Observer = Callable[[Node, list[Any], tuple[Any, ...]], None]
"""Called after each node with its arguments (as ``view.arguments`` orders them) and its results."""


def sweep(
    view: View, inputs: Mapping[str, torch.Tensor], *, observe: Observer | None = None
) -> dict[str, torch.Tensor]:
    """Run the graph on CPU tensors by reference semantics; outputs by name.

    Raises ``BadInput`` where an input is missing, unknown, or of another dtype or rank.
    """
    env: dict[Value, Any] = dict(zip(view.inputs(), _bind(view, inputs), strict=True))
    order = list(view.nodes())
    last = _last_uses(view, order)
    keep = set(view.outputs())
    with torch.no_grad():
        for position, node in enumerate(order):
            arguments = view.arguments(node)
            given = [_value(view, env, a) for a in arguments]
            results = view.execute(node, given)
            if observe is not None:
                observe(node, given, results)
            del given
            for value, result in zip(view.results(node), results, strict=True):
                if value in last or value in keep:
                    env[value] = result
            for value in arguments:
                if last[value] == position and value not in keep:
                    env.pop(value, None)
        return {
            name: _value(view, env, value)
            for name, value in zip(view.output_names(), view.outputs(), strict=True)
        }


def _last_uses(view: View, order: list[Node]) -> dict[Value, int]:
    last: dict[Value, int] = {}
    for position, node in enumerate(order):
        for value in view.arguments(node):
            last[value] = position
    return last


def _value(view: View, env: Mapping[Value, Any], value: Value) -> Any:
    if value in env:
        return env[value]
    weight = view.weight(value)
    if weight is None:
        raise BadInput(f"the value {view.name(value)} is used before it is computed")
    return weight.read()


def _bind(view: View, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    names = view.input_names()
    unknown, missing = sorted(set(inputs) - set(names)), sorted(set(names) - set(inputs))
    if unknown or missing:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unknown {', '.join(unknown)}"] if unknown else []
        takes = f"the graph takes {', '.join(names)}"
        raise BadInput(f"inputs do not fit: {'; '.join(parts)} ({takes})")
    for name, value in zip(names, view.inputs(), strict=True):
        declared, given = view.type(value), inputs[name]
        if declared.dtype not in (None, given.dtype):
            raise BadInput(f"input {name}: expected {declared}, got {given.dtype}")
        if declared.rank not in (None, given.dim()):
            raise BadInput(f"input {name}: expected {declared}, got shape {list(given.shape)}")
    return [inputs[name] for name in names]
