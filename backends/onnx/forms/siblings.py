"""Linears of one input become one product: queries, keys and values, or the two of a gate.

linear_nbit(x, a), linear_nbit(x, b) => split(linear_nbit(x, a+b))
transpose(reshape(each part of split(y))) => split(transpose(reshape(y)))

A product for one token takes little more than its weight takes to be read, and 22 us beside it:
the activation is rounded to 8 bits, the threads are woken. ``ir.canonical.siblings`` parts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ....ir.canonical.heads import shaped
from ....ir.canonical.siblings import joined_name
from ....ir.core.joined_weights import joined
from ....ir.core.view import Node, Operand, Value, View, is_value
from ....ir.vocab.builder import Builder

_OP, _MOST = "linear_nbit", 3
"""More than queries, keys and values are experts, or what nobody has measured."""


def join_siblings(view: View) -> int:
    """Join all linears of few bits that take one value and are stored alike; the products made."""
    with view.made_by("join-siblings"):
        groups = list(_groups(view))
        for group in groups:
            _part_heads(view, _join(view, group))
    view.drop_unused_weights()
    return len(groups)


def _groups(view: View) -> Iterator[list[Node]]:
    """Linears that become one, in the order of the graph."""
    by_kind: dict[Any, list[list[Node]]] = {}
    for node in view.nodes():
        if view.op(node) == _OP and _is_its_own(view, node):
            known = by_kind.setdefault(kind(view, node), [])
            fitting = (g for g in known if _names(view, [*g, node]) is not None)
            group = next(fitting, None)
            if group is None:
                known.append([node])
            else:
                group.append(node)
    for groups in by_kind.values():
        yield from (group for group in groups if 1 < len(group) <= _MOST)


def _is_its_own(view: View, node: Node) -> bool:
    """Whether a linear's weight is constant and nobody else's, and its result is no output."""
    if view.is_output(view.results(node)[0]):
        return False
    stored = [o for o in view.operands(node)[1:] if is_value(o)]
    return all(view.weight(o) is not None and len(view.users(o)) == 1 for o in stored)


def kind(view: View, node: Node) -> Any:
    """Equal for linears that take one value and are stored alike."""
    x, *stored = view.operands(node)
    attrs = tuple(sorted((k, v) for k, v in view.attrs(node).items() if k != "out_features"))
    handles = [view.weight(operand) for operand in stored]
    return x, attrs, tuple(None if h is None else (h.dtype, h.shape[1:]) for h in handles)


def _names(view: View, group: Sequence[Node]) -> list[str | None] | None:
    """A name for each joined operand; ``None`` where one of them gets none."""
    names: list[str | None] = []
    for operands in zip(*(view.operands(node)[1:] for node in group), strict=True):
        values = [operand for operand in operands if is_value(operand)]
        names.append(joined_name([view.name(value) for value in values]) if values else None)
        if values and names[-1] is None:
            return None
    return names


def _join(view: View, group: Sequence[Node]) -> Node:
    """One product in the place of several; the node that splits its result."""
    first, names = group[0], _names(view, group)
    assert names is not None
    operands: list[Operand] = [view.operands(first)[0]]
    for place, name in enumerate(names, start=1):
        operands.append(joined_operand(view, group, place, name))
    widths = tuple(int(view.attrs(node)["out_features"]) for node in group)
    attrs = {**view.attrs(first), "out_features": sum(widths)}
    whole = view.build(_OP, operands, attrs, before=first)
    last = len(view.type(whole).shape or ()) - 1
    pieces = view.build("split", [whole], {"sizes": widths, "dim": last}, before=first)
    node = view.maker(pieces)
    for sibling, part in zip(group, view.results(node), strict=True):
        _take_over(view, sibling, part)
    return node


def joined_operand(view: View, group: Sequence[Node], place: int, name: str | None) -> Operand:
    """The rows of one operand of all linears, under a name; ``None`` where they have none."""
    handles = [view.weight(view.operands(node)[place]) for node in group]
    known = [handle for handle in handles if handle is not None]
    return view.add_weight(name, joined(known)) if name is not None else None


def _take_over(view: View, old: Node, new: Value) -> None:
    result = view.results(old)[0]
    view.retype(new, result)
    view.replace(result, new)
    view.erase_dead(old)


def _part_heads(view: View, split: Node) -> None:
    """Let all heads be parted at once where each part is [batch, tokens, heads, width] next."""
    whole, parts = view.tensor(split), view.results(split)
    ends = [_end(view, part) for part in parts]
    transposes = [end for end in ends if end is not None]
    shapes = [view.type(view.results(end)[0]).shape or () for end in transposes]
    width = shapes[0][3] if shapes else None
    if len(transposes) < len(parts) or any(shape[3] != width for shape in shapes):
        return
    counts = tuple(int(shape[1]) for shape in shapes)
    b = Builder(view, split)
    apart = shaped(b, whole, (whole, 0), (whole, 1), sum(counts), int(shapes[0][3]))
    heads = b.split(b.transpose(apart, perm=(0, 2, 1, 3)), sizes=counts, dim=1)
    for end, part in zip(transposes, view.results(view.maker(heads)), strict=True):
        _take_over(view, end, part)


def _end(view: View, part: Value) -> Node | None:
    """The node that ends transpose(reshape(part)), [batch, heads, tokens, width]."""
    apart = _only_user(view, part, "reshape")
    end = None if apart is None else _only_user(view, view.results(apart)[0], "transpose")
    if apart is None or end is None or view.attrs(end)["perm"] != (0, 2, 1, 3):
        return None
    before, after = (view.type(v).shape or () for v in (part, view.results(apart)[0]))
    whole = len(after) == 4 and all(isinstance(n, int) for n in after[2:])
    return end if whole and len(before) == 3 and before[:2] == after[:2] else None


def _only_user(view: View, value: Value, op: str) -> Node | None:
    users = view.users(value)
    alone = len(users) == 1 and not view.is_output(value)
    return users[0] if alone and view.op(users[0]) == op else None
