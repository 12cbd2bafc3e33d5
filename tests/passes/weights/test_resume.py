"""Killed runs of the passes that need a whole language model: they go on to the same bytes."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.view import View
from torch import Tensor

from ...models import Small
from ..test_linear_pass import Kept
from .texts import ids

RECIPES = [
    "gblm{sparsity=0.5},eora{rank=2}",
    "flap{ratio=0.3 repair=regression},gptq{bits=2 group=16}",
    "wanda{pattern=2:4},dsnot",
    "welore{target=0.3},quantize{bits=4 group=16}",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_goes_on_to_the_same_bytes(
    recipe: str, llama: tuple[Small, dict[str, View]]
) -> None:
    def run(memory: Kept) -> dict[str, Tensor]:
        source: Any = llama[1]["fx"]
        optimized = gw.optimize(
            source, recipe, samples=ids(1), calibration=ids(), checkpoints=memory
        )
        return {name: weight.read() for name, weight in optimized.graph.weights().items()}

    whole, memory = Kept(), Kept()
    expected = run(whole)
    assert len(whole) > 2
    memory.most = 2 * len(whole) // 3
    with pytest.raises(KeyboardInterrupt):
        run(memory)
    assert len(memory) == memory.most
    memory.most = 10_000
    resumed = run(memory)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in resumed)
