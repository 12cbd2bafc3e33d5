"""The graph as it is, node by node with reference ops: the oracle."""

from __future__ import annotations

from pathlib import Path

import torch

from ...ir.core.errors import BadInput
from ...ir.core.size_bounds import check_sizes, read_sizes
from ...ir.core.view import View
from ...ir.run.sweep import sweep
from ..base import Backend, ViewExecutable, bind


class EagerExecutable(ViewExecutable):
    """Runs a view by ``ir.run.sweep``; weights are read at each use."""

    def __call__(self, *args: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        types = self.input_types
        bound = bind(types, args, inputs)
        shapes = {name: (types[name].shape or (), t.shape) for name, t in bound.items()}
        check_sizes(read_sizes(self._view.metadata()), shapes)
        return sweep(self._view, bound)


def build(graph: View | str | Path, *, device: str = "cpu") -> EagerExecutable:
    """See ``registry.compile``. An artifact is loaded as a graph first."""
    check_device(device)
    if isinstance(graph, View):
        return EagerExecutable(graph)
    from ...ir.load.sources import load

    path = Path(graph)
    return EagerExecutable(load(path / "model.onnx" if path.is_dir() else path))


def check_device(device: str) -> None:
    """Raise ``BadInput`` for another device than the CPU."""
    if device != "cpu":
        raise BadInput("the eager backend runs on the CPU; use --backend onnxruntime for a GPU")


BACKEND = Backend(build, check_device, is_reference=True)
