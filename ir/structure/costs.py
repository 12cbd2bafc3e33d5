"""What a graph costs: tokens, multiply-accumulates, bytes of weights and of the key-value cache.

All is read off the graph's shapes, with numbers in the place of symbolic names: nothing runs, so
that a model can be costed that no machine here could hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.dims import shape_value, sizes_of
from ..core.types import Type
from ..core.view import NATIVE, Node, Value, View, is_value
from ..core.weights import distinct_bytes
from ..vocab import Macs, traits
from .cache_slots import has_cache, is_kept, left_out
from .recognize import Attention, Linear, Structure, recognize

MAC_CONVENTION = (
    "1 MAC is one multiply and add (2 FLOP), in linears, matmuls, attention and convolutions; all "
    "tokens count, and of attention all pairs, masked ones too"
)
_TRIANGLES = frozenset({"aten.tril.default", "aten.triu.default", "Trilu"})
"""Native ops that cut a triangle out of a matrix."""


@dataclass(frozen=True)
class Costs:
    """What one run of a graph costs at given sizes."""

    macs: int | None
    """Multiply-accumulates, by ``MAC_CONVENTION``; ``None`` where the graph leaves a shape open."""
    weight_bytes: int
    kv_bytes: int | None
    """Keys and values that a decoder keeps for all tokens: ``2 bytes sum(n_l d_kv)``; 0 for a model
    that keeps none, ``None`` where a shape is open."""
    tokens: tuple[int | None, ...]
    """Tokens that enter each block."""
    block_macs: tuple[int | None, ...]
    """Of linears and attention, by block."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "macs": self.macs, "weight_bytes": self.weight_bytes, "kv_bytes": self.kv_bytes,
            "tokens": list(self.tokens),
        }  # fmt: skip


def graph_costs(
    view: View, sizes: Mapping[str, int], structure: Structure | None = None
) -> Costs:
    """The costs of a canonical graph, ``sizes`` being the numbers of its symbolic dimensions.

    No weight is read. A node of the vocabulary's ``linear`` kind, a low-rank path among them,
    counts what its factors multiply; a quantized linear counts as the dense one, its unpacking as
    nothing.
    """
    structure = structure or recognize(view)
    counted = {n: traits(view.op(n)).macs for n in view.nodes()}
    macs = {n: _planned_macs(view, n, m, sizes) for n, m in counted.items() if m is not None}
    return Costs(
        macs=_total(macs.values()),
        weight_bytes=weight_bytes(view),
        kv_bytes=_kv_bytes(view, structure, sizes),
        tokens=tuple(_tokens(view.type(block.entry), sizes) for block in structure.blocks),
        block_macs=_by_block(structure, macs),
    )


def sample_sizes(view: View, batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The sizes of the graph's symbolic dimensions for one sample of a batch of inputs, a cache
    that the batch does not hold being empty."""
    types = view.input_types()
    inputs = {**batch, **left_out(types, batch)}
    shapes = {n: (1, *t.shape[1:]) if t.dim() else () for n, t in inputs.items()}
    return sizes_of(view, shapes)


def layer_macs(tokens: int, width: int, inner: int, *, gated: bool = True) -> int:
    """``4 n d^2 + 2 n^2 d + 3 n d m``: a decoder layer as papers on visual tokens count it.

    ``n`` tokens of width ``d``, an MLP of width ``m``, with two matrices instead of three where it
    is not gated. PyramidDrop (Xing et al. 2024, arXiv 2410.17247) counts image tokens alone.
    """
    return 4 * tokens * width**2 + 2 * tokens**2 * width + (2 + gated) * tokens * width * inner


def weight_bytes(view: View) -> int:
    """Bytes of all weights and constants of the graph, shared ones once."""
    return distinct_bytes(view.weights().values())


# --- multiply-accumulates ------------------------------------------------------------------------


def _planned_macs(view: View, node: Node, macs: Macs, sizes: Mapping[str, int]) -> int | None:
    values = [o for o in view.operands(node) if is_value(o)]
    shapes = [shape_value(view.type(value), sizes) for value in values]
    out = shape_value(view.type(view.results(node)[0]), sizes)
    return None if out is None or None in shapes[: macs.reads] else macs.count(shapes, out)


def _by_block(
    structure: Structure, macs: Mapping[Node, int | None]
) -> tuple[int | None, ...]:
    sites: list[Linear | Attention] = [*structure.linears, *structure.attentions]
    return tuple(
        _total(macs[site.node] for site in sites if site.block == block.index)
        for block in structure.blocks
    )


def _total(parts: Any) -> int | None:
    terms = list(parts)
    return None if None in terms else sum(terms)


# --- tokens and the cache ------------------------------------------------------------------------


def _tokens(type_: Type, sizes: Mapping[str, int]) -> int | None:
    """Tokens of a residual stream ``[batch, tokens, width]``, or ``[tokens, width]``."""
    shape = shape_value(type_, sizes)
    return None if shape is None or len(shape) < 2 else math.prod(shape[1:-1] or shape[:1])


def _kv_bytes(view: View, structure: Structure, sizes: Mapping[str, int]) -> int | None:
    kept = _kept_bytes(view, sizes)
    if kept is not None:
        return kept
    causal = Causal(view)
    parts = [_slot_bytes(view, a, sizes) for a in structure.attentions if causal(a.node)]
    return _total(parts)


def _kept_bytes(view: View, sizes: Mapping[str, int]) -> int | None:
    """Of a graph with its cache, what it gives back of keys and values: layers may share a slot,
    latents are fewer than the keys that are made of them, and codes narrower than either. ``None``
    without a cache, and where a shape is open."""
    outputs = zip(view.output_names(), view.outputs(), strict=True)
    types = [view.type(value) for name, value in outputs if is_kept(name)]
    if not types or not has_cache(view):
        return None
    shapes = [shape_value(type_, sizes) for type_ in types]
    return _total(
        None if shape is None or type_.dtype is None else math.prod(shape) * type_.dtype.itemsize
        for shape, type_ in zip(shapes, types, strict=True)
    )


def _slot_bytes(view: View, site: Attention, sizes: Mapping[str, int]) -> int | None:
    k, v = (view.type(view.tensor(site.node, i)) for i in (1, 2))
    shapes = [shape_value(t, sizes) for t in (k, v)]
    if shapes[0] is None or shapes[1] is None or k.dtype is None:
        return None
    heads = shapes[0][-3] if site.kv_heads is None else site.kv_heads
    tokens = math.prod(shapes[0][:-3]) * shapes[0][-2]
    return tokens * heads * (shapes[0][-1] + shapes[1][-1]) * k.dtype.itemsize


class Causal:
    """Whether an attention site is one of a decoder, whose keys and values are kept.

    Its ``sdpa`` says so, or a triangle is among what its mask is made of: one that is cut, one that
    is stored, or one that comes of comparing every position with every other.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._known: dict[Value, bool] = {}

    def __call__(self, sdpa: Node) -> bool:
        operands = self._view.operands(sdpa)
        if self._view.attrs(sdpa)["causal"]:
            return True
        return len(operands) > 3 and is_value(operands[3]) and self._triangular(operands[3])

    def _triangular(self, mask: Value) -> bool:
        if mask in self._known:
            return self._known[mask]
        seen, queue, triangular = {mask}, [mask], False
        while queue and not triangular:
            value = queue.pop()
            node = self._view.producer(value)
            if node is None:
                triangular = _stored_triangle(self._view, value)
                continue
            triangular = _makes_triangle(self._view, node)
            fresh = [v for v in self._view.arguments(node) if v not in seen]
            seen.update(fresh)
            queue += fresh
        self._known[mask] = triangular
        return triangular


def _makes_triangle(view: View, node: Node) -> bool:
    op = view.op(node)
    if op == NATIVE:
        return view.native_op(node) in _TRIANGLES
    if op not in ("lt", "le", "gt", "ge"):
        return False
    # A column against a row: each position with each. (T5 compares distances with a constant.)
    shapes = [view.type(o).shape for o in view.operands(node) if is_value(o)]
    lasts = [shape[-1] for shape in shapes if shape]
    out = view.type(view.results(node)[0]).shape or ()
    return len(lasts) == 2 and lasts.count(1) == 1 and len(out) > 1 and out[-2] != 1


def _stored_triangle(view: View, value: Value) -> bool:
    weight = view.weight(value)
    if weight is None or weight.dtype not in (torch.bool, torch.uint8) or len(weight.shape) < 2:
        return False
    return weight.shape[-1] == weight.shape[-2] > 1
