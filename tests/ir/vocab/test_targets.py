"""The table of targets: its rows name ops and forms that there are, and give their reasons."""

from __future__ import annotations

import pytest
from graphwright.backends.onnx.lowering import EDITS, FORMS
from graphwright.ir.core.errors import BadInput
from graphwright.ir.ops import OWN_OPS
from graphwright.ir.vocab import VOCABULARY
from graphwright.ir.vocab.targets import (
    CPU,
    CUDA,
    DEFAULTS,
    GENAI,
    PORTABLE,
    TARGETS,
    Target,
    find_target,
)

USUAL = {
    "rms_norm": "x / sqrt(mean(x²) + eps) · w", "linear_nbit": "matmul-nbits",
    "embedding_nbit": "gather-block-quantized",
}  # fmt: skip
"""What ops are written as where no form is asked for, as rows may say it."""


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_rows_name_what_there_is(target: Target) -> None:
    # Of an op, forms in the order in which they are tried, and what joins several of it.
    assert len({(row.op, row.form) for row in target.rows}) == len(target.rows)
    for row in target.rows:
        native = VOCABULARY[row.op].onnx
        own = OWN_OPS[row.op].forms if row.op in OWN_OPS else native.forms if native else {}
        assert row.op in VOCABULARY and row.why
        assert row.form in {*own, *FORMS, *EDITS, USUAL.get(row.op)}


@pytest.mark.parametrize(
    ("target", "bits", "block", "level"),
    [
        (CPU, 4, 16, 4), (CPU, 8, 256, 4), (CPU, 3, 256, 0), (CPU, 2, 32, 0), (CPU, 2, 64, 4),
        (PORTABLE, 4, 32, 4), (PORTABLE, 3, 32, 0), (CUDA, 8, 32, 0), (GENAI, 4, 32, 4),
    ],
)  # fmt: skip
def test_levels_are_by_bits_and_block(target: Target, bits: int, block: int, level: int) -> None:
    assert target.level(bits, block) == level


def test_a_target_by_name() -> None:
    assert find_target("portable") is PORTABLE and DEFAULTS["cpu"] is CPU
    with pytest.raises(BadInput, match="no target 'portabel'; did you mean portable"):
        find_target("portabel")
