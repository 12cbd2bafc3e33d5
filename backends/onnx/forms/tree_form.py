"""The optional input ``tree_mask`` of a decoder that is written: who sees whom, who stands where.

sdpa(q, k, v, mask) => sdpa(q, k, v, mask and tree_mask)
places              => places - sum(not tree_mask)

A default for an input is what an ONNX initializer that is an input too says: True, one number for
all. What the mask and the places of a graph are is found by running those parts of it on texts
(``row_places``).
"""

from __future__ import annotations

import onnx_ir
import torch

from ....ir.canonical.families import canonicalize
from ....ir.core.errors import BadInput, Refusal
from ....ir.core.types import Type
from ....ir.core.view import Node, Value, View, is_value
from ....ir.onnx.forms import as_value
from ....ir.onnx.parts import set_type
from ....ir.onnx.view import OnnxView
from ....ir.structure.cache_slots import POSITIONS, find_slot, positions
from ....ir.structure.tree_input import TREE
from ....ir.vocab.builder import Builder
from .row_places import TEXTS, Places

_SHAPE = ("tree_rows", "tree_columns")


def take_tree(view: OnnxView, longest: int | None) -> None:
    """Let a decoder with a cache take ``tree_mask``; nothing where it does already.

    ``longest`` is the most tokens of a text, where that is known. Raises ``BadInput`` where a tree
    cannot be told from a line by it: a token's view or place is counted in memory.
    """
    if any(value.name == TREE for value in view.model.graph.inputs):
        return
    canonicalize(view)
    places = Places(view, longest)
    try:
        masks = _masks(view, places)
        starts = [] if POSITIONS in view.input_names() else _places(view, places)
    except Refusal as refusal:
        raise BadInput(f"tree-mask: {refusal}") from None
    tree = _input(view)
    with view.made_by("take-tree"):
        for mask, sites in masks.items():
            _hide(view, mask, sites, tree)
        for value in starts:
            _move_up(view, value, tree)


def _masks(view: View, places: Places) -> dict[Value, list[Node]]:
    """The masks of all attention sites, and the sites of each, in order."""
    masks: dict[Value, list[Node]] = {}
    for site in view.nodes():
        if view.op(site) != "sdpa":
            continue
        mask = (*view.operands(site), None)[3]
        if find_slot(view, site) is None or view.attrs(site)["causal"] or not is_value(mask):
            raise Refusal("no mask says which keys of a cache it sees", site)
        if mask not in masks and places.window(mask) > 0:
            raise Refusal(
                f"it sees a window of {places.window(mask)} keys, which is counted by where they "
                "lie, and a tree's branches lie side by side", site,
            )  # fmt: skip
        masks.setdefault(mask, []).append(site)
    if not masks:
        raise Refusal("no attention is recognised")
    return masks


def _places(view: View, places: Places) -> list[Value]:
    """The first values that say at which place of its row each new token stands."""
    names = dict(zip(view.input_names(), view.inputs(), strict=True))
    ids = view.type(names["input_ids"]).shape if "input_ids" in names else None
    chosen: list[Value] = []
    below: set[Node] = set()
    for node in view.nodes():
        makers = {view.producer(value) for value in view.arguments(node)}
        if makers & below:
            below.add(node)
            continue
        for value in view.results(node):
            declared = view.type(value)
            if declared.dtype == torch.int64 and declared.shape == ids and _stands(places, value):
                chosen.append(value)
                below.add(node)
    if not chosen:
        raise Refusal("where a token stands follows from attention_mask in no way that is known")
    return chosen


def _stands(places: Places, value: Value) -> bool:
    """Whether a value is the place of each token among those of its row."""
    try:
        for text in TEXTS:
            expected = positions(text.kept, text.new)
            actual = places.run(value, text).expand(expected.shape)
            if not torch.equal(actual[text.real], expected[text.real]):
                return False
    except (Refusal, RuntimeError):
        return False
    return True


def _input(view: OnnxView) -> Value:
    """The input with its default."""
    tensor = onnx_ir.tensor([[True]], name=TREE)
    value = onnx_ir.Value(name=view.value_names.take(TREE), const_value=tensor)
    set_type(value, Type(torch.bool, _SHAPE))
    view.model.graph.register_initializer(value)
    view.model.graph.inputs.append(value)
    return as_value(value)


def _hide(view: View, mask: Value, sites: list[Node], tree: Value) -> None:
    """Let attention sites see what a mask and the tree let be seen."""
    b, dtype = Builder(view, sites[0]), view.type(mask).dtype
    assert dtype is not None
    visible = b.logical_and(mask, tree, like=mask) if dtype == torch.bool else (
        b.where(tree, mask, torch.finfo(dtype).min, like=mask)
    )  # fmt: skip
    for site in sites:
        view.rewire(site, mask, visible)


def _move_up(view: View, value: Value, tree: Value) -> None:
    """Let each token stand behind those alone that it sees."""
    users = set(view.users(value))
    first = next(node for node in view.nodes() if node in users)
    b = Builder(view, first)
    hidden = b.sum(b.cast(b.logical_not(tree), dtype=torch.int64), dims=(1,), keepdim=False)
    moved = b.sub(value, hidden, like=value)
    for user in users:
        view.rewire(user, value, moved)
