"""Random modules of views, writes and plain ops: a trace of them computes what torch does.

To the bit. Seeds beyond these find what the exporter's decompositions round otherwise (a write
through ``expand``) and what torch itself leaves open (a write to what the same op reads).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep
from torch import Tensor, nn

F = nn.functional
Op = Callable[[Tensor, Tensor, int], Tensor]

VIEWS: tuple[Op, ...] = (
    lambda a, b, n: a.transpose(1, -1),
    lambda a, b, n: a[:, n % a.shape[1]],
    lambda a, b, n: a[:, : 1 + n],
    lambda a, b, n: a.narrow(-1, 0, 2),
    lambda a, b, n: a.unsqueeze(1 + n % 2),
    lambda a, b, n: a.squeeze(1),
    lambda a, b, n: a.flatten(1),
    lambda a, b, n: a.reshape(a.shape[0], -1),
    lambda a, b, n: a.view(a.shape[0], -1, 2),
    lambda a, b, n: a.unflatten(-1, (2, -1)),
    lambda a, b, n: a.chunk(2, -1)[n % 2],
    lambda a, b, n: a.split(2, -1)[n % 2],
    lambda a, b, n: a.unbind(1)[0],
    lambda a, b, n: a.movedim(1, -1),
    lambda a, b, n: a.swapaxes(1, -1),
    lambda a, b, n: a.split([1, 1, 2], 1)[n % 3],
    lambda a, b, n: a.expand_as(b),
    lambda a, b, n: a.view_as(b),
    lambda a, b, n: torch.broadcast_to(a, b.shape),
    lambda a, b, n: a[0].T,
    lambda a, b, n: a.mT,
    lambda a, b, n: a.contiguous(),
    lambda a, b, n: a.type_as(b),
    lambda a, b, n: a.to(torch.float32),
    lambda a, b, n: a.float(),
    lambda a, b, n: a.detach(),
    lambda a, b, n: a.data,
    lambda a, b, n: F.dropout(a, 0.5, training=False),
    lambda a, b, n: a.diagonal(dim1=1, dim2=-1),
    lambda a, b, n: a[..., n % 2 :: 2],
    lambda a, b, n: a[:, -1 - n :],
    lambda a, b, n: a[a.shape[0] // 2 :],
    lambda a, b, n: a.view(-1),
    lambda a, b, n: a.view_as(a),
    lambda a, b, n: a.unsqueeze(2).expand(-1, -1, 2, -1),
    lambda a, b, n: a.unbind(-1)[n],
    lambda a, b, n: a.tensor_split(2, 1)[n % 2],
    lambda a, b, n: a.permute(-1, *range(a.dim() - 1)),
)
PLAIN: tuple[Op, ...] = (
    lambda a, b, n: a + b,
    lambda a, b, n: a * 0.5,
    lambda a, b, n: a - n,
    lambda a, b, n: a.clone(),
    lambda a, b, n: a.relu(),
    lambda a, b, n: a @ b.transpose(-1, -2) / 8,
    lambda a, b, n: torch.einsum("bij,bkj->bik", a, b) / 8,
    lambda a, b, n: a.softmax(-1),
    lambda a, b, n: F.layer_norm(a, a.shape[-1:]),
    lambda a, b, n: F.batch_norm(a, torch.zeros(4), torch.ones(4)),
    lambda a, b, n: torch.cat([a, b], 1),
    lambda a, b, n: torch.topk(a, 2)[0],
    lambda a, b, n: a.sort(-1)[n % 2],
    lambda a, b, n: a.amax(-1, keepdim=True),
    lambda a, b, n: a.sum(1),
    lambda a, b, n: torch.where(a > b, a, b),
    lambda a, b, n: torch.zeros_like(a),
    lambda a, b, n: torch.ones(a.shape[0], 4, 6),
    lambda a, b, n: a.to((torch.float64, torch.float16, torch.int64)[n % 3]),
    lambda a, b, n: a.roll(1, 1),
    lambda a, b, n: F.pad(a, (0, n % 2)),
    lambda a, b, n: _halves(torch.empty_like(a), b, n),
    lambda a, b, n: _halves(a.new_empty(a.shape), b, n + 1),
)
WRITES: tuple[Op, ...] = (
    lambda a, b, n: a.add_(b),
    lambda a, b, n: a.add_(b, alpha=2),
    lambda a, b, n: a.sub_(n),
    lambda a, b, n: a.mul_(b),
    lambda a, b, n: a.mul_(a),
    lambda a, b, n: a.div_(4),
    lambda a, b, n: a.add_(a.shape[0]),
    lambda a, b, n: a.relu_(),
    lambda a, b, n: F.silu(a, inplace=True),
    lambda a, b, n: F.hardtanh(a, 0.0, 6.0, inplace=True),
    lambda a, b, n: F.leaky_relu(a, 0.1, inplace=True),
    lambda a, b, n: a.clamp_(-1, n),
    lambda a, b, n: a.masked_fill_(b > 0, 1.5),
    lambda a, b, n: a.masked_fill_(a > 0, b.amin()),
    lambda a, b, n: a.scatter_(-1, (b > 0).long(), 0.5),
    lambda a, b, n: a.scatter_(-1, (b > 0).long(), b),
    lambda a, b, n: a.index_put_((torch.arange(2),), b[:1]),
    lambda a, b, n: a.index_put_((a > 1,), torch.tensor(0.25)),
    lambda a, b, n: a.copy_(b),
    lambda a, b, n: a.zero_(),
    lambda a, b, n: a[:, 0].add_(1),
    lambda a, b, n: a[:, :1].copy_(b[:, :1]),
    lambda a, b, n: torch.add(a, b, out=a),
    lambda a, b, n: a.unsqueeze_(1),
    lambda a, b, n: a.t_() if a.dim() == 2 else a.clamp_(-1, 1),
    lambda a, b, n: _halves(a, b, n),
    lambda a, b, n: a[:, : n - 1].add_(1),
    lambda a, b, n: a[..., ::2].copy_(b[..., 1::2]),
    lambda a, b, n: a[: a.shape[0] // 2].mul_(2),
    lambda a, b, n: a[a.shape[0] // 2 :].copy_(b[:1]),
    lambda a, b, n: a.copy_(b[:1, :, :1]),
    lambda a, b, n: a[:, n].copy_(b[0, 0] > 0),
    lambda a, b, n: a[:, n].index_put_((torch.arange(2),), b[:2, n]),
    lambda a, b, n: a.transpose(1, -1)[0].zero_(),
    lambda a, b, n: a.view(-1)[n:].sub_(1),
    lambda a, b, n: _each(a.unbind(1), b.unbind(1)),
    lambda a, b, n: _each(a.split([1, 3], 1)[::-1], b.split([1, 3], 1)),
    lambda a, b, n: _each(a.chunk(2, -1), b.chunk(2, -1)[::-1]),
    lambda a, b, n: a.fill_(b.amax()),
)


def _halves(a: Tensor, b: Tensor, n: int) -> Tensor:
    """``a``, of which the first columns and then the others are written to."""
    a[..., :n], a[..., n:] = b[..., :n], b[..., n:] * 2
    return a


def _each(pieces: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The last of pieces that are written to one after the other, each of what is there by then."""
    for piece, other in zip(pieces, others, strict=False):
        piece.mul_(2).add_(other)
    return pieces[-1]


@dataclass(frozen=True)
class Step:
    """An op on two tensors of those before it, counted from the last one."""

    op: Op
    places: tuple[int, int]
    number: int

    def run(self, pool: list[Tensor]) -> None:
        a, b = (pool[-1 - place % len(pool)] for place in self.places)
        pool.append(self.op(a, b, self.number))


class Steps(nn.Module):
    """Steps behind each other; some of all results are returned."""

    def __init__(self, steps: Sequence[Step], returned: Sequence[int]) -> None:
        super().__init__()
        self.steps, self.returned = steps, returned

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        pool = [x, x * 2, y + 1]
        for step in self.steps:
            step.run(pool)
        return tuple(pool[-1 - place % len(pool)] for place in self.returned)


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows)
    x, y = torch.randn(2, rows, 4, 6, generator=rng)
    return x, y


def drawn(seed: int, length: int = 8) -> Steps:
    """A module of steps that torch runs for batches of all sizes."""
    rng = random.Random(seed)
    views, writes = rng.choice([(0.1, 0.3), (0.3, 0.3), (0.05, 0.6)])
    returned = [0, *(rng.randrange(6) for _ in range(2))]
    steps: list[Step] = []
    for _ in range(3 * length):
        share = rng.random()
        ops = VIEWS if share < views else WRITES if share < views + writes else PLAIN
        places = (rng.choice((0, 0, 0, 1, 1, 2, 3)), rng.choice((0, 1, 1, 2, 3, 4)))
        step = Step(rng.choice(ops), places, rng.randrange(4))
        if _runs(Steps([*steps, step], returned)):
            steps.append(step)
        if len(steps) == length:
            break
    return Steps(steps, returned)


def _runs(module: Steps) -> bool:
    try:
        for rows in (2, 3, 5):
            module(*inputs(rows))
    except (RuntimeError, IndexError):
        return False
    return True


def agrees(module: Steps) -> bool:
    """Whether a trace computes what the module does, for other sizes where it takes them.
    ``BadInput`` as ``trace``."""
    view = trace(module, inputs(3))
    fixed = any(isinstance((view.type(value).shape or ())[0], int) for value in view.inputs())
    for rows in (3,) if fixed else (2, 5):
        results = sweep(view, dict(zip(view.input_names(), inputs(rows), strict=True))).values()
        expected = module(*inputs(rows))
        if not all(_equal(*pair) for pair in zip(results, expected, strict=True)):
            return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


@pytest.mark.parametrize("seed", range(4))
def test_a_random_module_is_traced_as_torch_runs_it(seed: int) -> None:
    module = drawn(seed)
    try:
        assert agrees(module)
    except BadInput as error:
        assert "writes to 'x'" in str(error)
