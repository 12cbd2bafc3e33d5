"""Killed runs of the passes that need a whole language model: they go on to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.view import View
from graphwright.passes.recipe import Recipe
from graphwright.passes.registry import pass_class, pass_names
from torch import Tensor

from ...models import Small
from ..test_linear_pass import RESUMED, Kept
from .texts import ids

RECIPES = [
    "gblm{sparsity=0.5},eora{rank=2}",
    "flap{ratio=0.3 repair=regression},gptq{bits=2 group=16}",
    "dormant-heads{threshold=0.2},welore{target=0.3},quantize{bits=4 group=16}",
    "ziplm{speedup=1.4},wanda{pattern=2:4},dsnot",
]
ELSEWHERE = {"autoround", "quantize-cache"}
"""What is killed in the files of their own tests."""


def killed_in_each_pass(
    run: Callable[[Kept], dict[str, Tensor]], expected: dict[str, Tensor], whole: Kept
) -> None:
    """One run that is killed half way through each pass, and taken up each time."""
    memory = Kept()
    steps = [int(key.partition(":")[0]) for key in whole]
    for step in dict.fromkeys(steps):
        memory.most = steps.index(step) + steps.count(step) // 2
        with pytest.raises(KeyboardInterrupt):
            run(memory)
        assert len(memory) == memory.most
    memory.most = 10_000
    resumed = run(memory)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in resumed)


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

    whole = Kept()
    expected = run(whole)
    killed_in_each_pass(run, expected, whole)


def test_each_pass_with_data_is_killed_somewhere() -> None:
    """Of the methods on weights: those that take statistics, or look at the data themselves."""
    killed = {s.pass_.name for text in (*RESUMED, *RECIPES) for s in Recipe.parse(text).steps}
    methods = {n: pass_class(n) for n in pass_names() if ".weights." in pass_class(n).__module__}
    assert {n for n, kind in methods.items() if kind.needs.data} <= killed | ELSEWHERE
    assert {"low-rank", "w8a8", "bitstack"} <= killed, "these need data by an option"
