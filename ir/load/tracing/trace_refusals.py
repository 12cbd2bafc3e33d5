"""Why a module cannot be traced, in the words of the one who wrote it."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from ...core.errors import BadInput

_TORCH = str(Path(torch.__file__).parent)
_EXPORTER = (
    str(Path(__file__).with_name("trace.py")),
    f"{_TORCH}/export",
    f"{_TORCH}/_export",
    f"{_TORCH}/nn/modules/module.py",
)
"""Files whose lines say nothing about where in a model a trace failed."""


def explain(module: torch.nn.Module, error: BaseException) -> str:
    """Where in the module a trace failed, what was wrong there, and what to try."""
    names = {id(m): name for name, m in module.named_modules()}
    where, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else ""
        owner = frame.f_locals.get(first)
        file = frame.f_code.co_filename
        if id(owner) not in names or file.startswith(_EXPORTER):
            continue
        name = names[id(owner)]
        where = f"in {name} ({type(owner).__name__})" if name else f"in {type(owner).__name__}"
        line = f", {file}:{number}"
    lines = [s.strip() for s in str(error).splitlines() if s.strip()]
    reason = lines[0] if lines else type(error).__name__
    if "Constraints violated" in reason:
        details = [s[2:] for s in lines if s.startswith("- ")]
        fixes = [s for s in lines if re.fullmatch(r"\w+ = .*", s)]
        advice = f"Try dynamic_shapes= with: {'; '.join(fixes) or 'that dimension static'}"
        reason = details[0].split(". If")[0] if details else reason
        return f"tracing failed: {reason}\n{advice}"
    where = f" {where}{line}" if where else ""
    return f"tracing failed{where}: {reason}\n{_advice(error)}"


def _advice(error: BaseException) -> str:
    kind, text = type(error).__name__, str(error)
    if "DataDependent" in kind or "data-dependent" in text:
        return (
            "The control flow depends on the values of a tensor. Try torch.where, or a wrapper "
            "module that takes the path you need"
        )
    return (
        "Try inputs that module(*args, **kwargs) accepts, a wrapper module without the code at "
        "that line, or a submodule"
    )


def refuse_randomness(program: ExportedProgram) -> None:
    """Raise ``BadInput`` where a graph draws random numbers or updates statistics as in training.

    Nothing could be verified on such a graph. A number that is drawn and read by nobody leaves the
    graph: transformers 5.17 draws one for each layer that it might leave out in training.
    """
    for node in list(program.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if str(node.target).startswith("aten.rand") and not node.users:
            program.graph.erase_node(node)
            continue
        arguments = _arguments(node)
        training = arguments.get("train") or arguments.get("training")
        if "momentum" in arguments and arguments.get("running_mean") is None:
            continue  # what is normalized by itself has no statistics to update
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        # dropout(x, p, train=False) and attention with dropout_p=0 carry the tag, yet are exact.
        exact = "train" in arguments or "dropout_p" in arguments
        if training or arguments.get("dropout_p") or (random and not exact):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            scope = next((path for path, _ in reversed(stack) if path), "the module")
            raise BadInput(
                f"{scope}: {node.target} draws random numbers or updates statistics in evaluation "
                "mode. Try passing training=self.training to functional dropout and batch_norm"
            )


def refuse_changed_parameters(program: ExportedProgram) -> None:
    """Raise ``BadInput`` where a run leaves other parameters behind: a graph's stay as they are."""
    for spec in program.graph_signature.output_specs:
        if spec.kind is OutputKind.PARAMETER_MUTATION:
            raise BadInput(
                f"the forward changes its own parameter {spec.target!r}, which a graph cannot. Try "
                "a module whose parameters have been changed before (as RWKV's are by a first "
                "forward in evaluation mode), given to gw.trace, or one whose config does not ask "
                "for it (rescale_every=0)"
            )


def _arguments(node: torch.fx.Node) -> dict[str, Any]:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    positional = {a.name: value for a, value in zip(schema, node.args, strict=False)}
    return {a.name: a.default_value for a in schema} | positional | node.kwargs
