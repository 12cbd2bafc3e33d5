"""The small decoder that searches are tried on, traced once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.tools.search.budget import Budget
from graphwright.tools.search.data import parts
from graphwright.tools.search.points import Found
from graphwright.tools.search.rounds import Rounds
from graphwright.tools.search.search import search

from tests.models import VOCAB, qwen2, raised

Batches = list[dict[str, torch.Tensor]]
WITHOUT_HEADS = ("tokens", "layers", "bits", "rank")


class Memory(dict[str, Any]):
    """A store of checkpoints."""

    def recall(self, key: str) -> Any:
        return self[key]

    def keep(self, key: str, result: Any) -> None:
        self[key] = result


def silent(*_: Any) -> None:
    """Progress that nobody reads."""


@pytest.fixture(scope="session")
def views() -> dict[str, View]:
    return raised(qwen2())


@pytest.fixture(scope="module")
def source(views: dict[str, View]) -> View:
    """The traced one, canonical."""
    view = views["fx"].copy()
    canonicalize(view)
    return view


@pytest.fixture(scope="session")
def batches() -> Batches:
    rng = torch.Generator().manual_seed(5)
    texts = []
    for _ in range(4):
        ids = torch.randint(0, VOCAB, (4, 24), generator=rng)
        mask = torch.ones_like(ids)
        mask[3, 20:] = 0
        texts.append({"input_ids": ids, "attention_mask": mask})
    return texts


def not_begun(
    view: View, batches: Batches, outcome: Found, budget: str, rounds: int = 1,
    progress: Any = silent,
) -> Rounds:  # fmt: skip
    """Rounds under a budget with the menu of a search, of which nothing is measured."""
    return Rounds(
        view, view, Budget.parse(budget), parts(view, batches), outcome.menu, outcome.judge,
        rounds, progress,
    )  # fmt: skip


@pytest.fixture(scope="session")
def outcome(views: dict[str, View], batches: Batches) -> Found:
    return search(
        views["fx"], budget="bytes=40%", calibration=batches, rounds=1, using=WITHOUT_HEADS
    )
