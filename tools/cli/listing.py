"""What ``optimize-model passes``, ``recipes`` and ``inspect`` print."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections import Counter
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ...ir.canonical.families import canonicalize
from ...ir.core.types import DTYPE_NAMES
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.ops.coded_weight import coded
from ...ir.structure.costs import weight_bytes
from ...ir.structure.recognize import Linear, recognize
from ...ir.vocab import spec
from ...passes.options import option_text, purposes
from ...passes.recipe import SCHEMES, Recipe, recipe_names, recipe_summary
from ...passes.registry import pass_class, pass_names
from ..report.summary import group_name, size


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def first_line(item: Any) -> str:
    """The first sentence of a docstring, on one line."""
    return " ".join((inspect.getdoc(item) or "").split("\n\n")[0].split())


def print_passes(console: Console) -> None:
    table = _table("pass", "kind", "what it does")
    for name in pass_names():
        pass_ = pass_class(name)
        table.add_row(name, "exact" if pass_.exact else "lossy", Text(first_line(pass_)))
    console.print(table)


def print_pass(console: Console, name: str) -> None:
    """One pass: its docstring, and a line for each option: its default, and what it is for."""
    pass_ = pass_class(name)
    console.print(Text(f"{name} ({'exact' if pass_.exact else 'lossy'})", style="bold"))
    for paragraph in (inspect.getdoc(pass_) or "").split("\n\n"):
        console.print(Text(" ".join(paragraph.split())))
        console.print()
    table = _table("option", "what it is for")
    hints, purpose = typing.get_type_hints(pass_), purposes(pass_)
    for field in dataclasses.fields(pass_):
        required = " Required." if field.default is dataclasses.MISSING else ""
        option = option_text(field, hints[field.name])
        table.add_row(Text(option), Text(purpose.get(field.name, "") + required))
    console.print(table)


def print_recipes(console: Console) -> None:
    table = _table("recipe", "passes", "what it is for")
    for name in recipe_names():
        table.add_row(name, Text(str(Recipe.load(name))), Text(recipe_summary(name)))
    for name, passes in SCHEMES.items():
        table.add_row(name, Text(passes), Text("Weights of that scheme, symmetric, as others do."))
    console.print(table)


def print_tasks(console: Console) -> None:
    """The tasks of ``eval``: what each says, and which kinds of model it fits."""
    from ..evaluate import TASKS

    for name, task in TASKS.items():
        console.print(Text(name, style="bold"))
        console.print(Padding(Text(first_line(task)), (0, 0, 0, 2)))
        fits = ", ".join(task.kinds) or "every kind of model"
        console.print(Padding(Text(f"for: {fits}", style="dim"), (0, 0, 0, 2)))


def print_structure(
    console: Console, model: str, *, text: bool = False, trust_remote_code: bool = False,
    part: str = "",
) -> None:  # fmt: skip
    """What is recognised in a model; with ``text`` the canonical graph itself."""
    view = load(
        model, trust_remote_code=trust_remote_code, allow_missing_weights=True, part=part or None
    )
    canonicalize(view)
    if text:
        from ...ir.text.graph import print_graph

        console.print(print_graph(view), markup=False, highlight=False, soft_wrap=True)
        return
    structure = recognize(view)
    console.print(Text(f"{model}: {view.kind} graph, {len(list(view.nodes()))} nodes, "
                       f"{size(weight_bytes(view))} of weights"))  # fmt: skip
    for title, values, names in (
        ("inputs", view.inputs(), view.input_names()),
        ("outputs", view.outputs(), view.output_names()),
    ):
        # Of a cache there are two a block: those that only differ in an index are one entry.
        pairs = zip(names, values, strict=True)
        entries = Counter(f"{group_name(name)}: {view.type(value)}" for name, value in pairs)
        shown = (f"{entry} x{n}" if n > 1 else entry for entry, n in entries.items())
        console.print(Text(f"{title}: {', '.join(shown)}"))
    console.print(Text(
        f"{len(structure.blocks)} blocks, {len(structure.attentions)} attention sites, "
        f"{len(structure.linears)} linears"
    ))  # fmt: skip
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for linear in structure.linears:
        shape = f"{linear.out_features} x {linear.in_features}"
        key = (group_name(linear.name), linear.role or "", shape, _stored(view, linear))
        groups.setdefault(key, []).append(linear.name)
    table = _table("linears", "role", "count", "out x in", "stored as")
    for (group, role, shape, form), members in groups.items():
        table.add_row(Text(group), role, str(len(members)), shape, form)
    console.print(table)
    natives = Counter(view.native_op(n) for n in view.nodes() if view.op(n) == "native")
    if natives:
        listed = ", ".join(f"{name} x{count}" for name, count in natives.most_common())
        console.print(Text(f"kept as they are (outside the vocabulary): {listed}"))


def _stored(view: View, linear: Linear) -> str:
    """The form in which a linear's weight is stored."""
    weight = coded(view.weight(linear.weight))
    if weight is not None:
        return weight.form
    form = spec(view.op(linear.node)).stored_linear
    if form is not None:
        return form(view.attrs(linear.node))
    dtype = view.type(linear.weight).dtype
    return "" if dtype is None else DTYPE_NAMES[dtype]
