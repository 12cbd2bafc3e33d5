"""One forward sweep over a graph: topological order, values freed after their last use.

Weights are read when a node needs them and dropped at once, so that peak memory is one node's
weights plus the live activations, whatever the model's size. Several batches go through each node
together, so that every weight is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..core.errors import BadInput
from ..core.values import numbers
from ..core.view import Node, Value, View
from ..structure.cache_slots import check_shared, left_out
from ..structure.cuts import COUNT_KEY
from ..structure.pictured import check_pictured
from ..vocab import traits
from .predict import refuse_unbounded

JOINED = 8192
"""Tokens of several batches that a stored linear or a statistic takes at once: by then its time is
that of the product, and their copy takes less than the weight of a large linear."""
Observer = Callable[[Node, list[Any], tuple[Any, ...]], None]
"""Called after each node with its arguments (as ``view.arguments`` orders them) and its results."""
Results = tuple[Any, ...]
Visit = Callable[[Node, list[list[Any]], list[Results]], list[Results] | None]
"""Called after a node with its arguments and results, batch by batch. What it gives back stands in
for the results from there on: what follows sees them."""
Execute = Callable[[View, Node, list[list[Any]]], list[Results]]
"""Runs a node on its arguments, batch by batch."""


def sweep(
    view: View, inputs: Mapping[str, torch.Tensor], *, observe: Observer | None = None
) -> dict[str, torch.Tensor]:
    """Run the graph on CPU tensors by reference semantics; outputs by name, as ``numbers``.

    Raises ``BadInput`` where an input is missing, unknown, or of another dtype, rank or fixed size.
    """

    def visit(node: Node, arguments: list[list[Any]], results: list[Results]) -> None:
        assert observe is not None
        observe(node, arguments[0], results[0])

    return sweep_together(view, [inputs], None if observe is None else visit)[0]


def sweep_together(
    view: View,
    batches: Sequence[Mapping[str, torch.Tensor]],
    visit: Visit | None = None,
    nodes: frozenset[Node] | None = None,
    *,
    outputs: bool = True,
    execute: Execute | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Run the graph on all batches, node by node; the outputs of each.

    ``visit`` is called at ``nodes`` (all, where not given). It must not edit the graph. Without
    ``outputs`` the sweep ends behind the last of ``nodes`` and gives nothing: logits of all
    calibration data would take more memory than anything else. ``execute`` runs a node in the place
    of ``executed``. Raises as ``sweep``.
    """
    values = [_bind(view, inputs) for inputs in batches]
    env = _columns(view, values)
    order = list(view.nodes())
    if not outputs and nodes is not None:
        order = order[: max((i for i, n in enumerate(order, 1) if n in nodes), default=0)]
    refuse_unbounded(view, values, order)
    last = _last_uses(view, order, view.outputs() if outputs else ())
    with torch.no_grad():
        for position, node in enumerate(order):
            arguments = _arguments(view, env, view.arguments(node), len(batches))
            results = (execute or executed)(view, node, arguments)
            if visit is not None and (nodes is None or node in nodes):
                results = visit(node, arguments, results) or results
            del arguments
            _take(view, node, results, env, last, position)
        if not outputs:
            return []
        columns = [_arguments(view, env, (value,), len(batches)) for value in view.outputs()]
    names = view.output_names()
    return [
        {name: numbers(column[row][0]) for name, column in zip(names, columns, strict=True)}
        for row in range(len(batches))
    ]


def run_part(
    view: View, nodes: Sequence[Node], known: Mapping[Value, list[Any]], keep: Collection[Value]
) -> dict[Value, list[Any]]:
    """Run some nodes, in this order, on values that are there already, batch by batch.

    Gives the values of ``keep`` that are then known; what else was computed is let go after its
    last use.
    """
    env, last = dict(known), _last_uses(view, nodes, keep)
    count = len(next(iter(env.values())))
    with torch.no_grad():
        for position, node in enumerate(nodes):
            results = executed(view, node, _arguments(view, env, view.arguments(node), count))
            _take(view, node, results, env, last, position)
    return {value: env[value] for value in keep if value in env}


def _take(
    view: View, node: Node, results: Sequence[Results], env: dict[Value, list[Any]],
    last: Mapping[Value, int], position: int,
) -> None:  # fmt: skip
    """Keep what a node gave until its ``last`` use, and let its arguments go that had theirs."""
    for i, value in enumerate(view.results(node)):
        if value in last:
            env[value] = [row[i] for row in results]
    for value in view.arguments(node):
        if last[value] == position:
            env.pop(value, None)


def bound(
    view: View, batches: Sequence[Mapping[str, torch.Tensor]]
) -> dict[Value, list[Any]]:
    """What the graph's inputs hold, batch by batch. Raises ``BadInput`` as ``sweep``."""
    return _columns(view, [_bind(view, inputs) for inputs in batches])


def _columns(view: View, values: Sequence[Sequence[Any]]) -> dict[Value, list[Any]]:
    return {value: [row[i] for row in values] for i, value in enumerate(view.inputs())}


def executed(view: View, node: Node, arguments: list[list[Any]]) -> list[Results]:
    """The node's results, batch by batch.

    Batches of a stored linear are joined, up to ``JOINED`` tokens, since it makes its weight anew
    each time that it runs.
    """
    if len(arguments) == 1 or traits(view.op(node)).stored_linear is None:
        return [view.execute(node, row) for row in arguments]
    place = view.arguments(node).index(view.operands(node)[0])
    inputs = [row[place] for row in arguments]
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    parts: list[torch.Tensor] = []
    for run in joined(flat):
        row = list(arguments[0])
        row[place] = torch.cat(run)
        parts += view.execute(node, row)[0].split([len(x) for x in run])
    return [
        (y.reshape(*x.shape[:-1], y.shape[-1]),) for x, y in zip(inputs, parts, strict=True)
    ]


def joined(batches: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of neighbouring batches that have up to ``JOINED`` rows together, at least one each."""
    run: list[torch.Tensor] = []
    for batch in batches:
        if run and sum(map(len, run)) + len(batch) > JOINED:
            yield run
            run = []
        run.append(batch)
    if run:
        yield run


def _arguments(
    view: View, env: Mapping[Value, list[Any]], arguments: Sequence[Value], count: int
) -> list[list[Any]]:
    """The arguments of each batch; a weight is read once."""
    columns = [env[a] if a in env else [_weight(view, a)] * count for a in arguments]
    return [[column[row] for column in columns] for row in range(count)]


def _weight(view: View, value: Value) -> torch.Tensor:
    weight = view.default(value)
    if weight is None:
        raise BadInput(f"the value {view.name(value)} is used before it is computed")
    return weight.read()


def _last_uses(
    view: View, order: Sequence[Node], keep: Collection[Value]
) -> dict[Value, int]:
    """Where each value is used for the last time; those to keep beyond the end."""
    last: dict[Value, int] = {}
    for position, node in enumerate(order):
        for value in view.arguments(node):
            last[value] = position
    return last | dict.fromkeys(keep, len(order))


def _bind(view: View, inputs: Mapping[str, Any]) -> list[Any]:
    names = view.input_names()
    types = dict(zip(names, map(view.type, view.inputs()), strict=True))
    inputs = {**inputs, **left_out(types, inputs)}
    unknown, missing = sorted(set(inputs) - set(names)), sorted(set(names) - set(inputs))
    if unknown or missing:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unknown {', '.join(unknown)}"] if unknown else []
        takes = f"the graph takes {', '.join(names)}"
        raise BadInput(f"inputs do not fit: {'; '.join(parts)} ({takes})")
    for name, value in zip(names, view.inputs(), strict=True):
        declared, tensor = view.type(value), inputs[name]
        if not isinstance(tensor, torch.Tensor):
            continue  # a sequence, say: what reads it says whether it fits
        if declared.dtype not in (None, tensor.dtype):
            raise BadInput(f"input {name}: expected {declared}, got {tensor.dtype}")
        pairs = zip(declared.shape or (), tensor.shape, strict=False)
        fits = all(dim == size for dim, size in pairs if isinstance(dim, int))
        if declared.rank not in (None, tensor.dim()) or not fits:
            raise BadInput(f"input {name}: expected {declared}, got shape {list(tensor.shape)}")
    shapes = {n: (types[n].shape or (), t.shape) for n, t in inputs.items() if torch.is_tensor(t)}
    check_shared(shapes)
    check_pictured(view.source.prompt, inputs, cut=COUNT_KEY in view.metadata())
    return [inputs[name] for name in names]
