"""Fused ops of other tools: what they are expanded into computes what ONNX Runtime does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from graphwright.ir.canonical.families import FUSED, canonicalize
from graphwright.ir.canonical.fused import expand_fused
from graphwright.ir.canonical.unread import unread_products
from graphwright.ir.core.view import View
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from onnx import helper

from .written import in_runtime, rand, read, tensors, written

B, S, P, N, D = 7, 5, 6, 4, 16
H, T = N * D, P + S


@dataclass
class Case:
    """One node ``op`` of ``inputs`` (``None`` for an absent one): those in ``constants`` are
    stored, the others are the graph's inputs. ``expected`` are ops that it is expanded into."""

    op: str
    inputs: Sequence[np.ndarray[Any, Any] | None]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    constants: Sequence[int] = ()
    outputs: int = 1
    used: Sequence[int] = (0,)
    expected: Sequence[str] = ()
    opset: int = 20

    def model(self) -> tuple[Any, dict[str, np.ndarray[Any, Any]]]:
        names = ["" if x is None else f"i{n}" for n, x in enumerate(self.inputs)]
        named = {f"i{n}": x for n, x in enumerate(self.inputs) if x is not None}
        stored = {f"i{n}" for n in self.constants}
        outs = [f"o{n}" if n in self.used else "" for n in range(self.outputs)]
        domain = "" if self.opset > 20 or self.op.startswith("Simpl") else "com.microsoft"
        node = helper.make_node(self.op, names, outs, domain=domain, **self.attrs)
        feeds = {n: x for n, x in named.items() if n not in stored}
        constants = {n: x for n, x in named.items() if n in stored}
        # The first dimension of inputs is open, and so is any that is as long as a text.
        open_ = {B: "batch", S: "tokens", P: "past", T: "total"}
        shapes = {n: [open_.get(d, d) for d in x.shape] for n, x in feeds.items()}
        used = [out for out in outs if out]
        return written([node], feeds, constants, used, shapes, opset=self.opset), feeds


def ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.int32)


def ids(rows: int, *shape: int) -> np.ndarray[Any, Any]:
    return (np.arange(np.prod(shape)).reshape(shape) * 7 % rows).astype(np.int32)


def padded(tokens: int, *, left: bool = False) -> np.ndarray[Any, Any]:
    """Rows of 2, 3, ... tokens, as far as there are so many."""
    counts = np.minimum(np.arange(B) + 2, tokens)[:, None]
    places = np.arange(tokens)
    return (places >= tokens - counts if left else places < counts).astype(np.int32)


X, SKIP, G = rand(B, S, H), rand(B, S, H), rand(H)
W, BIAS = rand(H, 3 * H) / 4, rand(3 * H)
Q, K, V = rand(B, S, H), rand(B, S, H), rand(B, S, H)
PAST = rand(2, B, N, P, D)
KEYS, VALUES = rand(B, N, P, D), rand(B, N, P, D)
SCORES = rand(B, N, S, S)
HEADS = {"num_heads": N}

LAYERS = {
    "gelu": Case("Gelu", [X], expected=["gelu"]),
    "bias gelu": Case("BiasGelu", [X, G], constants=[1], expected=["add", "gelu"]),
    "fast gelu": Case("FastGelu", [X, G], constants=[1], expected=["add", "gelu"]),
    "fast gelu without bias": Case("FastGelu", [X], expected=["gelu"]),
    "quick gelu": Case("QuickGelu", [X], expected=["mul", "sigmoid", "mul"]),
    "quick gelu as silu": Case("QuickGelu", [X], {"alpha": 1.0}, expected=["silu"]),
    "rms norm": Case(
        "SimplifiedLayerNormalization", [X, G], {"axis": -1, "epsilon": 1e-5}, [1],
        expected=["rms_norm"],
    ),
    "skip norm": Case(
        "SkipLayerNormalization", [X, SKIP, G, G + 1], {"epsilon": 1e-5}, [2, 3], 4, (0, 3),
        ["add", "layer_norm"],
    ),
    "skip norm with a bias": Case(
        "SkipLayerNormalization", [X, SKIP, G, None, G + 1], {"epsilon": 1e-5}, [2, 4],
        expected=["add", "add", "layer_norm"],
    ),
    "skip norm that repeats rows": Case(
        "SkipLayerNormalization", [X, SKIP[:1], G, G], {"epsilon": 1e-5}, [2, 3],
    ),
    "skip rms norm": Case(
        "SkipSimplifiedLayerNormalization", [X, SKIP, G, G], {"epsilon": 1e-6}, [2, 3], 4, (0, 3),
        ["add", "add", "rms_norm"],
    ),
    "embeddings": Case(
        "EmbedLayerNormalization",
        [ids(9, B, S), ids(2, B, S), rand(9, H), rand(S, H), rand(2, H), G, G, padded(S)],
        {"epsilon": 1e-5}, [2, 3, 4, 5, 6], 3, (0, 2),
    ),
    "embeddings at given places": Case(
        "EmbedLayerNormalization",
        [ids(9, B, S), None, rand(9, H), rand(S, H), None, G, G, None, ids(S, B, S)],
        {"epsilon": 1e-5}, [2, 3, 5, 6], 2,
    ),
    "matmul": Case("FusedMatMul", [Q, K], {"transB": 1, "alpha": 0.5}, expected=["mul"]),
    "matmul, left transposed": Case("FusedMatMul", [Q, K], {"transA": 1}),
    "matmul of a constant": Case(
        "FusedMatMul", [X, rand(6, H)], {"transB": 1, "alpha": 2.0}, [1], expected=["linear"],
    ),
}  # fmt: skip

PACKED = [X, W, BIAS]
ATTENTION = {
    "free": Case("Attention", PACKED, HEADS, [1, 2], expected=["linear", "sdpa"]),
    "scaled": Case("Attention", PACKED, {**HEADS, "scale": 0.5}, [1, 2]),
    "padded right": Case("Attention", [*PACKED, padded(S)], HEADS, [1, 2]),
    "padded left": Case(
        "Attention", [*PACKED, padded(S, left=True)], {**HEADS, "mask_filter_value": -99.0},
        [1, 2],
    ),
    "by number of keys": Case(
        "Attention", [*PACKED, padded(S).sum(1, dtype=np.int32)], HEADS, [1, 2],
    ),
    "mask of queries": Case("Attention", [*PACKED, ids(2, B, S, S)], HEADS, [1, 2]),
    "one way": Case("Attention", PACKED, {**HEADS, "unidirectional": 1}, [1, 2]),
    "one way, padded": Case(
        "Attention", [*PACKED, padded(S)], {**HEADS, "unidirectional": 1}, [1, 2],
    ),
    "past": Case("Attention", [*PACKED, None, PAST], HEADS, [1, 2], 2, (0, 1)),
    "past, one way": Case(
        "Attention", [*PACKED, padded(T, left=True), PAST], {**HEADS, "unidirectional": 1},
        [1, 2], 2, (0, 1),
    ),
    "bias": Case("Attention", [*PACKED, None, None, SCORES], HEADS, [1, 2]),
    "narrow values": Case(
        "Attention", [X, rand(H, 2 * H + 16) / 4, rand(2 * H + 16)],
        {**HEADS, "qkv_hidden_sizes": [H, H, 16]}, [1, 2],
    ),
}  # fmt: skip

MULTI = {
    "free": Case("MultiHeadAttention", [Q, K, V], HEADS, expected=["sdpa"]),
    "biased": Case("MultiHeadAttention", [Q, K, V, BIAS], HEADS, [3]),
    "other keys": Case("MultiHeadAttention", [Q, rand(B, 9, H), rand(B, 9, H)], HEADS),
    "keys in heads": Case("MultiHeadAttention", [Q, rand(B, N, 9, D), rand(B, N, 9, D)], HEADS),
    "padded": Case("MultiHeadAttention", [Q, K, V, None, padded(S)], HEADS),
    "bias of the logits": Case(
        "MultiHeadAttention", [Q, K, V, None, None, SCORES[:1, :1]], {**HEADS, "scale": 0.3},
    ),
    "past": Case(
        "MultiHeadAttention", [Q, K, V, None, None, None, KEYS, VALUES],
        {**HEADS, "unidirectional": 1}, [], 3, (0, 1, 2), ["sdpa"],
    ),
    "one way": Case("MultiHeadAttention", [Q, K, V], {**HEADS, "unidirectional": 1}),
}  # fmt: skip

SHARED = {"num_heads": N, "kv_num_heads": 2}
KV = rand(B, S, 2 * D)
TABLES = [np.cos(rand(32, D // 2)), np.sin(rand(32, D // 2))]
OLD = [rand(B, 2, P, D), rand(B, 2, P, D)]


def lengths(total: int, rows: int = B, *, ragged: bool = False) -> list[np.ndarray[Any, Any]]:
    each = np.full(rows, total, np.int32)
    last = np.arange(1, B + 1) % total if ragged else each - 1
    return [last.astype(np.int32), np.array(total, np.int32)]


FIRST, NEXT = lengths(S), lengths(P + 1)
STEP = [Q[:, :1], KV[:, :1], KV[:, 1:2]]
GROUPED = {
    "prompt": Case(
        "GroupQueryAttention", [Q, KV, KV, None, None, *FIRST], SHARED, (), 3, (0, 1, 2),
    ),
    "ragged prompt": Case(
        "GroupQueryAttention", [Q, KV, KV, None, None, *lengths(S, ragged=True)], SHARED, (), 3,
    ),
    "rotary": Case(
        "GroupQueryAttention", [Q, KV, KV, None, None, *FIRST, *TABLES], {**SHARED, "do_rotary": 1},
        [7, 8], 3, (0, 1, 2), ["rope", "sdpa"],
    ),
    "neighbours": Case(
        "GroupQueryAttention", [Q, KV, KV, None, None, *FIRST, *TABLES],
        {**SHARED, "do_rotary": 1, "rotary_interleaved": 1}, [7, 8], 3,
    ),
    "packed": Case(
        "GroupQueryAttention", [rand(B, S, 2 * H), None, None, None, None, *FIRST], SHARED, (), 3,
    ),
    "step": Case(
        "GroupQueryAttention", [*STEP, *OLD, *NEXT, *TABLES], {**SHARED, "do_rotary": 1},
        [7, 8], 3, (0, 1, 2),
    ),
    "ragged step": Case(
        "GroupQueryAttention", [*STEP, *OLD, *lengths(P + 1, ragged=True), *TABLES],
        {**SHARED, "do_rotary": 1}, [7, 8], 3, (0, 1, 2),
    ),
    "chunk": Case(
        "GroupQueryAttention",
        [Q[:1], KV[:1], KV[:1], *(x[:1] for x in OLD), *lengths(T, 1), *TABLES],
        {**SHARED, "do_rotary": 1}, [7, 8], 3, (0, 1, 2),
    ),
    "window": Case(
        "GroupQueryAttention", [Q, KV, KV, None, None, *FIRST],
        {**SHARED, "local_window_size": 2}, (), 3,
    ),
    "chunk within a window": Case(
        "GroupQueryAttention",
        [Q[:1], KV[:1], KV[:1], *(x[:1] for x in OLD), *lengths(T, 1), *TABLES],
        {**SHARED, "do_rotary": 1, "local_window_size": 4}, [7, 8], 3, (0, 1, 2),
    ),
    "ragged step within a window": Case(
        "GroupQueryAttention", [*STEP, *OLD, *lengths(P + 1, ragged=True)],
        {**SHARED, "local_window_size": 3}, (), 3, (0, 1, 2),
    ),
    "capped": Case(
        "GroupQueryAttention", [*STEP, *OLD, *NEXT], {**SHARED, "softcap": 2.0, "scale": 0.5},
        (), 3, (0, 1, 2),
    ),
}  # fmt: skip

ROTARY = {
    "stream": Case("RotaryEmbedding", [X, ids(32, B, S).astype(np.int64), *TABLES], {}, [2, 3]),
    "heads": Case(
        "RotaryEmbedding", [rand(B, N, S, D), np.array([2]), *TABLES], {}, [2, 3],
        expected=["rope"],
    ),
    "neighbours": Case(
        "RotaryEmbedding", [X, ids(32, B, S).astype(np.int64), *TABLES], {"interleaved": 1}, [2, 3],
    ),
    "of opset 23": Case(
        "RotaryEmbedding", [rand(B, N, S, D), *TABLES, ids(32, B, S).astype(np.int64)], {}, [1, 2],
        opset=23, expected=["rope"],
    ),
    "of opset 23, tables of each row": Case(
        "RotaryEmbedding", [X, rand(B, S, 4), rand(B, S, 4)],
        {"num_heads": N, "rotary_embedding_dim": 8}, opset=23,
    ),
}  # fmt: skip

IN_HEADS = [rand(B, N, S, D) for _ in range(3)]
STANDARD = {
    "free": Case("Attention", IN_HEADS, opset=23, expected=["sdpa"]),
    "capped": Case("Attention", IN_HEADS, {"softcap": 2.0, "scale": 0.5}, opset=23),
    "causal": Case("Attention", IN_HEADS, {"is_causal": 1}, opset=23, expected=["sdpa"]),
    "truth values": Case("Attention", [*IN_HEADS, ids(2, S, S) == 0], opset=23),
    "mask of heads": Case("Attention", [*IN_HEADS, SCORES[0]], opset=23),
    "mask of all": Case("Attention", [*IN_HEADS, SCORES[:, :1]], opset=23),
    "stream": Case(
        "Attention", [Q, KV, KV], {"q_num_heads": N, "kv_num_heads": 2}, opset=23,
    ),
    "past": Case(
        "Attention", [*IN_HEADS, None, KEYS, VALUES], {}, [], 3, (0, 1, 2), ["sdpa"], opset=23,
    ),
}  # fmt: skip

CASES = {
    f"{group}: {name}": case
    for group, cases in (
        ("layers", LAYERS), ("Attention", ATTENTION), ("MultiHeadAttention", MULTI),
        ("GroupQueryAttention", GROUPED), ("RotaryEmbedding", ROTARY), ("opset 23", STANDARD),
    )
    for name, case in cases.items()
}  # fmt: skip


def ops(view: View) -> Counter[str]:
    return Counter(view.op(node) for node in view.nodes())


@pytest.mark.parametrize("name", CASES)
def test_what_it_is_expanded_into_computes_the_same(name: str) -> None:
    case = CASES[name]
    model, feeds = case.model()
    view = read(model)
    canonicalize(view)
    check_structure(view)
    counts = ops(view)
    assert "native" not in counts
    assert not Counter(case.expected) - counts
    actual = sweep(view, tensors(feeds))
    pairs = zip(view.output_names(), in_runtime(model, feeds), strict=True)
    for name_, expected in pairs:
        torch.testing.assert_close(actual[name_], expected, rtol=1e-4, atol=1e-5)


REFUSED = {
    "rotary": (Case("Attention", PACKED, {**HEADS, "do_rotary": 1}, [1, 2]), "do_rotary=1 is not"),
    "one buffer": (
        Case("Attention", PACKED, {**HEADS, "past_present_share_buffer": 1}, [1, 2]),
        "past_present_share_buffer=1 is not read",
    ),
    "mask of two numbers a row": (
        Case("Attention", [*PACKED, ids(S, 2 * B)], HEADS, [1, 2]),
        "is not known to be one number for a row",
    ),
    "packed": (
        Case("MultiHeadAttention", [rand(B, S, N, 3, D)], HEADS),
        "queries, keys and values in one tensor are not read",
    ),
    "cache of a window": (
        Case("GroupQueryAttention", [Q, KV, KV, None, None, *FIRST],
             {**SHARED, "local_window_size": 4, "sliding_window_cache": 1}, (), 3),
        "sliding_window_cache=1 is not read",
    ),
    "sinks": (
        Case("GroupQueryAttention", [Q, KV, KV, None, None, *FIRST, *[None] * 4, rand(N)], SHARED,
             (), 3),
        "head_sink is not read",
    ),
    "scores": (
        Case("Attention", IN_HEADS, {}, (), 4, (0, 3), opset=23),
        "its result qk_matmul_output is used",
    ),
    "causal past": (
        Case("Attention", [*IN_HEADS, None, KEYS, VALUES], {"is_causal": 1}, (), 3, opset=23),
        "is_causal beside a cache is not read",
    ),
    "norm with its variance": (
        Case("SkipLayerNormalization", [X, SKIP, G], {}, [2], 3, (0, 2)),
        "its result inv_std_var is used",
    ),
    "batch first": (
        Case("FusedMatMul", [Q, K], {"transBatchA": 1}), "transBatchA=1 is not read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_is_not_covered_stays_and_says_why(name: str) -> None:
    case, reason = REFUSED[name]
    view = read(case.model()[0])
    (refusal,) = expand_fused(view, FUSED).refusals.values()
    assert reason in str(refusal)
    assert ops(view) == {"native": 1}


@pytest.mark.parametrize("op", ["Attention", "QAttention"])
def test_a_fused_product_that_is_not_expanded_is_listed(op: str) -> None:
    case = Case(op, PACKED, {**HEADS, "do_rotary": 1}, [1, 2])
    (product,) = unread_products(read(case.model()[0]), ())
    reasons = {"Attention": "do_rotary=1 is not read",
               "QAttention": "`com.microsoft::QAttention` is not read as a linear"}  # fmt: skip
    assert (product.name, product.reason) == ("i1", reasons[op])
