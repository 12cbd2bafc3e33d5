"""Nodes outside the vocabulary, run one at a time: by ONNX Runtime, or by onnx's own evaluator.

ONNX Runtime is what an artifact runs in, so its kernel is the meaning of such a node. onnx's
evaluator (which is wrong on some ops, and lacks those of other domains) is asked only where ONNX
Runtime has no kernel for a node on the CPU, such as most of bfloat16, or does not take a graph
inside a node as it is written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
import torch

from ..core.errors import BadInput, NodeFailed
from .fatal import why_fatal
from .node_model import inner_nodes
from .node_session import Feeds, Run, Unfit, evaluator, session, session_with_constants
from .parts import has_subgraph
from .trips import is_open

KEPT = 256
"""Sessions that a graph keeps. Each is of one node without its weights: 0.2 ms to make, and less
memory than shows (300 of them: no megabyte)."""
_DRAWS = frozenset({
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
    "Bernoulli",
})  # fmt: skip
"""Ops of ONNX whose results differ from run to run."""
_LINE = 300
"""Characters of an error that are shown."""
_WAYS = {
    session: "ONNX Runtime", session_with_constants: "ONNX Runtime",
    evaluator: "onnx's reference evaluator",
}  # fmt: skip
_Key = tuple[onnx_ir.Node, tuple[Any, ...]]


class NativeNodes:
    """Runs native nodes of one model; a node is made ready once for each kind of operands."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self._model = model
        self._ready: OrderedDict[_Key, Run] = OrderedDict()

    def run(self, node: onnx_ir.Node, feeds: Feeds) -> tuple[Any, ...]:
        """A value for each output of the node, ``None`` for one that the node omits.

        Raises ``BadInput`` where neither runtime takes it, where its results differ from run to
        run, and where ONNX Runtime would end the process.
        """
        _refuse_random(self._model, node, feeds)
        key = (node, tuple((v.name, v.dtype, _kind(feed)) for v, feed in feeds.items()))
        results = iter(self._again(key, feeds) if key in self._ready else self._first(key, feeds))
        return tuple(next(results) if value.name else None for value in node.outputs)

    def _again(self, key: _Key, feeds: Feeds) -> Sequence[Any]:
        self._ready.move_to_end(key)
        try:
            return self._ready[key](feeds)
        except BadInput:
            raise
        except Exception as error:  # as in ``_first``
            raise NodeFailed(
                f"{_label(key[0])} does not take its operands: {_line(error)}"
            ) from error

    def _first(self, key: _Key, feeds: Feeds) -> Sequence[Any]:
        """Find a way that runs the node, and keep it."""
        _refuse_fatal(self._model, key[0])
        reasons: list[str] = []
        kernel = False
        for way in (session, session_with_constants, evaluator):
            if way is evaluator and kernel and not has_subgraph(key[0]):
                break  # what the runtime's kernel does not take is not an operand
            if way is evaluator and is_open(key[0]):
                break  # nothing ends it
            try:
                ready = way(self._model, key[0], feeds)
                kernel = True
                results = ready(feeds)
            except Unfit:
                continue
            except BadInput:  # it had come to no end
                raise
            except Exception as error:  # the runtime's errors share no base; onnx's are numpy's own
                reasons.append(f"{_WAYS[way]}: {_line(error)}")
                continue
            if way is not session_with_constants:  # which is right for these constants alone
                self._ready[key] = ready
            if len(self._ready) > KEPT:
                self._ready.popitem(last=False)
            return results
        what = "does not take its operands" if kernel else "does not run here"
        failed = NodeFailed if kernel else BadInput
        raise failed(f"{_label(key[0])} {what} ({'; '.join(dict.fromkeys(reasons))})")


def _label(node: onnx_ir.Node) -> str:
    return f"{node.name} ({node.domain or 'ai.onnx'}::{node.op_type})"


def _line(error: Exception) -> str:
    """The last of what ONNX Runtime says in a line, which names its own code first."""
    text = str(error).strip().partition("\n")[0].rpartition("Status Message: ")[2]
    return text[-_LINE:] or type(error).__name__


def _kind(feed: Any) -> Any:
    """What a node is made ready for: a dtype and a rank, or a Python type."""
    if isinstance(feed, torch.Tensor | np.ndarray):
        return feed.dtype, feed.ndim
    return type(feed)


def _refuse_fatal(model: onnx_ir.Model, node: onnx_ir.Node) -> None:
    for one in (node, *inner_nodes(model, node)):
        fatal = why_fatal(one, one.inputs)
        if fatal:
            raise BadInput(f"{_label(one)} {fatal}")


def _refuse_random(model: onnx_ir.Model, node: onnx_ir.Node, feeds: Feeds) -> None:
    """Raise ``BadInput`` for a node that draws numbers, itself or in what it holds and calls."""
    for one in (node, *inner_nodes(model, node)):
        if one.domain == "" and (one.op_type in _DRAWS or _drops(one, feeds)):
            why = "in training mode " if one.op_type == "Dropout" else ""
            raise BadInput(
                f"{_label(one)} {why}gives other numbers at each run, so nothing that is made of "
                "the graph can be checked: export the model for inference, or make the noise an "
                "input of the graph"
            )


def _drops(node: onnx_ir.Node, feeds: Feeds) -> bool:
    if node.op_type != "Dropout" or len(node.inputs) < 3:
        return False
    ratio, training = (_number(value, feeds) for value in node.inputs[1:3])
    return bool(training) and ratio != 0


def _number(value: onnx_ir.Value | None, feeds: Feeds) -> float | None:
    if value is None:
        return None
    if value in feeds:
        return float(feeds[value])
    return None if value.const_value is None else float(value.const_value.numpy())
