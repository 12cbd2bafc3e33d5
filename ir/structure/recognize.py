"""What a person sees in a graph: linears, attention sites, the residual spine, blocks.

All of it is read off the graph, on either kind, never off the names of model classes. The graph is
one that ``canonicalize`` has been through.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.errors import BadInput
from ..core.view import Node, Value, View, is_value
from ..vocab import ops_with, spec, traits
from .beside import beside_edges, made_for
from .cache_slots import CacheSlot, find_slot
from .layers import Block, SubBlock, layers_of, layers_within
from .mixers import MIXERS, mixes, mixing
from .naming import site_names
from .roles import TracedAttention, mlp_roles, tail_roles, trace_attention
from .spine import NO_SPINE, Spine, feeds, find_spine
from .sub_block_ends import ends
from .unread_attention import unread_attention
from .weights import stored_weight, weight_behind


@dataclass(frozen=True)
class Linear:
    """One linear whose weight is a constant: ``out = x wᵀ + bias``."""

    node: Node
    x: Value
    weight: Value
    """[out, in], as it is stored; of an already quantized linear, its codes."""
    bias: Value | None
    out: Value
    name: str
    in_features: int
    out_features: int
    block: int | None = None
    """Index of the block; ``None`` before the first and after the last."""
    role: str = ""
    """``q``, ``k``, ``v``, ``qkv``, ``o``, ``gate``, ``up``, ``gate_up``, ``down``, ``fc1``,
    ``fc2``, ``head``, or empty where the graph does not tell."""
    quantized: bool = False


@dataclass(frozen=True)
class Attention:
    """One ``sdpa``, and the names of the linears around it (empty where there is none)."""

    node: Node
    q: str
    k: str
    v: str
    o: str
    heads: int | None
    kv_heads: int | None
    """Heads that keys and values have before they are repeated."""
    head_dim: int | None
    block: int | None = None
    cache: CacheSlot | None = None
    """The graph's inputs and outputs that hold the site's keys and values, where it has them."""


@dataclass(frozen=True)
class Embedding:
    """One table of rows that ids pick from."""

    node: Node
    weight: Value
    name: str
    rows: int
    width: int


@dataclass(frozen=True)
class Structure:
    """All that is recognised in a graph."""

    linears: tuple[Linear, ...]
    attentions: tuple[Attention, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    spine: Spine = NO_SPINE
    sub_blocks: tuple[SubBlock, ...] = ()
    blocks: tuple[Block, ...] = ()


def last_tower(structure: Structure) -> list[Block]:
    """The blocks of the last tower: of a vision-language model, those of its language model.

    They are numbered from 0 in the tower. Raises ``BadInput`` where no block is recognised, and
    where it is not known how many sums of the residual stream make a layer.
    """
    blocks = structure.blocks
    period = _period(structure)
    if period > 1:
        raise BadInput(
            "no attention is seen in this model, and the branches of its residual stream repeat "
            f"after {period}: {_kinds(structure, period)}. Which of them make a layer is not "
            "known, so none is left out or repeated"
        )
    if not blocks:
        raise BadInput(
            "no block is recognised in this model: there is no one residual stream that runs from "
            "layer to layer around their attention (a UNet has streams that skip to later layers, "
            "SD3 one of text and one of image). `optimize-model inspect MODEL` shows what is"
        )
    return [block for block in blocks if block.tower == blocks[-1].tower]


def _period(structure: Structure) -> int:
    """After how many branches their linears repeat, where none attends; 1 where all are alike, or
    none repeats."""
    subs = structure.sub_blocks
    if any(sub.attends or not sub.linears for sub in subs):
        return 1
    shapes = {site.name: (site.out_features, site.in_features) for site in structure.linears}
    kinds = [tuple(shapes[name] for name in sub.linears) for sub in subs]
    for period in range(1, len(kinds) // 2 + 1):
        if all(a == b for a, b in zip(kinds, kinds[period:], strict=False)):
            return period
    return 1


def _kinds(structure: Structure, period: int) -> str:
    """The linears of the first branches, by name."""
    return "; ".join(
        ", ".join(sub.linears) or "no linear" for sub in structure.sub_blocks[:period]
    )


def recognize(view: View) -> Structure:
    """Recognise the structure of a canonical graph; linear in its size."""
    linear_ops = ops_with(lambda op: op.is_linear)
    tables = ops_with(lambda op: op.table is not None)
    asked = (*linear_ops, "sdpa", "softmax", *tables, *MIXERS)
    nodes: dict[str, list[Node]] = {op: [] for op in asked}
    order: dict[Node, int] = {}
    for place, node in enumerate(view.nodes()):
        order[node] = place
        op = view.op(node)
        if op in nodes:
            nodes[op].append(node)
    sites = sorted((n for op in linear_ops for n in nodes[op]), key=order.__getitem__)
    linears = _linears(view, sites)
    attending = (*nodes["sdpa"], *unread_attention(view, nodes["softmax"]))
    spine = find_spine(view, attending)
    names = {site.node: site.name for site in linears}
    traced = [trace_attention(view, node, names) for node in nodes["sdpa"]]
    makers = [view.producer(fork) for fork in spine.forks]
    forks = [-1 if maker is None else order[maker] for maker in makers]
    apart = made_for(view, beside_edges(view))
    places = {n: None if n in apart else _sub_block_of(spine, order, forks, n)
              for n in (*names, *nodes["sdpa"])}  # fmt: skip
    roles = _roles(view, linears, traced, places, spine)
    linears = [replace(site, role=roles.get(site.node, "")) for site in linears]
    attends = {
        _sub_block_of(spine, order, forks, n) for n in attending if not _crosses(view, spine, n)
    }
    mixers = [node for op in MIXERS for node in nodes[op] if mixes(view, node)]
    # Of several in one branch the last named counts: a recurrence, which has a convolution too.
    attends |= mixing(attends, {_sub_block_of(spine, order, forks, n): n for n in mixers}, view)
    subs = _sub_blocks(view, spine, linears, nodes["sdpa"], places, attends)
    beside = layers_within(view, spine, order, attending)
    blocks = layers_of(view, subs, beside)
    block_of = {sub.index: block.index for block in blocks for sub in block.sub_blocks}
    linears = [replace(site, block=_at(block_of, places[site.node])) for site in linears]
    widths = {site.node: site.out_features for site in linears}
    attentions = tuple(
        _attention(view, site, names, widths, _at(block_of, places[site.node])) for site in traced
    )
    embeddings = _embeddings(view, sorted(
        (n for op in tables for n in nodes[op]), key=order.__getitem__
    ))  # fmt: skip
    return Structure(tuple(linears), attentions, embeddings, spine, subs, blocks)


def _linears(view: View, sites: list[Node]) -> list[Linear]:
    nodes = [n for n in sites if stored_weight(view, n) is not None and not _is_vector(view, n)]
    names = site_names(view, nodes)
    return [_linear(view, node, names[node]) for node in nodes]


def _is_vector(view: View, node: Node) -> bool:
    """Whether the weight has no axis of outputs: such a sum is none of a linear's sites."""
    return view.type(weight_behind(view, node)).rank == 1


def _linear(view: View, node: Node, name: str) -> Linear:
    operands, op = view.operands(node), spec(view.op(node))
    x, weight = view.tensor(node), weight_behind(view, node)
    out = view.results(node)[0]
    bias = operands[op.bias] if op.bias is not None and op.bias < len(operands) else None
    bias = bias if is_value(bias) else None
    if op.stored_linear:
        attrs = view.attrs(node)
        return Linear(
            node, x, weight, bias, out, name, int(attrs["in_features"]),
            int(attrs["out_features"]), quantized=True,
        )  # fmt: skip
    handle = view.weight(weight)
    assert handle is not None
    return Linear(node, x, weight, bias, out, name, handle.shape[1], handle.shape[0])


def _attention(
    view: View,
    site: TracedAttention,
    names: Mapping[Node, str],
    widths: Mapping[Node, int],
    block: int | None,
) -> Attention:
    q, k, v, o = ("" if n is None else names[n] for n in (site.q, site.k, site.v, site.o))
    heads, kv_heads, head_dim = site.heads(view, widths)
    slot = find_slot(view, site.node)
    return Attention(site.node, q, k, v, o, heads, kv_heads, head_dim, block, slot)


def _embeddings(view: View, sites: list[Node]) -> tuple[Embedding, ...]:
    tables = {node: view.tensor(node, traits(view.op(node)).table or 0) for node in sites}
    nodes = [node for node, table in tables.items() if view.weight(table) is not None]
    names = site_names(view, nodes)
    embeddings = []
    for node in nodes:
        table = tables[node]
        handle = view.weight(table)
        assert handle is not None
        width = view.attrs(node).get("width", handle.shape[-1])
        embeddings.append(Embedding(node, table, names[node], handle.shape[0], width))
    return tuple(embeddings)


def _sub_block_of(
    spine: Spine, order: dict[Node, int], forks: Sequence[int], node: Node
) -> int | None:
    """Index of the sub-block that a node lies in: it branches off before that addition, and behind
    the fork where the branch starts. Before it are the two arms of a gate between two towers."""
    place = spine.position.get(node)
    if place is None or node in spine.chain or not feeds(spine, order, node):
        return None
    if place == 0 and order[node] <= spine.entry:
        return None
    return None if node not in spine.besides and order[node] < forks[place] else place


def _crosses(view: View, spine: Spine, node: Node) -> bool:
    """Whether attention looks at another stream than its own, whose keys do not come from it."""
    if node not in spine.position or view.op(node) != "sdpa":
        return False
    keys = view.producer(view.tensor(node, 1))
    return keys is None or keys not in spine.position or keys in spine.besides


def _at(table: dict[int, int], place: int | None) -> int | None:
    return None if place is None else table.get(place)


def _roles(
    view: View,
    linears: list[Linear],
    traced: Sequence[TracedAttention],
    places: dict[Node, int | None],
    spine: Spine,
) -> dict[Node, str]:
    roles: dict[Node, str] = {}
    for site in traced:
        roles.update(site.roles())
    groups: dict[int, list[Node]] = {}
    tail: list[Node] = []
    for linear in linears:
        place = places[linear.node]
        if linear.node in roles:
            continue
        if place is not None or not spine.additions:
            groups.setdefault(-1 if place is None else place, []).append(linear.node)
        elif spine.position.get(linear.node, -1) >= len(spine.additions):
            tail.append(linear.node)
    for group in groups.values():
        roles.update(mlp_roles(view, group))
    roles.update(tail_roles(view, tail))
    return roles


def _sub_blocks(
    view: View, spine: Spine, linears: list[Linear], sdpas: list[Node],
    places: dict[Node, int | None], attends: Container[int | None],
) -> tuple[SubBlock, ...]:  # fmt: skip
    inside: dict[int, list[str]] = {}
    attending: dict[int, list[int]] = {}
    for linear in linears:
        place = places[linear.node]
        if place is not None:
            inside.setdefault(place, []).append(linear.name)
    for index, node in enumerate(sdpas):
        place = places[node]
        if place is not None:
            attending.setdefault(place, []).append(index)
    entries, exits = ends(view, spine, [inside.get(i, ()) for i in range(len(spine.additions))])
    return tuple(
        SubBlock(i, addition, tuple(inside.get(i, ())), tuple(attending.get(i, ())),
                 entries[i], exits[i], i in attends)
        for i, addition in enumerate(spine.additions)
    )  # fmt: skip
