"""Triton: our ops run as our kernels on a CUDA device, the rest as torch ops on it.

With ``TRITON_INTERPRET=1`` in the environment triton interprets its kernels on the CPU: slowly, but
everything else is as on a device.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.fx.node import Node as FxNode

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput, Missing
from ...ir.core.types import Type
from ...ir.core.view import Node, Value, View, is_value
from ...ir.core.weights import CastWeight
from ...ir.fx.read import Operand as FxOperand
from ...ir.fx.view import FxView
from ...ir.rewrite.driver import rewrite
from ..base import Backend, ViewExecutable, bind
from .score_kernel import RULES
from .triton_kernels import NEEDED_COMPUTE, Binding, Bound, Fallback, bind_kernels

logger = logging.getLogger(__name__)

Run = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
"""The inputs in order to the outputs in order, all on the device."""


class TritonExecutable(ViewExecutable):
    """Runs a graph on one device; its weights lie there. Outputs stay on the device."""

    def __init__(self, view: View, run: Run, device: torch.device, binding: Binding) -> None:
        super().__init__(view)
        self._run = run
        self._device = device
        self.fallbacks: tuple[Fallback, ...] = binding.fallbacks
        """Nodes of our ops that run by their reference, each with the reason."""
        self.kernels: Counter[str] = Counter(b.kernel.__name__ for b in binding.bound.values())
        """How many calls of each kernel one run makes."""

    def __call__(self, *args: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """See ``Executable``. Inputs are moved to the device where they are not there yet."""
        types = self.input_types
        bound = bind(types, args, inputs)
        for name, declared in types.items():
            tensor = bound[name]
            if declared.dtype not in (None, tensor.dtype) or declared.rank not in (
                None, tensor.dim(),
            ):  # fmt: skip
                actual = Type(tensor.dtype, tuple(tensor.shape))
                raise BadInput(f"input {name}: expected {declared}, got {actual}")
        with torch.no_grad():
            results = self._run([bound[name].to(self._device) for name in types])
        return dict(zip(self.output_names, results, strict=True))


def build(
    graph: View | str | Path, *, device: str = "cuda", strict: bool = False
) -> TritonExecutable:
    """See ``registry.compile``. An artifact is loaded as a graph first; the graph stays as it is.

    A copy of an ONNX graph is canonicalized, since its stock ops expand what our kernels take,
    low-rank paths among it.

    With ``strict`` nothing may fall back to a reference: ``Missing`` where the device is too old
    for the kernels, ``BadInput`` where a node's form has none. Raises ``Missing`` without a CUDA
    device or without triton.
    """
    place = _place(device)
    if not isinstance(graph, View):
        from ...ir.load.sources import load

        path = Path(graph)
        graph = load(path / "model.onnx" if path.is_dir() else path)
    compute = torch.cuda.get_device_capability(place) if place.type == "cuda" else None
    view = graph.copy()
    if not isinstance(view, FxView):
        canonicalize(view)
    rewrite(view, [rule() for rule in RULES])
    binding = bind_kernels(view, compute)
    if strict:
        _refuse(binding.fallbacks, compute)
    _tell(binding.fallbacks)
    if isinstance(view, FxView):
        run = _fx_run(view, binding, place)
    else:
        run = _NodeByNode(view, binding, place)
    return TritonExecutable(graph, run, place, binding)


def check_device(device: str) -> None:
    """Raise ``Missing`` where there is no CUDA device or no triton, ``BadInput`` for ``cpu``."""
    _place(device)


def _place(device: str) -> torch.device:
    if importlib.util.find_spec("triton") is None:
        raise Missing(
            "triton is not installed (it is made for Linux on x86-64: pip install triton); use "
            "--backend onnxruntime or eager"
        )
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if interpreted:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Missing(
            "the triton backend needs a CUDA device and torch sees none: use --backend onnxruntime "
            "or eager, or set TRITON_INTERPRET=1 to try the kernels slowly on the CPU"
        )
    if device != "cuda":
        raise BadInput(f"the triton backend runs on a CUDA device, not on {device}: --device cuda")
    return torch.device("cuda", torch.cuda.current_device())


def _refuse(fallbacks: Sequence[Fallback], compute: tuple[int, int] | None) -> None:
    if not fallbacks:
        return
    first = fallbacks[0]
    more = f", and {len(fallbacks) - 1} more nodes" if len(fallbacks) > 1 else ""
    error = Missing if compute is not None and compute < NEEDED_COMPUTE else BadInput
    raise error(
        f"strict: {first.node} ({first.op}) would run by its reference: {first.reason}{more}; "
        "leave out strict to let it"
    )


def _tell(fallbacks: Sequence[Fallback]) -> None:
    for (op, reason), count in Counter((f.op, f.reason) for f in fallbacks).items():
        logger.warning("%s runs by its reference at %d nodes: %s", op, count, reason)


# --- an FX graph: one module ---------------------------------------------------------------------


def _fx_run(view: FxView, binding: Binding, device: torch.device) -> Run:
    for place, bound in binding.bound.items():
        node, operands = cast(FxNode, place), cast("tuple[FxOperand, ...]", bound.operands)
        with view.graph.inserting_before(node):
            call = view.graph.call_function(bound.kernel, operands, dict(bound.attrs))
        node.replace_all_uses_with(call)
        view.graph.erase_node(node)
    for node in view.graph.nodes:
        node.args, node.kwargs = _moved(node.args, device), _moved(node.kwargs, device)
    view.graph.eliminate_dead_code()
    _cast_once(view)
    view.drop_unused_weights()
    module = view.to_module().to(device)
    return lambda inputs: module(*inputs)


def _moved(argument: Any, device: torch.device) -> Any:
    """Constants that the trace placed on the CPU are placed on the device."""
    if isinstance(argument, torch.device):
        return device
    if isinstance(argument, tuple | list):
        return type(argument)(_moved(a, device) for a in argument)
    if isinstance(argument, dict):
        return {k: _moved(a, device) for k, a in argument.items()}
    return argument


def _cast_once(view: View) -> None:
    """cast(weight) => weight in that dtype: what is the same in each call is done before."""
    for node in list(view.nodes()):
        if view.op(node) != "cast":
            continue
        source = view.tensor(node)
        weight = view.weight(source)
        if weight is None:
            continue
        dtype = view.attrs(node)["dtype"]
        stored = view.add_weight(f"{view.name(source)}.{dtype}", CastWeight(weight, dtype))
        view.replace(view.result(node), stored)
        view.erase_dead(node)


# --- any other graph: node by node ---------------------------------------------------------------


class _NodeByNode:
    """Runs a view by ``execute`` on a device, but for the nodes that kernels stand for."""

    def __init__(self, view: View, binding: Binding, device: torch.device) -> None:
        self._view = view
        self._device = device
        order = [node for node in view.nodes() if node not in binding.absorbed]
        self._steps = [(node, binding.bound.get(node)) for node in order]
        self._last: dict[Value, int] = {}
        for position, (node, bound) in enumerate(self._steps):
            self._last |= dict.fromkeys(self._reads(node, bound), position)
        used = [v for v in (*self._last, *view.outputs()) if view.default(v) is not None]
        self._weights = {v: self._weight(v) for v in dict.fromkeys(used)}

    def _weight(self, value: Value) -> torch.Tensor:
        weight = self._view.default(value)
        assert weight is not None
        return weight.read().to(self._device)

    def _reads(self, node: Node, bound: Bound | None) -> tuple[Value, ...]:
        if bound is None:
            return self._view.arguments(node)
        return tuple(o for o in bound.operands if is_value(o))

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        # References make ranges and constants where torch makes them if not told.
        with torch.device(self._device):
            return self._swept(inputs)

    def _swept(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        view, keep = self._view, set(self._view.outputs())
        env: dict[Value, Any] = dict(zip(view.inputs(), inputs, strict=True))
        for position, (node, bound) in enumerate(self._steps):
            reads = self._reads(node, bound)
            tensors = {v: env[v] if v in env else self._weights[v] for v in reads}
            if bound is None:
                results = view.execute(node, [tensors[v] for v in reads])
            else:
                operands = [tensors[o] if is_value(o) else o for o in bound.operands]
                results = (bound.kernel(*operands, **bound.attrs),)
            for value, result in zip(view.results(node), results, strict=True):
                env[value] = result.to(self._device) if torch.is_tensor(result) else result
            for value in reads:
                if self._last[value] == position and value not in keep:
                    env.pop(value, None)
        return [env[v] if v in env else self._weights[v] for v in view.outputs()]


BACKEND = Backend(build, check_device, library="triton")
