"""PyTorch modules as originals: the module behind a graph, called as its own code says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ...core.errors import BadInput, first_line
from ...core.quiet import quiet
from ...core.types import UNKNOWN, Type
from ...core.view import Run, Value, View
from ...fx.program import input_names, output_names
from ...structure.cache_slots import empty_past
from .plain_call import TENSORS, PlainCall

Call = Callable[[Any, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Calls a module with inputs by the graph's names; its outputs by the graph's names."""
ENTERS = "into "
"""Before a module's path: what it is given. The path alone is what it gives."""


@dataclass(frozen=True)
class ModuleOriginal:
    """A module in evaluation mode, without gradients, wherever it lies."""

    by: str
    make: Callable[[], torch.nn.Module]
    """Loads it; where it is there already, gives it."""
    call: Call

    def start(self, watched: Collection[str] = ()) -> Run:
        try:
            with quiet(), torch.random.fork_rng(devices=[]):
                module = self.make()
        except Exception as error:
            reason = first_line(error)
            raise BadInput(f"{self.by} does not load it: {reason}") from error

        def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            records: dict[str, torch.Tensor] = {}
            training = [(m, m.training) for m in module.modules()]
            hooks = _watch(module, watched, records)
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            feeds = {name: t.clone().to(device) for name, t in inputs.items()}
            try:
                for part, _ in training:
                    part.training = False
                with quiet(), torch.no_grad():
                    outputs = self.call(module, feeds)
            except Exception as error:
                # Whatever a model's own code raises, the person must hear of it.
                reason = first_line(error)
                raise BadInput(f"the source does not take these inputs: {reason}") from error
            finally:
                for hook in hooks:
                    hook.remove()
                for part, before in training:
                    part.training = before
            tensors = records if watched else outputs
            return {name: t.detach().cpu() for name, t in tensors.items()}

        return run

    def visible(self, view: View) -> dict[Value, str]:
        """What a module gives, and what it is given, where it is one value of the graph.

        A module that is called several times, or returns several tensors, shows none.
        """
        gives: dict[str, set[Value]] = defaultdict(set)
        takes: dict[str, set[Value]] = defaultdict(set)
        for node in view.nodes():
            inner = _paths(view.scope(node))
            for value in view.results(node):
                users = [_paths(view.scope(user)) for user in view.users(value)]
                users += [set()] if view.is_output(value) else []
                for outer in users:
                    for path in inner - outer:
                        gives[path].add(value)
                    for path in outer - inner:
                        takes[path].add(value)
        places: dict[Value, str] = {}
        for sign, table in (("", gives), (ENTERS, takes)):
            # The innermost module last: of those that give one value it says most.
            for path, values in sorted(table.items(), key=lambda row: len(row[0])):
                if len(values) == 1 and (not sign or values.isdisjoint(places)):
                    places[next(iter(values))] = sign + path
        return places


@dataclass(frozen=True)
class ProgramOriginal(ModuleOriginal):
    """An exported program's own module, whose every node can be seen."""

    def start(self, watched: Collection[str] = ()) -> Run:
        if not watched:
            return super().start()
        with quiet():
            module = self.make()
        assert isinstance(module, GraphModule)

        names = [node.name for node in module.graph.nodes if node.op == "placeholder"]

        def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            records: dict[str, torch.Tensor] = {}
            feeds = [inputs[name].clone() for name in names]
            with quiet(), torch.no_grad():
                _Watching(module, watched, records).run(*feeds, enable_io_processing=False)
            return records

        return run

    def visible(self, view: View) -> dict[Value, str]:
        """Values whose node is in the program under its name: what decomposing made is not."""
        module = self.make()
        assert isinstance(module, GraphModule)
        targets = {node.name: str(node.target) for node in module.graph.nodes}
        return {
            value: view.name(value)
            for node in view.nodes()
            for value in view.results(node)
            if targets.get(view.name(value)) == f"{view.native_op(node)}"
        }


class _Watching(torch.fx.Interpreter):
    def __init__(
        self, module: GraphModule, watched: Collection[str], records: dict[str, torch.Tensor]
    ) -> None:
        super().__init__(module)
        self._watched, self._records = watched, records

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._watched and isinstance(result, torch.Tensor):
            self._records[n.name] = result.clone()
        return result


def traced_call(
    program: ExportedProgram, plain: PlainCall = TENSORS, types: Mapping[str, Type] | None = None
) -> Call:
    """The call by which ``torch.export`` traced a module. ``types`` are those of the graph's
    inputs, in order, where they have other names than the program's."""
    types = types or dict.fromkeys(input_names(program), UNKNOWN)
    inputs, outputs = list(types), output_names(program)
    in_spec = program.module_call_graph[0].signature.in_spec

    def call(module: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {**feeds, **empty_past(types, feeds)}
        args, kwargs = pytree.tree_unflatten([tensors[name] for name in inputs], in_spec)
        leaves = pytree.tree_leaves(plain.run(module, *args, **kwargs))
        return dict(zip(outputs, leaves, strict=True))

    return call


def _paths(scope: str) -> set[str]:
    """A dotted path and those of the modules around it."""
    parts = scope.split(".") if scope else []
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}


def _watch(
    module: torch.nn.Module, watched: Collection[str], records: dict[str, torch.Tensor]
) -> list[Any]:
    def before(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: _note(records, name, (args, kwargs))

    def after(name: str) -> Callable[..., None]:
        return lambda _, args, output: _note(records, name, output)

    hooks: list[Any] = []
    for name in watched:
        part = module.get_submodule(name.removeprefix(ENTERS))
        if name.startswith(ENTERS):
            hooks.append(part.register_forward_pre_hook(before(name), with_kwargs=True))
        else:
            hooks.append(part.register_forward_hook(after(name)))
    return hooks


def _note(records: dict[str, torch.Tensor], name: str, value: Any) -> None:
    leaves = pytree.tree_leaves(value)
    tensor = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
    if tensor is not None:
        records[name] = tensor.detach().clone()
