"""``FxView``: the graph of a ``torch.export`` program seen through the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph
from torch.fx.node import Node as FxNode
from torch.fx.node import map_arg

from ..core.view import Source
from ..core.weights import Weight
from .edit import FxEditor
from .program import (
    input_names,
    output_names,
    program_weight,
    refuse_mutation,
    to_module,
    to_program,
)
from .read import item_index

_VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
)
_WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class FxView(FxEditor):
    """A functional FX graph whose weights are placeholders bound to lazy handles.

    Build one with ``from_program``. What it answers is in ``read``, what it changes in
    ``edit``. ``program`` is the export that the graph came from (for its calling convention;
    ``None`` for a graph that was parsed or built, which can be rewritten and run but not exported).
    """

    @classmethod
    def from_program(
        cls,
        program: ExportedProgram,
        *,
        weights: Mapping[str, Weight] | None = None,
        source: Source | None = None,
        dim_names: Mapping[str, str] | None = None,
    ) -> FxView:
        """View a functional program: see ``functional.functional``.

        ``weights`` gives handles by qualified name for parameters whose tensors in the program are
        fake; ``dim_names`` maps the exporter's symbols (``s43``) to names (``batch``). Raises
        ``BadInput`` where the graph mutates its inputs or holds in-place ops.
        """
        refuse_mutation(program)
        graph = Graph()
        mapping: dict[FxNode, FxNode] = {}
        outputs = graph.graph_copy(program.graph, mapping)
        graph.output(outputs)
        handles: dict[str, Weight] = {}
        specs = {s.arg.name: s for s in program.graph_signature.input_specs}
        for original, node in mapping.items():
            if node.target in _VIEWS:
                # A view is legal by the clone before it, which `clean` drops; a reshape always is.
                node.target = torch.ops.aten.reshape.default
                _write_out_size(node)
            if node.op != "placeholder":
                continue
            spec_ = specs[original.name]
            if spec_.kind not in _WEIGHT_KINDS:
                continue
            target = str(spec_.target)
            node.meta["weight"] = target
            handles[target] = (weights or {}).get(target) or program_weight(program, target)
        names = input_names(program), output_names(program)
        return cls(graph, program, handles, names, source or Source(), dim_names or {})

    def copy(self) -> FxView:
        graph = Graph()
        mapping: dict[FxNode, FxNode] = {}
        graph.output(graph.graph_copy(self.graph, mapping))
        view = FxView(
            graph, self.program, dict(self._weights), self._names, self.source, self.symbols
        )
        view._metadata = dict(self._metadata)
        view.origin, view.edits, view.canonical = self.origin, self.edits, self.canonical
        view._by_key = {key: mapping[node] for key, node in self._by_key.items()}
        return view

    def execute(self, node: FxNode, args: Sequence[Any]) -> tuple[Any, ...]:
        env = dict(zip(node.all_input_nodes, args, strict=True))
        call_args, call_kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        target: Any = node.target
        value = target(*call_args, **call_kwargs)
        if isinstance(node.meta.get("val"), tuple | list):
            return tuple(value[item_index(item)] for item in self.results(node))
        return (value,)

    def to_module(self) -> torch.nn.Module:
        """A module that runs the graph, all weights read into memory; inputs are positional.

        It returns a tuple of the outputs.
        """
        return to_module(self)

    def to_program(self) -> ExportedProgram:
        """The graph as an exported program whose weights are fake; see ``program``."""
        return to_program(self)


def _write_out_size(node: FxNode) -> None:
    """Replace the size -1 by the number that it stands for: of an empty tensor it may be any."""
    sizes = zip(node.args[1], node.meta["val"].shape, strict=True)  # type: ignore[arg-type]
    numbers = [size if dim == -1 and isinstance(size, int) else dim for dim, size in sizes]
    node.args = (node.args[0], numbers)
