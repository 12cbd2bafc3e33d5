"""Attention without a cache as the one node that standard ONNX has for it since opset 23.

sdpa(q, k, v, mask) => Attention(q, k, v, mask)

The node takes heads side by side, [batch, tokens, heads · width], as linears give and take them:
neither queries, keys, values nor results are transposed. That is what makes it faster; heads that
are transposed already, as turned ones are, gain where several share keys. ONNX Runtime 1.30 to 1.32
refuse what has no rows or no tokens, which the steps of a model that reads pictures have, and masks
that broadcast along queries or keys. They take the least float for minus infinity
(``canonical.heads.lifted``), round half types otherwise than products do, and differ from others on
causal attention of fewer queries than keys, for which a mask is made here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch

from ....ir.canonical.heads import filled, lifted, size
from ....ir.core.dims import names_in
from ....ir.core.types import UNKNOWN_DIM, Dim, Type
from ....ir.core.view import Node, Operand, Value, View, is_value
from ....ir.onnx.forms import as_value, native_value
from ....ir.onnx.parts import set_type
from ....ir.onnx.view import OnnxView
from ....ir.rewrite.pattern import Match
from ....ir.rewrite.rule import Build, Rule
from ....ir.structure.cache_slots import find_slot
from .attention_form import with_causal
from .empty_sizes import never_none
from .flat_heads import PERM, flat, is_parted, joined

NODE, OPSET, IR_VERSION = "Attention", 23, 11
_OLDEST = 18
_CHANGED = {"DFT": 20, "GridSample": 20, "GroupNormalization": 21}
"""What means another thing from that opset on; nothing else does between 18 and 23."""


@dataclass(frozen=True)
class _Site:
    """One attention, of [batch, heads, tokens, width]."""

    q: Value
    k: Value
    v: Value
    mask: Value | None
    causal: bool
    """Without a mask, of as many queries as keys."""
    heads: int
    shared: int
    width: int
    """Of a head's values."""
    flat: bool
    """Whether heads lie side by side before and behind it."""


class UseAttention(Rule):
    """sdpa(q, k, v, mask) => Attention(q, k, v, mask)"""

    name = "use-attention"

    def __init__(self, view: OnnxView) -> None:
        self._known, self._opset = never_none(view), takes_opset(view)

    def pattern(self, p: Any, q: Any, k: Any, v: Any) -> Any:
        return p.sdpa(q, k, v, rest=True)

    def where(self, match: Match) -> None:
        self._site(match)

    def _site(self, match: Match) -> _Site:
        view, attrs = match.view, match.view.attrs(match.root)
        if not self._opset:
            match.refuse("an op of the graph means another thing in opset 23")
        if find_slot(view, match.root) is not None:
            match.refuse("beside a cache products are faster")
        q, k, v = (match.value(name) for name in "qkv")
        (batch, heads, queries, _), *others = _shapes(match)
        (rows, shared, keys, _), (*beside, width) = others
        if rows != batch or beside != [rows, shared, keys] or int(heads) % int(shared):
            match.refuse("queries, keys and values are broadcast")
        for dim in (batch, queries, keys):
            self._check_some(match, dim)
        if attrs["scale"] is not None and attrs["scale"] <= 0:
            match.refuse(f"the node takes no scale of {attrs['scale']}")
        mask = (*view.operands(match.root), None)[3]
        if is_value(mask):
            _check_mask(match, view.type(mask), batch, heads)
        site = _Site(
            q, k, v, mask if is_value(mask) else None,
            attrs["causal"] and not is_value(mask) and queries == keys,
            int(heads), int(shared), int(width),
            all(is_parted(view, value) for value in (q, k, v))
            and joined(view, match.root, int(heads) * int(width)) is not None,
        )  # fmt: skip
        if not site.flat and heads == shared:
            match.refuse("heads are transposed around it, and none share keys: nothing is gained")
        return site

    def _check_some(self, match: Match, dim: Dim) -> None:
        """Refuse what may be none."""
        if dim in (0, UNKNOWN_DIM) or not self._known.issuperset(names_in(dim)):
            match.refuse(f"{dim} may be 0, which ONNX Runtime's node refuses")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, root = build.view, build.match.root
        site = self._site(build.match)
        attrs = _attrs(view, root, site)
        heads = [site.q, site.k, site.v]
        mask = site.mask
        if view.attrs(root)["causal"] and not site.causal:
            mask = with_causal(build, site.q, site.k, mask)
        added = [] if mask is None else [_added(build, site, mask)]
        batch, _, tokens, _ = view.type(site.q).shape or ()
        if not site.flat:
            return _emit(build, [*heads, *added], attrs, (batch, site.heads, tokens, site.width))
        features = site.heads * site.width
        heads = [flat(build, x) for x in heads]
        y = _emit(build, [*heads, *added], attrs, (batch, tokens, features))
        together = joined(view, root, features)
        assert together is not None  # ``where`` has seen it
        view.replace(together, y)
        sizes = size(build, site.q, 0), size(build, site.q, 2)
        return build.transpose(build.reshape(y, *sizes, site.heads, site.width), perm=PERM)


def _shapes(match: Match) -> list[tuple[Dim, ...]]:
    """Of queries, keys and values in float32; heads and widths are numbers."""
    types = [match.type(name) for name in "qkv"]
    if any(t.rank != 4 or t.dtype != torch.float32 for t in types):
        match.refuse(f"{types[0]}, {types[1]}: not float32 of [batch, heads, tokens, width]")
    shapes = [t.shape or () for t in types]
    if not all(isinstance(shape[axis], int) for shape in shapes for axis in (1, 3)):
        match.refuse(f"{types[0]}, {types[1]}, {types[2]}: heads or widths are not known")
    return shapes


def _attrs(view: View, root: Node, site: _Site) -> dict[str, Any]:
    of = view.attrs(root)
    width = int((view.type(site.q).shape or ())[3])
    attrs: dict[str, Any] = {
        "scale": float(1 / math.sqrt(width) if of["scale"] is None else of["scale"])
    }
    if site.flat:
        attrs |= {"q_num_heads": site.heads, "kv_num_heads": site.shared}
    if site.causal:
        attrs["is_causal"] = 1
    if of["softcap"] is not None:
        attrs["softcap"] = float(of["softcap"])
    return attrs


def _check_mask(match: Match, mask: Type, batch: Dim, heads: Dim) -> None:
    shape = mask.shape
    if shape is None or not 2 <= len(shape) <= 4:
        match.refuse(f"the mask {mask} is not known to be one of [batch, heads, queries, keys]")
    wide = (1, 1, *(shape or ()))[-4:]
    if wide[0] not in (1, batch) or wide[1] not in (1, heads) or UNKNOWN_DIM in wide[:2]:
        match.refuse(f"the mask {mask} is not known to be one of {batch} rows and {heads} heads")
    if mask.dtype not in (torch.bool, torch.float32):
        match.refuse(f"the mask {mask} is neither bool nor float32")


def _added(b: Build, site: _Site, mask: Value) -> Value:
    """What is added to the logits, as large as they are along queries and keys."""
    view = b.view
    if view.type(mask).dtype == torch.bool:
        mask = filled(b, mask, -math.inf, site.q)
    else:
        mask = lifted(b, mask)
    shape = view.type(mask).shape or ()
    sides = [(view.type(x).shape or ())[2] for x in (site.q, site.k)]
    if list(shape[-2:]) == sides and UNKNOWN_DIM not in sides:
        return mask
    ahead = [size(b, mask, axis) for axis in range(len(shape) - 2)]
    return b.expand(mask, *ahead, size(b, site.q, 2), size(b, site.k, 2))


def _emit(b: Build, inputs: list[Value], attrs: dict[str, Any], shape: tuple[Dim, ...]) -> Value:
    view: Any = b.view
    view.at(b.before)
    node: onnx_ir.Node = view.emit(NODE, inputs, attrs)
    value = as_value(node.outputs[0])
    set_type(native_value(value), Type(torch.float32, shape))
    return value


def takes_opset(view: OnnxView) -> bool:
    """Whether the graph means the same in the opset that has the node."""
    opset = view.model.opset_imports.get("", _OLDEST)
    if opset >= OPSET:
        return True
    kinds = {node.op_type for graph in view.model.graphs() for node in graph if not node.domain}
    changed = any(opset < since for kind, since in _CHANGED.items() if kind in kinds)
    return opset >= _OLDEST and not changed and not view.model.functions


def take_opset(view: OnnxView) -> None:
    """Say that the graph is of an opset that has the node, where one is in it."""
    if not any(node.op_type == NODE and not node.domain for node in view.nodes()):
        return
    model = view.model
    model.opset_imports[""] = max(OPSET, model.opset_imports.get("", OPSET))
    model.ir_version = max(IR_VERSION, model.ir_version)


__all__ = ["UseAttention", "take_opset", "takes_opset"]
