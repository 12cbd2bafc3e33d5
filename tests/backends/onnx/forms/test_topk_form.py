"""A choice among the rows of pictures, of which a step may have none."""

from __future__ import annotations

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import lowered
from torch import Tensor
from torch.export import Dim

WORDS = torch.zeros(2, 5, dtype=torch.int64)


class Chosen(torch.nn.Module):
    def forward(self, words: Tensor, pictures: Tensor) -> tuple[Tensor, ...]:
        best = pictures.topk(3, dim=1)
        return words + 1, best.values, best.indices


class Best(torch.nn.Module):
    def forward(self, words: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return words + 1, pictures.topk(1, dim=0).values


class Ranked(torch.nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.topk(3, dim=1).indices


class Sized(torch.nn.Module):
    """As vision models of several crops: a height and a width of each picture."""

    def forward(self, input_ids: Tensor, pictures: Tensor, image_sizes: Tensor) -> Tensor:
        return input_ids.sum() + (pictures + image_sizes.sum(1, True)).topk(3, dim=1).values


def test_sizes_of_pictures_are_no_text() -> None:
    images = {0: Dim("images")}
    named = {"input_ids": WORDS, "pictures": torch.randn(3, 7)}
    named["image_sizes"] = torch.ones(3, 2, dtype=torch.int64)
    sizes = {"input_ids": {0: Dim("rows")}, "pictures": images, "image_sizes": images}
    onnx = lowered(gw.trace(Sized(), (), named, dynamic_shapes=sizes))
    assert "Concat" in {onnx.native_op(n) for n in onnx.nodes()}


@pytest.mark.parametrize("count", [0, 4])
def test_a_row_of_zeros_is_chosen_from_and_left_out(count: int) -> None:
    onnx = lowered(view := traced(Chosen()))
    (padded,) = (n for n in onnx.nodes() if onnx.native_op(n) == "Concat")
    (chosen,) = (n for n in onnx.nodes() if onnx.native_op(n) == "TopK")
    assert onnx.producer(onnx.tensor(chosen)) is padded
    pictures = torch.randn(count, 7)
    given = gw.compile(view, backend="onnxruntime")(words=WORDS, pictures=pictures)
    for got, want in zip(given.values(), Chosen()(WORDS, pictures), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("module", [Best(), Ranked()])
def test_neither_along_the_pictures_nor_without_a_text(module: torch.nn.Module) -> None:
    """Along the pictures there is one row whatever their number; a batch of them is never empty."""
    onnx = lowered(traced(module))
    assert "Concat" not in {onnx.native_op(n) for n in onnx.nodes()}


def traced(module: torch.nn.Module) -> gw.View:
    named = {"words": WORDS, "pictures": torch.randn(3, 7)}
    if isinstance(module, Ranked):
        del named["words"]
    sizes = {n: {0: Dim("rows" if n == "words" else "images")} for n in named}
    return gw.trace(module, (), named, dynamic_shapes=sizes)
