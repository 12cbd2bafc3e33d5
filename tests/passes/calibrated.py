"""The toy's calibration data, and how passes that learn from it are run and measured."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import torch
from graphwright.ir.core.view import View
from graphwright.ir.run.verify import compare

Inputs = dict[str, torch.Tensor]


def many(seed: int = 3, count: int = 4) -> list[Inputs]:
    rng = torch.Generator().manual_seed(seed)
    return [{"ids": torch.randint(0, 17, (6, 7), generator=rng)} for _ in range(count)]


def rel(a: Inputs, b: Inputs) -> float:
    return max(difference.rel_l2 for difference in compare(a, b).values())


def optimize(graph: View, recipe: str, inputs: Inputs) -> Any:
    return gw.optimize(graph, recipe, samples=[inputs], calibration=many())


def correlated(tokens: int, width: int) -> torch.Tensor:
    """Inputs of a linear whose columns hang together and differ in size."""
    rng = torch.Generator().manual_seed(0)
    mix = torch.eye(width) + 0.2 * torch.randn(width, width, generator=rng)
    return torch.randn(tokens, width, generator=rng) * torch.logspace(-0.5, 0.5, width) @ mix


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
