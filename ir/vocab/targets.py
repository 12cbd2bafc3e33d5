"""Targets: what an artifact is written for, and which form of each op that takes or likes.

A row holds an op, the name of its form, and the reason or the measurement. Lowering is rules over
these rows (``backends.onnx.lowering``); nothing else asks which target it is. Forms are declared
with the ops (``ops.base``, ``OwnOp.forms``) or as rules (``backends.onnx.lowering.FORMS``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..core.errors import BadInput, near_misses


@dataclass(frozen=True)
class Row:
    """The form in which a target gets an op."""

    op: str
    form: str
    why: str


@dataclass(frozen=True)
class Target:
    """What runs the artifact."""

    name: str
    summary: str
    rows: tuple[Row, ...]
    levels: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """``accuracy_level`` of a linear by its bits and least block, where its pass leaves it open."""
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.float16})
    """The floats that it computes in; others become float32."""
    prefers: torch.dtype | None = None
    """The float in which a float32 source is loaded for it, where nobody names one."""
    providers: tuple[str, ...] = ()
    """What onnxruntime-genai is to start beside the CPU's provider."""
    opset: int = 18
    """The least that its forms need."""

    def form(self, op: str) -> str | None:
        """The name of an op's form; ``None`` where it has the usual one."""
        return next((row.form for row in self.rows if row.op == op), None)

    def level(self, bits: int, block: int) -> int:
        """``accuracy_level`` of a linear of these bits in blocks of so many columns."""
        fitting = [least for b, least in self.levels if b == bits and least <= block]
        return self.levels[bits, max(fitting)] if fitting else 0


_DIVISION = Row(
    "rms_norm", "x / sqrt(mean(x²) + eps) · w",
    "standard ops that ONNX Runtime and OpenVINO make one node of: a row of 896 takes 4.7 us "
    "so, and 6.4 us with a reciprocal, which ONNX Runtime 1.31 leaves as seven nodes",
)  # fmt: skip
_SHARED = Row(
    "sdpa", "shared-keys",
    "one product for the query heads that share keys, none of which is repeated: 81 us at 1,024 "
    "keys and 239 us at 4,000, against 253 and 1,159 us with Expand (ONNX Runtime 1.31, one core)",
)  # fmt: skip
_ONE_NODE = Row(
    "sdpa", "attention",
    "without a cache, opset 23's node, around which no head is transposed: 128 tokens of 12 heads "
    "of width 32 take 355 us where products take 438, 197 of width 64 1.49 ms for 1.80 (ONNX "
    "Runtime 1.31, one core)",
)  # fmt: skip
_ROUNDS = (
    "activations are rounded to 8 bits in each block and multiplied as integers: 0.081 ms a row of "
    "2048 x 4096 at 4 bits, against 0.323 ms in floats (ONNX Runtime 1.31, one AVX-512 core)"
)

CPU = Target(
    "cpu", "ONNX Runtime on a CPU",
    (
        _DIVISION,
        _ONE_NODE,
        _SHARED,
        Row("layer_norm", "sum-apart", "with the sum before it in one node, as ONNX Runtime "
            "makes it, 128 rows of 384 take 190 us, apart 35: MiniLM's 128 tokens 18.6 or 16.2 ms "
            "(1.31, one core)"),
        Row("linear_w8a8", "matmul-integer-to-float", "the runtime's own nodes for rounding and "
            "for what follows the sums: 0.295 ms for 128 rows of 384 x 1536, against 0.336"),
        Row("linear_w8a8_static", "matmul-integer-to-float", "the bias in the same node, and "
            "integers where the runtime leaves QDQ: before an activation, or where x is a matrix"),
        Row("rope", "rotary-embedding", "one node in the place of seven: a token of 24 layers of "
            "width 896 takes 14.1 ms, and 16.6 ms with them (4 bits, ONNX Runtime 1.31, one core)"),
        Row("linear_nbit", "matmul-nbits", _ROUNDS),
        Row("linear_nbit", "one-product", "queries, keys and values, or both of a "
            "gate: 22 us less for each product that is none of its own, activations being rounded "
            "once: 0.6 of the 14.1 ms of that token"),
        Row("embedding_nbit", "gather-block-quantized", "reads the rows' bytes where they lie, "
            "and a tied head multiplies by the same ones"),
    ),
    # 2 bits: 0.076 ms in groups of 64, but 32 rows take 11.8 ms in groups of 32, where 4 bits take
    # 1.9 ms. 3 bits are widened when the model loads, which such a node does not allow.
    levels={(4, 16): 4, (8, 16): 4, (2, 64): 4},
)  # fmt: skip

PORTABLE = Target(
    "portable", "standard ONNX ops alone, for any runtime",
    (
        _DIVISION,
        _SHARED,
        Row("linear", "transpose", "FusedMatMul, which takes a tied head's table as it is stored, "
            "is ONNX Runtime's own: the table is transposed when the model is loaded"),
        Row("linear_nbit", "dequantize-linear", "blocks of INT4 and INT8 that ONNX Runtime, "
            "OpenVINO and TensorRT read; ONNX Runtime makes its own node of them, which rounds "
            "activations to 8 bits"),
        Row("embedding_nbit", "dequantize-linear", "GatherBlockQuantized is ONNX Runtime's own"),
        Row("linear_bnb4", "table-of-pairs", "MatMulBnb4 is ONNX Runtime's own, and OpenVINO does "
            "not take it"),
        Row("linear_float8", "dequantize-linear", "OpenVINO and TensorRT know it"),
    ),
    levels={(2, 16): 4, (4, 16): 4, (8, 16): 4},
    opset=21,
)  # fmt: skip

CUDA = Target(
    "cuda", "ONNX Runtime on a CUDA device: half floats, attention and norms as one node each",
    (
        Row("rms_norm", "skip-simplified-layer-norm", "one kernel that reads the stream and the "
            "branch once and writes their sum and its norm; the CUDA provider of 1.31 has it for "
            "f32, f16 and bf16"),
        Row("sdpa", "group-query", "turns queries and keys, writes them into the cache and attends "
            "in one kernel, with queries, keys and values from one product; opset 23's Attention "
            "copies the past in each step there (34 to 111 us a token more, onnxruntime #28352)"),
        Row("linear", "fused-matmul", "takes a tied head's table as it is stored, in half floats "
            "too: transposed, it would lie in the device's memory twice"),
        Row("linear_nbit", "matmul-nbits-half", "the provider takes activations and scales in f16 "
            "and bf16 as they are; integers do not pay there, so that no activation is rounded"),
        Row("embedding_nbit", "gather-block-quantized", "reads the rows' bytes where they lie"),
    ),
    dtypes=frozenset({torch.float32, torch.float16, torch.bfloat16}),
    prefers=torch.float16,
    providers=("cuda",),
)  # fmt: skip

GENAI = Target(
    "genai", "onnxruntime-genai on a CPU: attention as one node that keeps its cache in place",
    (
        *(row for row in CPU.rows if row.op != "sdpa"),
        Row("sdpa", "group-query-float", "keys and values are written into one buffer, which no "
            "step copies, and a layer has 16 nodes less"),
    ),
    levels=CPU.levels,
)  # fmt: skip

TARGETS = {target.name: target for target in (CPU, GENAI, PORTABLE, CUDA)}


DEFAULTS = {"cpu": CPU}
"""The target where none is named, by the device that the artifact is checked on."""


def find_target(name: str) -> Target:
    """A target by name. Raises ``BadInput``."""
    if name not in TARGETS:
        raise BadInput(f"there is no target {name!r}; {near_misses(name, list(TARGETS))}")
    return TARGETS[name]
