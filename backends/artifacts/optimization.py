"""What the runtime's graph optimisation alone changes, where coarse arithmetic hides it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import onnx_ir
import torch

from ...ir.core.errors import BoundExceeded
from ...ir.core.heap import give_back
from ...ir.onnx.view import OnnxView
from ...ir.onnx.widen import widen
from ...ir.run.verify import (
    ROUNDING_OPS,
    RUNTIME_REL_L2,
    Difference,
    rounds_activations,
    worst,
    worst_of,
)
from ..base import Executable
from ..runtimes.unrounded import LEVEL

Outputs = Mapping[str, torch.Tensor]
Open = Callable[[bytes, bool], Executable]
"""A session of a model in the place of the file's, its graph optimisation on or off."""
_HALVES = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)


def optimization_alone(
    model: bytes, inputs: Sequence[Mapping[str, torch.Tensor]], open_session: Open, what: str,
    unoptimized: Sequence[Outputs] = (), graph: Sequence[Outputs] = (),
) -> Difference:  # fmt: skip
    """How far optimisation moves the worst output of a model that computes in float32 and rounds
    nothing. ``unoptimized`` are its outputs without, if they are known; those of ``graph``, where
    they are given, are what its nodes give in float32 by the reference: constants of the model may
    be rounded to float16, and outputs may be as far apart as in that.

    Both runs are of one file, and agree as far as two runtimes do in float32: what a run of the
    artifact itself may be off by is 200 times that where activations are rounded, and 50 times in
    float16. Raises ``BoundExceeded``, which names ``what`` ran, where they do not.
    """
    before = unoptimized or _outputs(open_session(model, False), inputs)
    give_back()  # each session may hold the whole model
    after = _outputs(open_session(model, True), inputs)
    give_back()
    bound = RUNTIME_REL_L2[torch.float16]
    for name, error in worst_of(graph, before).items() if graph else ():
        if not error.within(bound):
            raise BoundExceeded(
                f"{what}: in float32 the output {name} is {error.rel_l2:.3g} (relative L2; bound "
                f"{bound:g}) from what the rewritten graph gives in it: the artifact is not "
                "published. Report the model"
            )
    bound = RUNTIME_REL_L2[torch.float32]
    errors = worst_of(before, after)
    for name, error in errors.items():
        if not error.within(bound):
            raise BoundExceeded(
                f"{what}: graph optimisation alone moves the output {name} by {error.rel_l2:.3g} "
                f"(relative L2; bound {bound:g}), in float32 and without rounding: the artifact is "
                "not published. Update onnxruntime, or report the model"
            )
    return worst(errors)


def _outputs(executable: Executable, inputs: Sequence[Mapping[str, torch.Tensor]]) -> list[Outputs]:
    return [executable(**{name: _wide(t) for name, t in row.items()}) for row in inputs]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def float_twin(path: Path) -> bytes | None:
    """The model of a file with float32 in the place of half types, ``accuracy_level`` 0, and
    activations past ``QuantizeLinear`` and ``DequantizeLinear``. Weights stay where they lie.

    What saturates there is another number here: the twin is to be held against itself alone.
    ``None`` where it would round all the same (``MatMulInteger``, say).
    """
    model = onnx_ir.load(path)
    graphs = list(model.graphs())
    for graph in graphs:
        for node in list(graph):
            _leave_exact(node)
    bodies = (node for graph in graphs if graph is not model.graph for node in graph)
    view = OnnxView(model)
    if rounds_activations(view) or _rounds(bodies):
        return None
    for half in _HALVES:
        widen(view, half)
    return bytes(onnx_ir.to_proto(view.model).SerializeToString())


def _rounds(nodes: Iterable[onnx_ir.Node]) -> bool:
    return any(ROUNDING_OPS.search(node.op_type) for node in nodes)


def _leave_exact(node: onnx_ir.Node) -> None:
    if LEVEL in node.attributes:
        node.attributes[LEVEL] = onnx_ir.AttrInt64(LEVEL, 0)
    codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    quantize = None if codes is None else codes.producer()
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return
    node.op_type = "Identity"
    node.attributes.clear()
    node.resize_inputs(1)
    node.replace_input_with(0, quantize.inputs[0])
    if not quantize.outputs[0].uses() and not quantize.outputs[0].is_graph_output():
        assert isinstance(quantize.graph, onnx_ir.Graph)
        quantize.graph.remove(quantize, safe=True)
