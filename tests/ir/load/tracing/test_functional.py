"""Programs become functional: without a second trace where what is written to has known names, by
the exporter elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphwright.ir.fx.view import FxView
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep
from torch import nn
from torch.export import ExportedProgram


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = nn.functional.dropout(x.to(torch.float32), 0.5, training=self.training)
        flat = halves.transpose(1, 2).contiguous().flatten(1)
        return flat.to(torch.float64) + flat[:1].type_as(flat).expand_as(flat).detach()


class Joined(nn.Module):
    """Sizes that are none of an input's: the rows that are left, and products."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tail = torch.cat([x, x], 0)[1:]
        flat = tail.flatten(0, 1).flatten()
        return flat + tail.flatten().view_as(flat) + tail.transpose(0, 1).flatten(-3)


class Writing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        out[:, 0] = x[:, 1]
        return out.mul_(2.0) + x


class Unseen(nn.Module):
    """Writes to what was just made, one behind the other, and a value from before the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ x.transpose(1, 2)
        least = scores.amin(-1, keepdim=True)
        scores += least
        best, places = torch.topk(scores, 2)
        best /= best.sum(-1, keepdim=True)
        marks = torch.zeros_like(scores).scatter_(-1, places, 1.0).masked_fill_(least > 0, -1.0)
        return scores.mul_(2.0).relu_() + marks * best[..., :1] + least


class Seen(nn.Module):
    """A write that a view of before, and one that an input's other name, sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twice = x * 2
        row = twice[:, 0]
        twice += 1
        other = (x + 1).reshape(x.shape[0], -1)
        other *= 3
        return row.sum() + twice + other[:, :1, None]


class Dropped(nn.Module):
    """A write to what dropout returns, which in evaluation is its argument."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twice = x * 2
        dropped = nn.functional.dropout(twice, 0.5, training=self.training)
        dropped[:, 0] = 1
        return twice + 1


class Filled(nn.Module):
    """A tensor made without numbers, of which two parts are written, the last one broadcast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = x.new_empty(x.shape[0], 4, 8)
        both[..., 6:] = x[:, :1, :2].to(torch.float64)
        both[..., :6] = x
        return both.mul(2.0)


class Through(nn.Module):
    """Writes through views of views and pieces, each seen by others of before and behind it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x * 2
        turned, column = made.permute(2, 0, 1), made[:, :, 1:2].squeeze(2)
        left, right = made.split([2, 4], -1)
        first, *_ = made.unbind(1)
        before = column + 0
        turned[2:, :, 1] += 1
        made.view(-1, 2, 12)[:, 1].unsqueeze(0).mul_(first.sum())
        right.copy_(left[..., :1])
        first.transpose(0, 1)[1:].zero_()
        return made + before.sum() + column[..., None] * left.sum() - turned.amax() + right.amax()


class Kept(nn.Module):
    """What is copied stays what it was; what it was copied of is written to through a view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled, kept = x * 2, torch.zeros_like(x)
        kept.copy_(doubled)
        doubled[:, :1].add_(1)
        return torch.cat([kept, doubled], 1)


class Nothing(nn.Module):
    """A slice of no columns is written to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x * 2
        made[:, :0] += 1
        return made


class Wider(nn.Module):
    """``half`` stays half where what is added is wider."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.to(torch.float16) * 2
        half += x
        return half


class Chunked(nn.Module):
    """Views that have other names here."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = x.chunk(3, -1)
        d, e = a.chunk(2, 1)
        return (a * b * c)[0].T + torch.broadcast_to((d * e)[0, :1].T, (2, 4))


class Normed(nn.Module):
    """Views by other names of permutations and slices, and what vision models write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        y += x
        y = nn.functional.hardtanh(y.relu_(), 0.0, 6.0, inplace=True)
        first, second = y.movedim(1, -1).unflatten(1, (2, -1)).split([1, 1], 1)
        return (first * second.swapaxes(2, 3).mT.narrow(1, 0, 1)).relu()


class ChunkedRows(nn.Module):
    """How many pieces there are is up to the number of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[1:].chunk(1)[0] * 2


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each program that the exporter decomposes."""
    calls: list[int] = []
    inner = ExportedProgram.run_decompositions

    def counting(self: ExportedProgram, *arguments: Any) -> ExportedProgram:
        calls.append(1)
        program: ExportedProgram = inner(self, *arguments)
        return program

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counting)
    return calls


@pytest.mark.parametrize(
    ("module", "times"),
    [(Plain(), 0), (Joined(), 0), (Unseen(), 0), (Chunked(), 0), (Normed(), 0),
     (Filled(), 0), (Through(), 0), (Writing(), 0), (Dropped(), 0), (Kept(), 0), (Nothing(), 0),
     (Seen(), 1), (Wider(), 1), (ChunkedRows(), 1)],
)  # fmt: skip
def test_a_program_is_decomposed_where_it_must_be(
    module: nn.Module, times: int, decomposed: list[int]
) -> None:
    view = trace(module, torch.randn(3, 4, 6))
    assert len(decomposed) == times
    for rows in (2, 5):
        x = torch.randn(rows, 4, 6)
        (actual,) = sweep(view, dict(zip(view.input_names(), [x], strict=True))).values()
        assert torch.equal(actual, module.eval()(x)) and actual.dtype == module(x).dtype


def test_parts_that_fill_a_tensor_are_joined() -> None:
    view = trace(Filled(), torch.randn(3, 4, 6))
    natives = {view.native_op(node) for node in view.nodes()}
    assert "aten.cat.default" in natives
    assert not natives & {"aten.new_empty.default", "aten.slice_scatter.default"}


def test_no_op_that_may_copy_is_left(decomposed: list[int]) -> None:
    view = trace(Plain(), torch.randn(3, 4, 6))
    assert isinstance(view, FxView) and not decomposed
    natives = {view.native_op(node) for node in view.nodes()}
    assert "aten._to_copy.default" in natives
    assert not natives & {"aten.to.dtype", "aten.type_as.default", "aten.flatten.using_ints"}
