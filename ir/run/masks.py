"""Which tokens of a batch count: padding masks, found by what the graph does with its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.view import NATIVE, Node, Operand, Value, View, is_value
from ..vocab import traits

Masks = Sequence[Tensor]
"""The masks of one batch, bool ``[batch, seq]`` each; a model of two towers may have two."""

USUAL_NAME = "attention_mask"
_SIZES = frozenset({"size", "arange"})
"""Ops whose results say how large their operands are, not what is in them."""
_RELATIONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "sub"})
"""Ops whose results, of two computed operands, say how the two relate: segments, positions."""
_PICKING = frozenset({"aten.index.Tensor", "GatherND"})
"""Native ops that pick from their first operand by the others."""
_CUTTING = frozenset({"aten.select.int"})
"""Native ops that give a part of their first operand: a column of several kinds of ids."""


def padding_masks(view: View, batches: Sequence[Mapping[str, Tensor]]) -> list[list[Tensor]]:
    """The padding masks in each batch. Raises ``BadInput`` as ``mask_names``."""
    names = mask_names(view, batches)
    return [[batch[name] != 0 for name in names if name in batch] for batch in batches]


def without_first(
    view: View, batches: Sequence[Mapping[str, Tensor]]
) -> list[Mapping[str, Tensor]]:
    """The batches with the first token that counts of each row masked out, as if the text had begun
    before it. None where the graph takes no mask."""
    names = mask_names(view, batches)
    return [{**b, **{n: _later(b[n]) for n in names if n in b}} for b in batches] if names else []


def _later(mask: Tensor) -> Tensor:
    """Rows of one token stay as they are."""
    counts = mask != 0
    first = counts & (counts.cumsum(1) == 1) & (counts.sum(1, keepdim=True) > 1)
    return mask.masked_fill(first, 0)


def mask_names(view: View, batches: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """The inputs that are padding masks.

    A mask is an input ``[batch, seq]`` whose values are all 0 or 1, that picks no row of a table
    (as ids do), and whose values go into the mask of an attention site. Where none does (its
    attention is not recognised, say), any such input as long as the ids is taken, unless it
    reaches one otherwise: segments and positions are compared with each other.

    Raises ``BadInput`` where several masks of one shape differ and none is ``attention_mask``:
    tokens are told apart by their shape.
    """
    named = dict(zip(view.input_names(), view.inputs(), strict=True))
    ids = {name for name, value in named.items() if any(picked_tables(view, value))}
    binary = [n for n in named if n not in ids and all(_is_binary(b.get(n)) for b in batches)]
    masks = _attention_masks(view)
    sites = [_behind(view, mask, _handed_on) for mask in masks]
    names = [name for name in binary if any(named[name] in site for site in sites)]
    if not names:
        related = set().union(*(_behind(view, mask, _arguments) for mask in masks))
        free = [name for name in binary if named[name] not in related]
        names = [n for n in free if any(_same_shape(batches, n, other) for other in ids)]
    at = {name: {i for i, site in enumerate(sites) if named[name] in site} for name in names}
    for a, b in combinations(names, 2):
        if a in at and b in at and _rivals(batches, a, b):
            del at[_lesser(a, b, at)]
    return list(at)


def _rivals(batches: Sequence[Mapping[str, Tensor]], a: str, b: str) -> bool:
    """Whether two masks of one shape say different things of the tokens."""
    both = [(batch[a], batch[b]) for batch in batches if a in batch and b in batch]
    return any(x.shape == y.shape and not torch.equal(x != 0, y != 0) for x, y in both)


def _lesser(a: str, b: str, at: Mapping[str, set[int]]) -> str:
    """The one that gives way: the other has the usual name and is wherever it is."""
    for lesser, other in ((a, b), (b, a)):
        if other == USUAL_NAME and at[lesser] <= at[other]:
            return lesser
    raise BadInput(
        f"{a} and {b} may each be the padding mask of tokens of the same shape, and differ: give "
        f"data in which the two have different lengths, or call the one that counts {USUAL_NAME}"
    )


def tokens_that_count(x: Tensor, masks: Masks) -> Tensor:
    """The tokens of ``x`` ``[..., K]`` that are not masked out, ``[tokens, K]``.

    A mask belongs to ``[batch, seq, K]``, or to its flattened form ``[batch * seq, K]``.
    """
    for mask in masks:
        if x.dim() == 3 and x.shape[:2] == mask.shape:
            return x[mask]
        if x.dim() == 2 and len(x) == mask.numel():
            return x[mask.reshape(-1)]
    return x.reshape(-1, x.shape[-1])


def last_tokens(x: Tensor, masks: Masks) -> Tensor:
    """The last token that counts of each sample of ``[batch, seq, K]``: ``[batch, K]``."""
    mask = _fitting(x, masks)
    if mask is None:
        return x[:, -1]
    place = torch.arange(mask.shape[1]).expand_as(mask).masked_fill(~mask, -1).amax(1)
    return x[torch.arange(len(x)), place]


def mask_of(x: Tensor, masks: Masks) -> Tensor:
    """The mask of the tokens of ``[batch, seq, K]``; all of them count where there is none."""
    mask = _fitting(x, masks)
    return torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask


def _fitting(x: Tensor, masks: Masks) -> Tensor | None:
    return next((mask for mask in masks if mask.shape == x.shape[:-1]), None)


def _attention_masks(view: View) -> list[Value]:
    masks: list[Value] = []
    for node in view.nodes():
        operands = view.operands(node) if view.op(node) == "sdpa" else ()
        masks += [mask for mask in operands[3:4] if is_value(mask)]
    return list(dict.fromkeys(masks))


def _behind(
    view: View, mask: Value, operands: Callable[[View, Node], Sequence[Value]]
) -> set[Value]:
    """The values that a mask is computed from, by these operands of each node on the way."""
    sources: set[Value] = set()
    stack = [mask]
    while stack:
        value = stack.pop()
        if value in sources:
            continue
        sources.add(value)
        node = view.producer(value)
        if node is not None:
            stack += operands(view, node)
    return sources


def _arguments(view: View, node: Node) -> Sequence[Value]:
    return () if view.op(node) in _SIZES else view.arguments(node)


def _handed_on(view: View, node: Node) -> Sequence[Value]:
    """The operands whose numbers a node hands on to its result."""
    op, arguments = view.op(node), _arguments(view, node)
    if traits(op).picks or view.native_op(node) in _PICKING:
        return arguments[:1]
    if op in _RELATIONS:
        computed = [o for o in view.operands(node) if is_value(o) and not _is_constant(view, o)]
        return computed if len(computed) == 1 else ()
    return arguments


def _is_constant(view: View, operand: Operand) -> bool:
    """Whether an operand is one number, also where nodes compute it."""
    if view.number(operand) is not None:
        return True
    node = view.producer(operand) if is_value(operand) else None
    if node is None or view.op(node) in _SIZES:
        return False
    return all(_is_constant(view, value) for value in view.arguments(node))


def picked_tables(view: View, value: Value, depth: int = 4) -> Iterator[tuple[Value, int | None]]:
    """The tables that an integer input picks from, with the axis where the graph says it."""
    for user in view.users(value):
        op, arguments = view.op(user), view.arguments(user)
        known = traits(op)
        ids = 1 if known.ids is None else known.ids
        picks = known.picks or known.table is not None
        if picks and view.operands(user)[ids] is value:
            yield view.tensor(user, 1 - ids), int(view.attrs(user).get("dim", 0))
        if op == NATIVE and view.native_op(user) in _PICKING and value in arguments[1:]:
            yield arguments[0], None
        if view.native_op(user) == "ScatterElements" and arguments[1] is value:
            yield arguments[0], int(view.attrs(user).get("axis", 0))
        cut = op == NATIVE and view.native_op(user) in _CUTTING
        if (op == "clamp" or traits(op).rearranges or cut) and arguments[0] is value and depth:
            yield from picked_tables(view, view.results(user)[0], depth - 1)


def _is_binary(tensor: Any) -> bool:
    return (
        tensor is not None
        and tensor.dim() == 2
        and bool(((tensor == 0) | (tensor == 1)).all())
    )


def _same_shape(batches: Sequence[Mapping[str, Tensor]], a: str, b: str) -> bool:
    return all(a in batch and b in batch and batch[a].shape == batch[b].shape for batch in batches)
