"""What a person sees in a raised graph: linears with their roles, attention sites, blocks.

Recognised from the graph alone, on either native form, never from the names of model classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .spine import spine
from .view import Node, Operand, Value, View

LINEAR_OPS = ("linear", "linear_nbit")
_SHAPING = frozenset({
    "reshape", "transpose", "expand", "unsqueeze", "squeeze", "slice", "split", "concat", "cast",
    "identity", "rope", "rms_norm", "layer_norm", "mul", "add", "neg", "div", "clamp",
})  # fmt: skip
"""Ops that a projection passes on its way into attention."""
_ACTIVATIONS = frozenset({"silu", "gelu", "relu", "sigmoid", "tanh"})
_GENERIC = re.compile(r"(val|const|onnx|t|w)[_:.]*\d*(\.T)?|.*MatMul_\d+(\.T)?|.*folded(\.T)?")
"""Names that exporters make up for weights: they say nothing of the model."""


@dataclass(frozen=True)
class Linear:
    """A linear whose weight is a constant; ``weight`` is its codes once it is quantized."""

    node: Node
    x: Value
    weight: Value
    bias: Value | None
    out: Value
    name: str
    in_features: int
    out_features: int
    block: int | None = None
    role: str = ""
    """``q``, ``k``, ``v``, ``qkv``, ``o``, ``gate``, ``up``, ``down``, ``fc1``, ``fc2``, ``head`` or
    empty."""


@dataclass(frozen=True)
class Attention:
    """One ``sdpa`` and the names of the linears around it (empty where none was found)."""

    node: Node
    q: str
    k: str
    v: str
    o: str
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    block: int | None = None


@dataclass(frozen=True)
class Block:
    """A layer of the model: consecutive sub-blocks, each ending in a residual addition."""

    index: int
    sub_blocks: tuple[Node, ...]
    linears: tuple[str, ...]
    attentions: int


@dataclass(frozen=True)
class Structure:
    linears: tuple[Linear, ...]
    attentions: tuple[Attention, ...]
    spine: tuple[Node, ...]
    """The residual additions, in order."""
    blocks: tuple[Block, ...]


def recognize(view: View) -> Structure:
    """The structure of a raised graph."""
    order = list(view.nodes())
    linears = {n: linear for n in order if (linear := _linear(view, n)) is not None}
    _name(view, linears)
    sites = [n for n in order if view.op(n) == "sdpa"]
    attentions = {n: _attention(view, n, linears) for n in sites}
    _feed_forward_roles(view, linears)
    additions = spine(view)
    groups = _group(view, additions)
    blocks: list[Block] = []
    block_of: dict[Node, int] = {}
    for members in _blocks(view, additions, groups):
        inside = [n for addition in members for n in groups[addition]]
        block_of |= dict.fromkeys(inside, len(blocks))
        names = tuple(linears[n].name for n in order if n in linears and n in set(inside))
        count = sum(n in attentions for n in inside)
        blocks.append(Block(len(blocks), tuple(members), names, count))
    for node, linear in linears.items():
        role = linear.role or ("head" if _is_head(view, linear, block_of.get(node)) else "")
        linears[node] = replace(linear, block=block_of.get(node), role=role)
    found = tuple(replace(a, block=block_of.get(n)) for n, a in attentions.items())
    return Structure(tuple(linears.values()), found, tuple(additions), tuple(blocks))


def _linear(view: View, node: Node) -> Linear | None:
    op = view.op(node)
    if op not in LINEAR_OPS:
        return None
    operands = view.operands(node)
    weight = view.weight(operands[1])
    if weight is None:
        return None
    if op == "linear":
        out_features, in_features = weight.shape
        bias = operands[2] if len(operands) > 2 else None
    else:
        attrs = view.attrs(node)
        in_features, out_features = attrs["in_features"], attrs["out_features"]
        bias = operands[4] if len(operands) > 4 else None
    out = view.results(node)[0]
    return Linear(node, operands[0], operands[1], bias, out, "", in_features, out_features)


def _name(view: View, linears: dict[Node, Linear]) -> None:
    """Names that the FX graph and its ONNX export share: of the weight, of the module, of the node."""
    taken: Counter[str] = Counter()
    for node, linear in linears.items():
        name = _weight_name(view, linear) or view.scope(node) or view.name(node)
        taken[name] += 1
        unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
        linears[node] = replace(linear, name=unique)


def _weight_name(view: View, linear: Linear) -> str:
    """The module path in the weight's name; empty where it says nothing, or for a tied weight."""
    name = re.sub(r"\.T(_\d+)?$", "", view.name(linear.weight))
    if _GENERIC.fullmatch(name) or "." not in name or len(view.users(linear.weight)) > 1:
        return ""
    scope = view.scope(linear.node)
    path = re.sub(r"\.(weight|codes|matrix)(_\d+)?$", "", name)
    # A weight used outside of its own module (an embedding tied to the head) names the other.
    return path if not scope or scope == path or not path.endswith("embeddings") else scope


# --- attention -----------------------------------------------------------------------------------


def _attention(view: View, node: Node, linears: dict[Node, Linear]) -> Attention:
    q, k, v = view.operands(node)[:3]
    sources = [_source(view, operand, linears) for operand in (q, k, v)]
    sink = _sink(view, view.results(node)[0], linears)
    if sources[0] is not None and sources[0] is sources[1] is sources[2]:
        _set_role(linears, sources[0], "qkv")
    else:
        for source, role in zip(sources, "qkv", strict=True):
            _set_role(linears, source, role)
    _set_role(linears, sink, "o")
    names = ["" if n is None else linears[n].name for n in (*sources, sink)]
    shape = view.type(q).shape or ()
    heads = shape[-3] if len(shape) > 2 and isinstance(shape[-3], int) else None
    head_dim = shape[-1] if shape and isinstance(shape[-1], int) else None
    kv_heads = heads
    if sources[1] is not None and sources[1] is not sources[0] and head_dim:
        kv_heads = linears[sources[1]].out_features // head_dim
    return Attention(node, names[0], names[1], names[2], names[3], heads, kv_heads, head_dim)


def _set_role(linears: dict[Node, Linear], node: Node | None, role: str) -> None:
    if node is not None and not linears[node].role:
        linears[node] = replace(linears[node], role=role)


def _source(view: View, operand: Operand, linears: dict[Node, Linear], depth: int = 16) -> Node | None:
    """The linear that a value comes from through shaping ops."""
    if operand is None or isinstance(operand, int | float) or not depth:
        return None
    node = view.producer(operand)
    if node is None or node in linears:
        return node
    if view.op(node) not in _SHAPING:
        return None
    return next(
        (
            found
            for value in view.operands(node)
            if (found := _source(view, value, linears, depth - 1)) is not None
        ),
        None,
    )


def _sink(view: View, value: Value, linears: dict[Node, Linear], depth: int = 8) -> Node | None:
    """The linear that a value runs into through shaping ops."""
    for user in view.users(value) if depth else ():
        if user in linears:
            return user
        if view.op(user) in ("reshape", "transpose", "identity", "cast", "squeeze", "unsqueeze"):
            found = _sink(view, view.results(user)[0], linears, depth - 1)
            if found is not None:
                return found
    return None


# --- feed-forward --------------------------------------------------------------------------------


def _feed_forward_roles(view: View, linears: dict[Node, Linear]) -> None:
    """gate, up and down around a product with an activated branch; fc1 and fc2 around a plain one."""
    for node, linear in list(linears.items()):
        activation = _only_activation(view, linear.out)
        if activation is None or linears[node].role:
            continue
        activated = view.results(activation)[0]
        products = [u for u in view.users(activated) if view.op(u) == "mul"]
        itself = [u for u in products if linear.out in view.operands(u)]
        if itself:  # x · sigmoid(x) and its kin: the product is the activation
            activated = view.results(itself[0])[0]
            products = [u for u in view.users(activated) if view.op(u) == "mul"]
        partner = _partner(view, products, activated, linears)
        if partner is not None:
            up, product = partner
            _set_role(linears, node, "gate")
            _set_role(linears, up, "up")
            _set_role(linears, _sink(view, view.results(product)[0], linears), "down")
            continue
        second = _sink(view, activated, linears)
        if second is not None:
            _set_role(linears, node, "fc1")
            _set_role(linears, second, "fc2")


def _only_activation(view: View, value: Value, depth: int = 4) -> Node | None:
    for user in view.users(value) if depth else ():
        if view.op(user) in _ACTIVATIONS:
            return user
        if view.op(user) in ("reshape", "mul", "identity"):
            found = _only_activation(view, view.results(user)[0], depth - 1)
            if found is not None and _elementwise_of(view, user, value):
                return found
    return None


def _elementwise_of(view: View, node: Node, value: Value) -> bool:
    """Whether the node only scales or reshapes the value (quick GELU's ``1.702 x``)."""
    others = [o for o in view.operands(node) if o is not value]
    return view.op(node) != "mul" or all(view.number(o) is not None for o in others)


def _partner(
    view: View, products: Iterable[Node], activated: Value, linears: dict[Node, Linear]
) -> tuple[Node, Node] | None:
    for product in products:
        for operand in view.operands(product):
            if operand is activated or operand is None or isinstance(operand, int | float):
                continue
            maker = view.producer(operand)
            if maker in linears:
                return maker, product
    return None


def _is_head(view: View, linear: Linear, block: int | None) -> bool:
    return block is None and view.is_output(linear.out)


# --- blocks --------------------------------------------------------------------------------------


def _group(view: View, additions: list[Node]) -> dict[Node, list[Node]]:
    """For each addition of the spine, the nodes between it and the one before."""
    groups: dict[Node, list[Node]] = {}
    taken: set[Node] = set()
    for addition in additions:
        members, stack = [], [addition]
        while stack:
            node = stack.pop()
            if node in taken:
                continue
            taken.add(node)
            members.append(node)
            stack.extend(p for v in view.arguments(node) if (p := view.producer(v)) is not None)
        groups[addition] = members
    return groups


def _blocks(
    view: View, additions: list[Node], groups: dict[Node, list[Node]]
) -> list[list[Node]]:
    """Sub-blocks gathered into blocks: each attention begins one; the first may lack attention."""
    blocks: list[list[Node]] = []
    for addition in additions:
        attends = any(view.op(n) == "sdpa" for n in groups[addition])
        works = attends or any(view.op(n) in LINEAR_OPS for n in groups[addition])
        if not works:
            continue
        if attends or not blocks:
            blocks.append([])
        blocks[-1].append(addition)
    return blocks
