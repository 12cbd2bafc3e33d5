"""Fused activations, norms and products, as ONNX Runtime writes them.

Gelu(x), BiasGelu(x, b)            => gelu(x), gelu(x + b)
FastGelu(x, b)                     => gelu(x + b, tanh)
QuickGelu(x)                       => x sigmoid(α x)
SimplifiedLayerNormalization(x, w) => rms_norm(x, w)
SkipLayerNormalization(x, s, w, b) => layer_norm(x + s, w, b)
EmbedLayerNormalization(ids, ...)  => layer_norm(words[ids] + positions[0, 1, ...] + ..., w, b)
FusedMatMul(a, b)                  => α matmul(a or aᵀ, b or bᵀ)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.view import Value
from ..rewrite.rule import Build
from .fused import MICROSOFT, Fused, Inputs
from .heads import places


class ExpandGelu(Fused):
    """Gelu(x) => gelu(x)"""

    name, op = "expand-gelu", MICROSOFT + "Gelu"

    def expand(self, b: Build, node: Inputs) -> Sequence[Value]:
        return [b.gelu(node.need(0))]


class ExpandBiasGelu(Fused):
    """BiasGelu(x, b) => gelu(x + b)"""

    name, op = "expand-bias-gelu", MICROSOFT + "BiasGelu"

    def expand(self, b: Build, node: Inputs) -> Sequence[Value]:
        return [b.gelu(b.add(node.need(0), node.need(1)))]


class ExpandFastGelu(Fused):
    """FastGelu(x, b) => gelu(x + b, tanh)"""

    name, op = "expand-fast-gelu", MICROSOFT + "FastGelu"

    def expand(self, b: Build, node: Inputs) -> Sequence[Value]:
        x, bias = node.need(0), node[1]
        return [b.gelu(x if bias is None else b.add(x, bias), approximate="tanh")]


class ExpandQuickGelu(Fused):
    """QuickGelu(x) => x sigmoid(α x)"""

    name, op = "expand-quick-gelu", MICROSOFT + "QuickGelu"

    def expand(self, b: Build, node: Inputs) -> Sequence[Value]:
        x, alpha = node.need(0), float(node.attr("alpha", 1.702))
        if alpha == 1:
            return [b.silu(x)]
        return [b.mul(x, b.sigmoid(b.mul(x, alpha)))]


class ExpandSimplifiedLayerNorm(Fused):
    """SimplifiedLayerNormalization(x, w) => rms_norm(x, w)"""

    name, op = "expand-simplified-layer-norm", "SimplifiedLayerNormalization"

    def check(self, node: Inputs) -> None:
        axis, rank = node.attr("axis", -1), node.rank(node.need(0))
        if axis not in (-1, rank - 1):
            raise node.refuse(f"it norms from axis {axis} of {rank} dimensions on")
        node.refuse_results((1, "inv_std_var"))

    def expand(self, b: Build, node: Inputs) -> Sequence[Value]:
        return [b.rms_norm(node.need(0), node.need(1), eps=float(node.attr("epsilon", 1e-5)))]


class _SkipNorm(Fused):
    """The sum of a stream and a branch, then its norm; the sum is the fourth result."""

    bias = 4

    def check(self, node: Inputs) -> None:
        node.refuse_results((1, "mean"), (2, "inv_std_var"))

    def expand(self, b: Build, node: Inputs) -> Sequence[Value | None]:
        bias = node[self.bias]
        branch = node.need(0)
        # The bias belongs to the linear that makes the branch: next to it, it is read as its own.
        if bias is not None:
            branch = b.add(branch, bias)
        total = b.add(branch, node.need(1))
        return [self.norm(b, node, total), None, None, total]

    def norm(self, b: Build, node: Inputs, total: Value) -> Value:
        raise TypeError(f"{type(self).__name__} declares no norm")


class ExpandSkipLayerNorm(_SkipNorm):
    """SkipLayerNormalization(x, skip, w, b, bias) => layer_norm(x + bias + skip, w, b)"""

    name, op = "expand-skip-layer-norm", MICROSOFT + "SkipLayerNormalization"

    def norm(self, b: Build, node: Inputs, total: Value) -> Value:
        return _layer_norm(b, total, node.need(2), node[3], node)


class ExpandSkipSimplifiedLayerNorm(_SkipNorm):
    """SkipSimplifiedLayerNormalization(x, skip, w, bias) => rms_norm(x + bias + skip, w)"""

    name, op = "expand-skip-simplified-layer-norm", MICROSOFT + "SkipSimplifiedLayerNormalization"
    bias = 3

    def norm(self, b: Build, node: Inputs, total: Value) -> Value:
        return b.rms_norm(total, node.need(2), eps=float(node.attr("epsilon", 1e-12)))


def _layer_norm(b: Build, x: Value, weight: Value, shift: Value | None, node: Inputs) -> Value:
    eps = float(node.attr("epsilon", 1e-12))
    return b.layer_norm(x, weight, *(() if shift is None else (shift,)), dims=1, eps=eps)


class ExpandEmbedLayerNorm(Fused):
    """EmbedLayerNormalization(ids, segments, ...) => layer_norm(words + positions + kinds, w, b)

    The second result counts, for each row, the tokens whose mask is 1.
    """

    name, op = "expand-embed-layer-norm", MICROSOFT + "EmbedLayerNormalization"

    def check(self, node: Inputs) -> None:
        if (node[1] is None) != (node[4] is None):
            raise node.refuse("segment ids without a table of segments, or the reverse")
        if node[7] is None:
            node.refuse_results((1, "mask_index"))

    def expand(self, b: Build, node: Inputs) -> Sequence[Value | None]:
        ids, mask = node.need(0), node[7]
        words = b.embedding(node.need(2), ids)
        where = node[8]
        where = places(b, ids, 1) if where is None else where
        total = b.add(words, b.embedding(node.need(3), where))
        segments, kinds = node[1], node[4]
        if segments is not None and kinds is not None:
            total = b.add(total, b.embedding(kinds, segments))
        normed = _layer_norm(b, total, node.need(5), node.need(6), node)
        counted = None
        if mask is not None and node.used(1):
            ones = b.cast(b.eq(mask, 1), dtype=torch.int32)
            counted = b.cast(b.sum(ones, dims=(1,)), dtype=torch.int32)
        return [normed, counted, total]


class ExpandFusedMatMul(Fused):
    """FusedMatMul(a, b) => α matmul(a or aᵀ, b or bᵀ)"""

    name, op = "expand-fused-matmul", MICROSOFT + "FusedMatMul"

    def check(self, node: Inputs) -> None:
        node.refuse_attrs(transBatchA=0, transBatchB=0)
        if min(node.rank(node.need(i)) for i in (0, 1)) < 2:
            raise node.refuse("it multiplies by a vector")

    def expand(self, b: Build, node: Inputs) -> Sequence[Value]:
        left, right = (
            _swapped(b, node, node.need(i)) if node.attr(name, 0) else node.need(i)
            for i, name in enumerate(("transA", "transB"))
        )
        product = b.matmul(left, right)
        alpha = float(node.attr("alpha", 1.0))
        return [product if alpha == 1 else b.mul(product, alpha)]


def _swapped(b: Build, node: Inputs, value: Value) -> Value:
    rank = node.rank(value)
    return b.transpose(value, perm=(*range(rank - 2), rank - 1, rank - 2))


RULES: tuple[type[Fused], ...] = (
    ExpandGelu, ExpandBiasGelu, ExpandFastGelu, ExpandQuickGelu, ExpandSimplifiedLayerNorm,
    ExpandSkipLayerNorm, ExpandSkipSimplifiedLayerNorm, ExpandEmbedLayerNorm, ExpandFusedMatMul,
)  # fmt: skip
