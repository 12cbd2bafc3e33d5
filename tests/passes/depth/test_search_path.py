"""Searches for a path: what is measured, what is guessed, and that the best is taken."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.moves import Path
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.units import whole
from graphwright.passes.depth.cheap_scores import SCORES, cheap_scores, cheapest_first
from graphwright.passes.depth.layer_tree import LayerTree
from graphwright.passes.depth.path_runner import PathRunner
from graphwright.passes.depth.path_search import Trials, by_greed
from graphwright.passes.depth.search_path import SearchPath
from graphwright.passes.depth.surrogate import NOISE, expected_improvement
from scipy.stats import norm

from ... import models as small_models
from .test_clusters_and_rewards import cka

LAYERS = 5
IDLE = 3
"""The block that adds next to nothing."""


@pytest.fixture(scope="module")
def model() -> tuple[Any, View, list[dict[str, torch.Tensor]]]:
    small = small_models.llama(layers=LAYERS)
    layer = small.module.model.model.layers[IDLE]
    with torch.no_grad():
        layer.mlp.down_proj.weight.mul_(1e-3)
        layer.self_attn.o_proj.weight.mul_(1e-3)
    rng = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(3):
        ids = torch.randint(0, 97, (2, 9), generator=rng)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return small.module.model, small_models.traced(small), batches


def runner_on(view: View, batches: list[dict[str, torch.Tensor]]) -> PathRunner:
    structure = recognize(view)
    return PathRunner(view, structure, whole(structure.blocks), batches)


def test_paths_come_in_the_order_of_what_they_leave_out() -> None:
    worth = [0.3, -1.0, 2.0, 0.3, -0.5, 1.1]
    for length in (1, 4, 6):
        paths = list(cheapest_first(worth, length))
        assert sorted(paths) == sorted(itertools.combinations(range(6), length))
        lost = [sum(worth[i] for i in range(6) if i not in path) for path in paths]
        assert lost == pytest.approx(sorted(lost))


def test_cheap_scores_are_those_of_the_models_states(model: Any) -> None:
    library, view, batches = model
    runner = runner_on(view, batches[:1])
    with torch.no_grad():
        states = library(**batches[0], output_hidden_states=True).hidden_states[:-1]
    stream = [state.flatten(0, 1).double() for state in states]
    scores = cheap_scores(runner, LAYERS)
    assert scores.shape == (len(SCORES), LAYERS) and bool((scores.argmin(1) == IDLE).all())
    turned = [1 - float(torch.cosine_similarity(a, b, dim=-1).mean())
              for a, b in itertools.pairwise(stream)]  # fmt: skip
    alike = [1 - cka(a, b) for a, b in itertools.pairwise(stream)]
    for row, expected in ((scores[0], turned), (scores[2], alike)):
        # Of the last block the library gives the state behind the norm alone: without it.
        ends = torch.tensor(expected, dtype=torch.float64)
        gaps, own = ends.diff(), row[:-1].diff()
        assert torch.allclose(gaps / gaps.norm(), own / own.norm(), atol=1e-4)


def test_the_surrogate_is_a_gaussian_process() -> None:
    """Of two points and one candidate, by the formula of a conditional normal distribution."""
    points, values = np.array([[0.0], [2.0]]), np.array([1.0, 3.0])
    candidate = np.array([[0.5]])
    (gain,) = expected_improvement(points, values, candidate)
    reach, scaled = 2.0, np.array([-1.0, 1.0])
    k = np.exp(-np.array([[0, 4], [4, 0]]) / (2 * reach**2)) + NOISE * np.eye(2)
    c = np.exp(-np.array([0.25, 2.25]) / (2 * reach**2))
    mean, sd = c @ np.linalg.solve(k, scaled), np.sqrt(1 - c @ np.linalg.solve(k, c))
    expected = (-1 - mean) * norm.cdf((-1 - mean) / sd) + sd * norm.pdf((-1 - mean) / sd)
    assert gain == pytest.approx(expected)
    assert expected_improvement(points[:1], values[:1], candidate)[0] > 0


def test_a_tree_draws_blocks_by_their_worth() -> None:
    tree, draw = LayerTree(4, 2, 0.0, lambda *_: 0.5, 0, [3.0, 1e-9, 1.0, 1.0]), random.Random(0)
    drawn = Counter(tree._completed(tree._state((), 0), draw) for _ in range(600))
    # 0 is the first of two with 3/5, and the second with 2 (1/5) (3/4).
    assert drawn[0, 2] + drawn[0, 3] == pytest.approx(600 * 0.9, abs=25)
    assert drawn.total() == drawn[0, 2] + drawn[0, 3] + drawn[2, 3]


@pytest.mark.parametrize("options", [
    {}, {"score": "kl"}, {"method": "greedy"}, {"method": "greedy", "score": "kl", "trials": 6},
    {"method": "mcts", "trials": 60}, {"method": "mcts", "score": "kl", "trials": 60},
])  # fmt: skip
def test_each_search_finds_a_good_path(model: Any, options: Any) -> None:
    """Of the ten paths of three blocks, by the runner's own measure of each."""
    _, view, batches = model
    runner = runner_on(view, batches)
    search = SearchPath(**{"max_path": 3, "trials": 12, **options})
    tried = search.searched(runner, LAYERS)
    assert len(tried) <= search.trials and max(map(len, tried)) <= 3
    assert runner.units_asked >= 1.1 * runner.units_run
    best = min(tried, key=tried.__getitem__)
    moved = {p: runner.divergence(p) for p in itertools.combinations(range(LAYERS), 3)}
    assert tried[best] == runner.divergence(best) and IDLE not in best
    if search.method == "bayes":
        assert best == min(moved, key=moved.__getitem__)
    else:
        assert tried[best] < sorted(moved.values())[3]


def test_no_search_is_worse_than_greed(model: Any) -> None:
    """One draw of a tree is a bad path; the greedy one, which is measured beside it, is taken."""
    _, view, batches = model
    runner = runner_on(view, [batches[0], batches[2]])
    search = SearchPath(max_path=3, trials=1, method="mcts", score="kl", seed=1)
    (drawn,) = search.searched(runner, LAYERS)
    greedy = by_greed(Trials(runner, 100), LAYERS, len(drawn))
    assert runner.divergence(greedy) < runner.divergence(drawn)
    done = gw.optimize(view, search, calibration=batches, samples=batches[:1])
    assert done.report.passes[0].result.notes[-1] == f"path {Path.of(greedy)}, of 5 blocks"


def test_the_path_is_frozen_and_judged_on_other_data(model: Any) -> None:
    _, view, batches = model
    done = gw.optimize(view, "search-path{max_path=3 trials=12}", calibration=batches,
                       samples=batches[:1])  # fmt: skip
    effort, judged, last = done.report.passes[0].result.notes
    assert "15 paths measured" in effort, "all 10, and 5 without a block each: a cheap score"
    path = tuple(i for i, _ in Path.parse(last.split()[1].rstrip(",")).steps)
    assert len(recognize(done.graph).blocks) == len(path) == 3
    figure = float(judged.split(" by ")[1].split(",")[0])
    assert figure == pytest.approx(runner_on(view, batches[1:2]).divergence(path), rel=1e-3)


def test_bad_input(model: Any) -> None:
    _, view, batches = model
    for recipe, message in (
        ("search-path{max_path=2 trials=0}", "a search without a budget tries no path"),
        ("search-path{max_path=0}", "max_path=0 must be at least 1"),
        ("search-path{max_path=2 method=mcts heal=mean}", "may repeat blocks"),
    ):
        with pytest.raises(BadInput, match=message):
            gw.optimize(view, recipe, calibration=batches)
