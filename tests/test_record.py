"""The record is replayed on a few cheap cases; the command replays all of it.

``python -m graphwright.tools.bench.record``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graphwright.tools.bench.record import FOLDER, compare, recorded, threads
from graphwright.tools.bench.record_cases import FX, ONNX, ONNX_CACHE, Case, Subject, all_cases
from graphwright.tools.bench.record_facts import (
    REL_L2,
    differences,
    distance,
    measure,
    read_rows,
    summary,
    write_rows,
)

BOTH = ("w4", "quantize{bits=3 group=32},eora{rank=8}")
FX_ALONE = (
    "w8", "easyquant{bits=4}", "quantize{bits=2 group=32}", "drop-blocks", "fastv{keep=25%}",
)  # fmt: skip
REPLAYED = [
    *(Case("tiny-vit", FX, recipe) for recipe in BOTH + FX_ALONE),
    *(Case("tiny-vit", ONNX, recipe) for recipe in BOTH),
    Case("tiny-llava", FX, "fastv{keep=25%}"),
    Case("tiny-llava", ONNX_CACHE, "fastv{keep=25%}"),
    Case("tiny-llava", ONNX_CACHE, "path{blocks=0-2,2,4-5}"),
]
"""Weights, blocks and tokens, each kind of graph, a refusal, a cache. Not the rows that differ
between one thread and two: see ``record_facts.FITTED``."""


@pytest.fixture(scope="module")
def subjects() -> Iterator[Callable[[str], Subject]]:
    cache: dict[str, Subject] = {}
    with threads(1):
        yield lambda name: cache.setdefault(name, Subject(name, FOLDER))


@pytest.mark.slow
@pytest.mark.parametrize("case", REPLAYED, ids=str)
def test_what_was_recorded_is_made(case: Case, subjects: Callable[[str], Subject]) -> None:
    lines = compare(case, recorded(case.model).get(case.row), measure(subjects(case.model), case))
    assert not lines, "\n".join([f"{case} differs from tests/record:", *lines])


def test_every_case_is_recorded() -> None:
    rows = {case.model: recorded(case.model) for case in all_cases()}
    assert {model: sorted(names) for model, names in rows.items()} == {
        model: sorted(c.row for c in all_cases() if c.model == model) for model in rows
    }


# --- a difference is seen, and said --------------------------------------------------------------


CODED, FITTED = "q 4x4 | quantize 64>12", "head 9x4 | eora 80>90"
ROW: dict[str, Any] = {
    "sites": {
        CODED: {"layers.0.q": "0123456789ab", "layers.1.q": "a123456789ab"},
        FITTED: {"head": "b123456789ab~0.25"},
    },
    "kept": "3 c123456789ab",
    "outputs": {"logits": [2.0, 1.0, -1.0, 0.5, 3.0]},
}


def changed(edit: Callable[[dict[str, Any]], object]) -> list[str]:
    row = copy.deepcopy(ROW)
    edit(row)
    return differences(ROW, row)


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        (lambda r: r["sites"][CODED].update({"layers.1.q": "ffff"}),
         "layers.1.q: stored weights were a123456789ab, are ffff"),
        (lambda r: r["sites"][FITTED].update(head="b123456789ab~0.2501"),
         "head: stored weights were b123456789ab~0.25, are b123456789ab~0.2501"),
        (lambda r: r["sites"].pop(FITTED), "head: a site no longer"),
        (lambda r: r["sites"].update({"v 1x1 | hqq 4>2": {"v": ""}}), "v: not a site before"),
        (lambda r: r["sites"].update({"q 4x4 | quantize 64>13": r["sites"].pop(CODED)}),
         "\n".join(f"layers.{i}.q: was '{CODED}', is 'q 4x4 | quantize 64>13'" for i in (0, 1))),
        (lambda r: r.update(kept="2 d123456789ab"),
         "the model's own weights: were 3 c123456789ab, are 2 d123456789ab"),
        (lambda r: r["outputs"].update(logits=[2.0, 1.00001, -1.0, 0.5, 3.0]),
         "outputs: logits is 2.5e-06 (relative L2) from the record, more than 1e-06"),
        (lambda r: r["outputs"].update(more=[0.0] * 5),
         "outputs: were ['logits'], are ['logits', 'more']"),
        (lambda r: r.update(runtime={"logits": [2.0, 1.0, -1.0, 0.5, 3.0]}),
         "runtime: were [], are ['logits']"),
    ],
)  # fmt: skip
def test_a_difference_is_told(edit: Callable[[dict[str, Any]], object], lines: str) -> None:
    assert "\n".join(changed(edit)) == lines


def test_equal_rows_and_refusals() -> None:
    assert differences(ROW, copy.deepcopy(ROW)) == []
    assert changed(lambda r: r["outputs"].update(logits=[2.0, 1.000001, -1.0, 0.5, 3.0])) == []
    refused = {"refused": "BadInput"}
    assert differences(refused, refused) == []
    assert differences(refused, ROW) == ["was BadInput, is done"]
    assert differences(refused, {"refused": "Missing"}) == ["was BadInput, is Missing"]


@pytest.mark.parametrize("where", ["one", "all"])
def test_a_summary_sees_a_difference_wherever_it_is(where: str) -> None:
    values = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gap = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if where == "one":
        gap[:5000], gap[5001:] = 0, 0
    gap *= 3 * REL_L2 * values.norm() / gap.norm()
    size = distance(summary(values), summary(values + gap))
    assert REL_L2 < size < 9 * REL_L2
    assert distance(summary(values), summary(values * float("nan"))) == float("inf")


def test_rows_come_back_from_a_file() -> None:
    rows = {"fx/a": ROW, "onnx/a": ROW, "fx/b": {"refused": "BadInput"}}
    assert read_rows(write_rows(rows)) == rows
