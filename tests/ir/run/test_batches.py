"""Batches that a person gives: every way in which they do not fit, with its reason."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.batches import (
    as_batches,
    batches_sha256,
    check_batches,
    count_samples,
    count_tokens,
)

from ... import models as small_models

VOCAB = 97
Batch = dict[str, torch.Tensor]


@cache
def raised_graph(name: str, kind: str) -> View:
    small = small_models.BUILDERS[name]()
    return small_models.raised(small)[kind]


def text(rows: int = 3, length: int = 5) -> Batch:
    ids = torch.arange(rows * length).reshape(rows, length) % VOCAB
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_mask": None}, "batch 2 of 2: attention_mask is missing; the graph takes"),
        ({"pixel_values": torch.ones(3, 3)}, "pixel_values is not an input of the graph"),
        ({"input_ids": torch.ones(3, 5)}, r"input_ids: expected i64\[.*\], got f32\[3, 5\]"),
        ({"input_ids": torch.ones(5, dtype=torch.int64)}, r"expected i64\[.*, .*\], got i64\[5\]"),
        ({"input_ids": torch.ones(3, 0, dtype=torch.int64)}, r"input_ids: empty: got i64\[3, 0\]"),
        ({"attention_mask": torch.ones(3, 4, dtype=torch.int64)}, r"=5 in this batch, got .*3, 4"),
        ({"input_ids": torch.full((3, 5), 97)}, "the id 97, and the model knows ids 0 to 96"),
        ({"input_ids": torch.full((3, 5), -1)}, "the id -1, and the model knows"),
    ],
)
def test_each_misfit_is_told_with_its_place(
    kind: str, change: dict[str, torch.Tensor | None], reason: str
) -> None:
    wrong = {n: t for n, t in {**text(), **change}.items() if t is not None}
    view = raised_graph("llama", kind)
    check_batches(view, [text(), text(1, 1)])
    with pytest.raises(BadInput, match=reason):
        check_batches(view, [text(), wrong])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_counted(bad: float) -> None:
    pixels = torch.zeros(2, 3, 16, 16)
    pixels[1, 2, 3, 4:6] = bad
    with pytest.raises(BadInput, match="data, batch 1 of 1: pixel_values: 2 of 1536 numbers are"):
        check_batches(raised_graph("vit", "fx"), [{"pixel_values": pixels}], "data")


def test_a_fixed_dimension_is_kept() -> None:
    with pytest.raises(BadInput, match=r"expected f32\[.*, 3, 16, 16\], got f32\[2, 3, 24, 16\]"):
        check_batches(raised_graph("vit", "onnx"), [{"pixel_values": torch.zeros(2, 3, 24, 16)}])


def test_no_batch_at_all() -> None:
    with pytest.raises(BadInput, match="calibration data: empty"):
        check_batches(raised_graph("vit", "fx"), [])


def test_the_hash_depends_on_every_byte_name_dtype_shape_and_batch() -> None:
    base = batches_sha256([text()])
    assert base == batches_sha256([dict(reversed(text().items()))])
    changed = text()
    changed["input_ids"][2, 4] += 1
    others = [
        [changed], [text(), text()], [text(5, 3)],
        [{n: t.to(torch.int32) for n, t in text().items()}],
        [{"a" + n: t for n, t in text().items()}],
    ]  # fmt: skip
    assert len({base, *map(batches_sha256, others)}) == 6


def test_counts() -> None:
    masked = text()
    masked["attention_mask"][1, 3:] = 0
    assert count_samples([masked, text(1, 9)]) == 4
    assert count_tokens([masked, text(1, 9)]) == 15 - 2 + 9
    assert count_tokens([{"input_ids": text()["input_ids"]}]) == 15
    assert count_tokens([{"pixel_values": torch.ones(2, 3)}]) is None


@pytest.mark.parametrize(
    "data",
    [
        {"x": np.arange(2)}, [{"x": torch.arange(2)}], ({"x": torch.arange(2)} for _ in range(1)),
        torch.utils.data.DataLoader([{"x": 0}, {"x": 1}], batch_size=2),
    ],
)  # fmt: skip
def test_batches_come_in_what_people_keep_them_in(data: Any) -> None:
    (batch,) = as_batches(data, "samples")
    assert torch.equal(batch["x"], torch.arange(2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(2), "samples is a Tensor, and must be a list of batches, each a dict of ten"),
        (3, "samples is a int, and must be a list"), ("a.txt", "samples is a str, and must be"),
        ([torch.ones(2)], "samples, batch 1 is a Tensor; data are batches, each a dict"),
        ([{"x": 3}], "samples, batch 1: x is a int, and must be a tensor"),
    ],
)  # fmt: skip
def test_what_are_no_batches(data: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        as_batches(data, "samples")
