"""Attention beside a cache as one node, in which a GPU turns, keeps and attends.

sdpa(rope(q), [past; rope(k)], [past; v], mask) => GroupQueryAttention(q, k, v, past, tables)

The node knows a row by its length alone. What it stands for must therefore be attention to all
tokens up to a token's own (or to the last of them, a window), and padding must be at the end of a
row: what a graph's mask means is found by running it (``row_places``). Where queries and keys are
turned by something else than their places, they are turned outside. Where three linears of one
input make queries, keys and values, one product makes all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch

from ....ir.canonical.heads import size
from ....ir.canonical.siblings import joined_name
from ....ir.core.errors import Refusal
from ....ir.core.types import UNKNOWN_DIM, Type
from ....ir.core.view import Node, Operand, Value, View, is_value
from ....ir.core.weights import MemoryWeight
from ....ir.onnx.forms import as_value, native_value
from ....ir.onnx.parts import set_type
from ....ir.rewrite.pattern import Match
from ....ir.rewrite.rule import Build, Rule
from ....ir.structure.cache_slots import CacheSlot, find_slot, has_states, past_slot
from ....ir.vocab import END
from ....ir.vocab.onnx import MICROSOFT
from .flat_heads import flat, joined
from .row_places import Places
from .siblings import joined_operand, kind

NODE = "GroupQueryAttention"
MASK = "attention_mask"
WIDTHS, TURNED = 8, 16
"""Features of a head come in so many, and those that are turned."""


@dataclass(frozen=True)
class _Turn:
    """Values before ``rope``, and the tables that it turns them by."""

    x: Value
    cos: Value
    sin: Value


@dataclass(frozen=True)
class _Site:
    """One attention: queries, new keys and new values as [batch, heads, tokens, width]."""

    q: Value
    k: Value
    v: Value
    slot: CacheSlot
    window: int
    heads: int
    shared: int
    width: int
    tables: tuple[Value, Value] | None
    """What turns queries and keys in the node; ``None`` where they are turned already."""


class UseGroupQuery(Rule):
    """sdpa(rope(q), [past; rope(k)], [past; v], mask) => GroupQueryAttention(q, k, v, past)"""

    name = "use-group-query"

    def __init__(self, places: Places, dtypes: Sequence[torch.dtype]) -> None:
        """``dtypes`` are those in which the target's runtime has the node."""
        self._places, self._dtypes = places, dtypes

    def pattern(self, p: Any, q: Any, k: Any, v: Any) -> Any:
        return p.sdpa(q, k, v, rest=True)

    def where(self, match: Match) -> None:
        self._site(match)

    def _site(self, match: Match) -> _Site:
        view, attrs = match.view, match.view.attrs(match.root)
        slot = find_slot(view, match.root)
        if slot is None:
            raise Refusal("it has no cache of its own", match.root)
        if has_states(view):
            raise Refusal(
                "it pads rows at their end, which would change the state of other layers",
                match.root,
            )
        mask = (*view.operands(match.root), None)[3]
        if attrs["causal"] or not is_value(mask):
            raise Refusal("no mask says what a row holds", match.root)
        q, k, v = match.value("q"), *(_joined(match, name, slot) for name in "kv")
        heads, shared, width = _sizes(match, q, k, v)
        self._check_dtype(match, view.type(q).dtype)
        window = self._places.window(mask)
        turned = self._turned(view, q, k)
        if turned is not None:
            return _Site(turned[0].x, turned[1].x, v, slot, window, heads, shared, width,
                         (turned[0].cos, turned[0].sin))  # fmt: skip
        return _Site(q, k, v, slot, window, heads, shared, width, None)

    def _check_dtype(self, match: Match, dtype: torch.dtype | None) -> None:
        if dtype not in self._dtypes:
            known = " and ".join(str(d).removeprefix("torch.") for d in self._dtypes)
            raise Refusal(
                f"it computes in {dtype}, and {NODE} takes {known} there: choose one by --dtype",
                match.root,
            )

    def _turned(self, view: View, q: Value, k: Value) -> tuple[_Turn, _Turn] | None:
        """Queries and keys before they are turned by their places, both by the same tables."""
        turns = [_turn(view, value) for value in (q, k)]
        one, other = turns
        if one is None or other is None or (one.cos, one.sin) != (other.cos, other.sin):
            return None
        try:
            widths = {self._places.angles(value).shape[1] for value in (one.cos, one.sin)}
        except Refusal:
            return None
        return (one, other) if len(widths) == 1 and 2 * widths.pop() % TURNED == 0 else None

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, root = build.view, build.match.root
        site = self._site(build.match)
        attrs = view.attrs(root)
        scale = 1 / math.sqrt(site.width) if attrs["scale"] is None else attrs["scale"]
        lengths = _lengths(build)
        tables = () if site.tables is None else tuple(self._table(build, t) for t in site.tables)
        inputs = [*_products(build, site), *site.slot.past, *lengths, *tables]
        outputs = _emit(build, inputs, {
            "num_heads": site.heads, "kv_num_heads": site.shared, "scale": float(scale),
            "softcap": float(attrs["softcap"] or 0.0), "local_window_size": site.window,
            "do_rotary": int(bool(tables)), "rotary_interleaved": 0,
        })  # fmt: skip
        for present, result in zip(site.slot.present, outputs[1:], strict=True):
            view.retype(result, present)
            view.replace(present, result)
        q = view.type(site.q)
        batch, _, tokens, _ = q.shape or ()
        set_type(native_value(outputs[0]), Type(q.dtype, (batch, tokens, site.heads * site.width)))
        together = joined(view, root, site.heads * site.width)
        if together is not None:
            view.replace(together, outputs[0])
        apart = build.reshape(
            outputs[0], size(build, site.q, 0), size(build, site.q, 2), site.heads, site.width
        )
        return build.transpose(apart, perm=(0, 2, 1, 3))

    def _table(self, build: Build, value: Value) -> Value:
        table = MemoryWeight(self._places.angles(value))
        return build.view.add_weight(f"{build.view.name(value)}.table", table)


def caches_are_shared(view: View) -> bool:
    """Whether these attentions alone look at keys and values of before. Where places are counted
    by the length of a cache, it must be that of the text."""
    named = zip(view.input_names(), view.inputs(), strict=True)
    users = {u for name, past in named if past_slot(name) is not None for u in view.users(past)}
    return all(view.native_op(u) == f"{MICROSOFT}::{NODE}" or _reads_rows(view, u) for u in users)


def _reads_rows(view: View, node: Node) -> bool:
    """Whether a node asks for the number of rows alone."""
    attrs = view.attrs(node)
    return view.native_op(node) == "Shape" and attrs.get("start", 0) == 0 and attrs.get("end") == 1


def _joined(match: Match, name: str, slot: CacheSlot) -> Value:
    """New keys or values, of [past; new] that only this attention and the graph's caller read."""
    view, value = match.view, match.value(name)
    node = view.producer(value)
    part = "kv".index(name)
    parts = view.operands(node) if node is not None and view.op(node) == "concat" else ()
    if node is None or len(parts) != 2 or parts[0] is not slot.past[part]:
        raise Refusal("keys or values are not a cache and what is new, joined", match.root)
    if slot.present[part] is not value or set(view.users(value)) != {match.root}:
        raise Refusal("its cache is read by something else too", match.root)
    assert is_value(parts[1])
    return parts[1]


def _sizes(match: Match, q: Value, k: Value, v: Value) -> tuple[int, int, int]:
    view = match.view
    types = [view.type(value) for value in (q, k, v)]
    if any(t.rank != 4 or UNKNOWN_DIM in (t.shape or ()) for t in types):
        raise Refusal(f"{types[0]}, {types[1]}: not [batch, heads, tokens, width]", match.root)
    shapes = [t.shape or () for t in types]
    (_, heads, _, width), (_, shared, _, _) = shapes[:2]
    numbers = isinstance(heads, int) and isinstance(shared, int) and isinstance(width, int)
    if not numbers or shapes[1] != shapes[2] or int(width) % WIDTHS:
        raise Refusal(
            f"{types[0]}, {types[1]}, {types[2]}: heads of one width, a multiple of {WIDTHS}, are "
            "needed", match.root,
        )  # fmt: skip
    return int(heads), int(shared), int(width)


def _turn(view: View, value: Value) -> _Turn | None:
    """rope(x), or [rope(x[..., :r]); x[..., r:]], which the node does by narrower tables."""
    node = view.producer(value)
    if node is not None and view.op(node) == "rope":
        x, cos, sin = view.operands(node)
        assert is_value(x) and is_value(cos) and is_value(sin)
        return _Turn(x, cos, sin)
    if node is None or view.op(node) != "concat" or view.attrs(node)["dim"] != 3:
        return None
    head, *rest = view.operands(node)
    first = _turn(view, head) if is_value(head) and len(rest) == 1 else None
    if first is None or not is_value(rest[0]):
        return None
    front, back = (_part(view, x) for x in (first.x, rest[0]))
    width = (view.type(value).shape or (None,))[-1]
    if front is None or back is None or front[0] is not back[0]:
        return None
    whole = front[1] == 0 and front[2] == back[1] and back[2] in (width, END)
    return _Turn(front[0], first.cos, first.sin) if whole else None


def _part(view: View, value: Value) -> tuple[Value, Any, Any] | None:
    """A slice of features, with its ends."""
    node = view.producer(value)
    if node is None or view.op(node) != "slice" or view.attrs(node)["dim"] != 3:
        return None
    x, start, end, *step = view.operands(node)
    if not is_value(x) or any(view.number(s) != 1 for s in step):
        return None
    return x, view.number(start), view.number(end)


def _lengths(b: Build) -> tuple[Value, Value]:
    """The place of each row's last token, i32 [batch], and tokens of the longest row, i32."""
    names = dict(zip(b.view.input_names(), b.view.inputs(), strict=True))
    if MASK not in names:
        raise Refusal(f"the graph takes no {MASK}, which says how long rows are")
    mask = names[MASK]
    last = b.sub(b.sum(mask, dims=(1,)), 1)
    return b.cast(last, dtype=torch.int32), b.cast(b.size(mask, dim=1), dtype=torch.int32)


def _products(b: Build, site: _Site) -> list[Value | None]:
    """Queries, keys and values as [batch, tokens, heads · width]; all in one where one product can
    make them."""
    parts = [flat(b, x) for x in (site.q, site.k, site.v)]
    packed = _packed(b, parts)
    return [*parts] if packed is None else [packed, None, None]


def _packed(b: Build, parts: Sequence[Value]) -> Value | None:
    """One linear of the three that make queries, keys and values; ``None`` where they are not three
    of one kind and one input, whose results nobody else reads."""
    view = b.view
    nodes = [view.producer(value) for value in parts]
    if any(node is None or view.op(node) not in ("linear", "linear_nbit") for node in nodes):
        return None
    known: list[Node] = [node for node in nodes if node is not None]
    if len(set(known)) < 3 or any(len(view.users(value)) != 1 for value in parts):
        return None
    stored = [o for node in known for o in view.operands(node)[1:] if is_value(o)]
    alike = len({(view.op(node), kind(view, node)) for node in known}) == 1
    if not alike or any(view.weight(operand) is None for operand in stored):
        return None
    first = known[0]
    weights = [_stacked(view, known, place) for place in range(1, len(view.operands(first)))]
    attrs = dict(view.attrs(first))
    if attrs:
        attrs["out_features"] = sum(view.attrs(node)["out_features"] for node in known)
    return b.build(view.op(first), view.operands(first)[0], *weights, **attrs)


def _stacked(view: View, nodes: Sequence[Node], place: int) -> Operand:
    """Constants one below the other; ``None`` for absent ones."""
    names = [view.name(o) for node in nodes if is_value(o := view.operands(node)[place])]
    # By a name of this form what was joined is parted again: see ``ir.canonical.siblings``.
    return joined_operand(view, nodes, place, joined_name(names) or "+".join(names) or None)


def _emit(b: Build, inputs: Sequence[Value | None], attrs: dict[str, Any]) -> list[Value]:
    view: Any = b.view
    view.at(b.before)
    node: onnx_ir.Node = view.emit(NODE, inputs, attrs, domain=MICROSOFT, outputs=3)
    return [as_value(value) for value in node.outputs]
