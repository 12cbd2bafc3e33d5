"""A small encoder with what exports go wrong on: equal-looking biases, a bool mask, two outputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from graphwright.ir.fx.view import FxView
from graphwright.ir.load.tracing.trace import trace

from .. import models as small_models

VOCAB, WIDTH, HEADS = 53, 24, 3
collect_ignore = [] if importlib.util.find_spec("triton") else ["runtimes/test_triton.py"]


class Encoder(torch.nn.Module):
    """ids and mask ``[batch, seq]`` to states ``[batch, seq, 24]`` and kept ``[batch, seq]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)
        torch.nn.init.zeros_(self.out.bias)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.embed(ids))
        batch, seq, _ = x.shape
        heads = self.qkv(x).view(batch, seq, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        kept = mask > 0
        y = torch.nn.functional.scaled_dot_product_attention(
            *heads.unbind(0), attn_mask=kept[:, None, None, :]
        )
        states = x + self.out(y.transpose(1, 2).reshape(batch, seq, WIDTH))
        return {"states": states, "kept": kept}


def batch_of(batch: int, seq: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids; the mask of the last row keeps nothing where there is more than one row."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, seq, dtype=torch.int64)
    mask[:, seq - seq // 3 :] = 0
    mask[1:][-1:] = 0
    return {"ids": torch.randint(0, VOCAB, (batch, seq), generator=rng), "mask": mask}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture(scope="module")
def view(encoder: Encoder) -> FxView:
    """One for all tests of a file: who edits it takes a copy."""
    return trace(encoder, (), batch_of(2, 7))


@pytest.fixture(scope="session")
def inputs_of() -> Callable[..., dict[str, torch.Tensor]]:
    """``inputs_of(batch, seq, seed=0)`` for the encoder."""
    return batch_of


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """The small transformers models that all test folders share."""
    return small_models
