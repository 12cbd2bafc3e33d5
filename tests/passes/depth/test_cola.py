"""The search for a path: what it tries, what it finds, and on which data that is judged."""

from __future__ import annotations

import itertools
import math
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.moves import Path, follow
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.depth.layer_tree import LayerTree

from ... import models as small_models

LAYERS = 4


def test_a_tree_finds_the_best_path() -> None:
    """Of a reward that is known for all: the path 0, 2, 2, 3 beats every other."""
    best = (0, 2, 2, 3)

    def reward(path: tuple[int, ...], shared: int) -> float:
        assert shared <= len(path) <= 4 and path[:shared] == path[:shared]
        firsts = list(dict.fromkeys(path))
        assert firsts == sorted(firsts), "no block comes first behind a later one"
        same = sum(a == b for a, b in itertools.zip_longest(path, best))
        return same / max(len(path), len(best))

    tried = LayerTree(5, 4, 0.0, reward, seed=0).search(400)
    assert max(tried, key=tried.__getitem__) == best
    assert tried == LayerTree(5, 4, 0.0, reward, seed=0).search(400)
    short = LayerTree(5, 4, 5.0, lambda path, _: 0.5, seed=0).search(100)
    assert () not in short and min(map(len, short)) >= 1


@pytest.fixture(scope="module")
def graphs() -> tuple[dict[str, View], list[dict[str, torch.Tensor]]]:
    small = small_models.llama(layers=LAYERS)
    fx = small_models.plain(small)
    rng = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(3):
        ids = torch.randint(0, 97, (2, 9), generator=rng)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return {"fx": fx, "onnx": translated(fx)}, batches


def divergence(view: View, path: str, batch: dict[str, torch.Tensor]) -> float:
    source = view.copy()
    canonicalize(source)
    other = source.copy()
    follow(other, recognize(other).blocks, Path.parse(path), rule="test")
    a, b = (next(iter(sweep(g, batch).values())).log_softmax(-1) for g in (source, other))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_the_path_is_judged_on_what_the_search_did_not_see(graphs: Any, kind: str) -> None:
    views, batches = graphs
    recipe = "cola{max_path=3 simulations=60}"
    done = gw.optimize(views[kind], recipe, calibration=batches, samples=batches[:1])
    effort, judged, last = done.report.passes[0].result.notes
    factor = float(effort.split("(")[1].split()[0])
    assert factor > 1.3
    path = last.split()[1].rstrip(",")
    assert len(recognize(done.graph).blocks) == len(Path.parse(path).steps) <= 3
    (_, searched), (_, greedy) = (part.split(" by ") for part in judged.split(": ")[1].split(", "
        "greedily"))  # fmt: skip
    assert float(searched) == pytest.approx(divergence(views[kind], path, batches[1]), rel=1e-3)
    chosen = judged.split("greedily chosen ")[1].split(" by ")[0]
    assert float(greedy) == pytest.approx(divergence(views[kind], chosen, batches[1]), rel=1e-3)
    subsets = [",".join(map(str, s)) for s in itertools.combinations(range(LAYERS), 3)]
    means = {s: sum(divergence(views[kind], s, b) for b in (batches[0], batches[2])) / 2
             for s in subsets}  # fmt: skip
    mean = sum(divergence(views[kind], path, b) for b in (batches[0], batches[2])) / 2
    assert mean <= min(means.values()) * (1 + 1e-3) and math.isfinite(mean)


def test_bad_input(graphs: Any) -> None:
    views, batches = graphs
    for recipe, message, data in (
        ("cola{max_path=2 simulations=0}", "a search without a budget tries no path", batches),
        ("cola{max_path=0}", "max_path=0 must be at least 1", batches),
        ("cola{max_path=2}", "cola needs calibration data", None),
        ("cola{max_path=2}", "a part of it must stay unseen", batches[:1]),
        ("cola{max_path=2 heal=mean}", "may repeat blocks", batches),
    ):
        with pytest.raises(BadInput, match=message):
            gw.optimize(views["fx"], recipe, calibration=data)
