"""What users are told of an error, and of the weights that stayed whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from graphwright.tools.report.manifest import CostRow, CostsEntry, Manifest
from graphwright.tools.report.meaning import kept, meaning

Make = Callable[..., Manifest]
TABLES = 4 * 384 * (30522 + 512)


@pytest.mark.parametrize(
    ("rel_l2", "data", "message"),
    [
        (2e-6, "random inputs", "rel. L2 is what rounding leaves"),
        (0.02, "samples of zoo:minilm", "small: of the zoo's models 98 %"),
        (0.1, "random inputs", "and random inputs are none that it was made for: --eval judges"),
        (0.2, "samples", "large"),
        (0.9, "samples", "very large"),
    ],
)
def test_an_error_is_small_or_large(
    rel_l2: float, data: str, message: str, make_manifest: Make
) -> None:
    manifest = make_manifest("quantize")
    manifest.verification.data = data
    manifest.verification.outputs[0].rel_l2 = rel_l2
    assert message in meaning(manifest)
    assert ("eval --tasks" in meaning(manifest)) == (rel_l2 > 1e-4)
    assert ("random" in meaning(manifest)) == (data == "random inputs" and rel_l2 > 1e-4)


def with_costs(manifest: Manifest) -> Manifest:
    step = manifest.passes[-1]
    weights = (manifest.passes[0].bytes_before, step.bytes_after)
    rows = [
        CostRow(name=name, macs=None, weight_bytes=count, kv_bytes=0, tokens=[])
        for name, count in zip(("source", "1 quantize"), weights, strict=True)
    ]
    manifest.costs = CostsEntry(convention="", sizes={}, rows=rows)
    return manifest


def test_what_was_kept_and_what_would_shrink_it(make_manifest: Make) -> None:
    manifest = with_costs(make_manifest("quantize"))
    sizes = kept(manifest)
    assert sizes is not None and sizes.bytes_before == sizes.bytes_after
    assert TABLES <= sizes.bytes_before < TABLES + 10_000
    assert sizes.advice.startswith(
        "47.7 MB of what was kept are tables of embeddings: quantize{emb"
    )
    assert manifest.graph_after is not None
    manifest.graph_after.children[0].ops = {"embedding_nbit": 3}
    sizes = kept(manifest)
    assert sizes is not None and sizes.advice == ""


def test_without_costs_nothing_is_said_of_what_was_kept(make_manifest: Make) -> None:
    assert kept(make_manifest("quantize")) is None
