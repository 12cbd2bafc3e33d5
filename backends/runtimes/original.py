"""ONNX files as originals: ONNX Runtime runs the file itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import torch

from ...ir.core.view import Run, Value, View
from ...ir.load import sources
from ...ir.run.verify import exact_tolerance, rounds_activations, tolerance
from .onnxruntime import OnnxRuntimeExecutable

REPACKED_BYTES = 1 << 28
"""Largest model whose checks always let ONNX Runtime repack the weights, as it does by default: a
copy of them in memory. Larger ones are checked on weights that stay in their file, unless an op
rounds activations: there the two differ by that rounding."""
ROUNDED_BYTES = 1 << 29
"""Largest model that is checked with that rounding. Of a larger one the runtime is held to what the
graph gives without it, and the graph's own, by the reference interpreter, to the source."""


def must_repack(view: View) -> bool:
    """Whether a session without graph optimisation is to repack the weights, whatever their size.

    Without it the runtime rounds no activations: it would compute something else. In half types it
    rounds wrongly with it (ONNX Runtime 1.31, ``MatMulNBits`` of 8 bits at level 4 in a small f16
    transformer: 1.15 relative L2, and .0103 without repacking or with the optimisation on).
    """
    return rounds_activations(view) and tolerance(view) <= exact_tolerance(torch.float32)


@dataclass(frozen=True)
class OnnxOriginal:
    """A file in ONNX Runtime on the CPU, its graph optimisation off: no fusion is trusted."""

    path: Path
    lean: bool

    @property
    def by(self) -> str:
        from onnxruntime import __version__

        return f"ONNX Runtime {__version__}, graph optimisation off"

    def start(self, watched: Collection[str] = ()) -> Run:
        instead = self._showing(watched) if watched else None
        executable = OnnxRuntimeExecutable(
            self.path, device="cpu", optimize=False, threads=None, lean=self.lean, instead=instead,
            bounded=True,
        )  # fmt: skip

        def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            outputs = executable(**inputs)
            return {n: t for n, t in outputs.items() if not watched or n in watched}

        return run

    def visible(self, view: View) -> dict[Value, str]:
        graph = self._proto().graph
        names = {name for node in graph.node for name in node.output if name}
        values = (value for node in view.nodes() for value in view.results(node))
        return {value: view.name(value) for value in values if view.name(value) in names}

    def _proto(self) -> Any:
        import onnx

        return onnx.load(self.path, load_external_data=False)

    def _showing(self, names: Collection[str]) -> bytes:
        """The file's model with further outputs; external weights stay where they lie."""
        import onnx

        model = self._proto()
        known = {output.name for output in model.graph.output}
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in names if name not in known
        )
        return bytes(model.SerializeToString())


_Options = ParamSpec("_Options")


def _with_original(loader: Callable[_Options, View]) -> Callable[_Options, View]:
    @functools.wraps(loader)
    def load(*args: _Options.args, **options: _Options.kwargs) -> View:
        view = loader(*args, **options)
        if options.get("max_bytes") is None:  # else it is the beginning of what the file holds
            give_original(view)
        return view

    return load


load = _with_original(sources.load)
"""``load`` of ``ir.load.sources``; the graph of an ONNX file can be held against that file."""


def give_original(view: View) -> None:
    """Let the graph of an ONNX file be held against the file in ONNX Runtime."""
    source = view.source
    if source.kind != "onnx" or source.original is not None or not source.files:
        return
    small = source.source_bytes <= REPACKED_BYTES and not rounds_activations(view)
    source.original = OnnxOriginal(source.files[0], lean=not (small or must_repack(view)))
