"""``crash`` and ``das``: which blocks stay, against the library's own states and outputs."""

from __future__ import annotations

import itertools
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.depth.crash import centres, cka, shared

from ... import models as small_models

LAYERS = 5
IDLE = 2
"""The block that adds next to nothing."""


@pytest.fixture(scope="module")
def llama() -> tuple[Any, dict[str, View], list[dict[str, torch.Tensor]]]:
    small = small_models.llama(layers=LAYERS)
    layer = small.module.model.model.layers[IDLE]
    with torch.no_grad():
        layer.mlp.down_proj.weight.mul_(1e-3)
        layer.self_attn.o_proj.weight.mul_(1e-3)
    fx = small_models.plain(small)
    rng = torch.Generator().manual_seed(3)
    batches = []
    for pad in (0, 3):
        ids = torch.randint(0, 97, (3, 8), generator=rng)
        mask = torch.ones_like(ids)
        mask[1, 8 - pad :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return small.module.model, {"fx": fx, "onnx": translated(fx)}, batches


def pooled_states(model: Any, batches: Any) -> list[torch.Tensor]:
    """By block, what is behind it: the mean of a row's tokens, weighted by 1, 2, 3, ..."""
    states: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out, to=to: to.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer, to in zip(model.model.layers, states, strict=True)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    pooled = []
    for outs in states:
        rows = []
        for out, batch in zip(outs, batches, strict=True):
            for row, mask in zip(out.double(), batch["attention_mask"], strict=True):
                weights = torch.arange(1, int(mask.sum()) + 1, dtype=torch.float64)
                rows.append((weights[:, None] * row[mask.bool()]).sum(0) / weights.sum())
        pooled.append(torch.stack(rows))
    return pooled


def test_the_measure_and_the_clusters() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64)
    turned, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    assert cka(x, 3 * x @ turned + 1) == pytest.approx(1)
    y = torch.randn(6, 4, dtype=torch.float64)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert cka(x, y) == pytest.approx(float(expected))
    assert centres([0.9, 0.1, 0.8, 0.7], 2) == [1, 3]
    assert shared([1, 4], 6) == [1, 1, 1, 4, 4, 4]
    assert shared([0, 2], 3) == [0, 2, 2]


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_clusters_of_blocks(llama: Any, kind: str) -> None:
    model, graphs, batches = llama
    states = pooled_states(model, batches)
    alike = [cka(a, b) for a, b in itertools.pairwise(states)]
    staying = centres(alike, 3)
    for rest, places in (("remove", staying), ("share", shared(staying, LAYERS))):
        done = gw.optimize(
            graphs[kind], f"crash{{clusters=3 rest={rest}}}", calibration=batches,
            samples=batches[:1],
        )  # fmt: skip
        measured, path = done.report.passes[0].result.notes
        listed = [float(word.split(":")[1]) for word in measured.split(": ")[1].split()]
        assert listed == pytest.approx(alike, abs=1e-3)
        assert len(recognize(done.graph).blocks) == len(places)
        layers = {w.split(".layers.")[1][0] for w in done.graph.weights() if ".layers." in w}
        assert layers == set(map(str, staying)), path


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_rewards_find_the_idle_block(llama: Any, kind: str) -> None:
    _, graphs, batches = llama
    done = gw.optimize(graphs[kind], "das{rounds=25}", calibration=batches, samples=batches[:1])
    scores, path = done.report.passes[0].result.notes
    listed = [float(word.split(":")[1]) for word in scores.split(": ")[1].split()]
    assert max(range(LAYERS), key=listed.__getitem__) == IDLE
    assert path.endswith("0-1,3-4")
    ids = torch.randint(0, 97, (96, 8), generator=torch.Generator().manual_seed(4))
    enough = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    healed = gw.optimize(
        graphs[kind], "das{count=2 rounds=5 heal=mean}", calibration=enough, samples=batches[:1]
    )
    assert [s.kind for s in healed.report.passes[0].result.sites].count("heal") >= 1


def test_bad_input(llama: Any) -> None:
    _, graphs, batches = llama
    for recipe, message in (
        ("das{count=5}", "count=5 of 5 blocks; at least one must stay"),
        ("das{rounds=0}", "rounds=0 must be at least 1"),
        ("crash{clusters=5}", "clusters=5 of 5 blocks leaves none out"),
        ("crash{clusters=0}", "clusters=0 must be at least 1"),
        ("crash{clusters=2 rest=share heal=mean}", "runs through blocks again"),
    ):
        with pytest.raises(BadInput, match=message):
            gw.optimize(graphs["fx"], recipe, calibration=batches)
    one = [{name: tensor[:1] for name, tensor in batches[0].items()}]
    with pytest.raises(BadInput, match="one sample: nothing varies"):
        gw.optimize(graphs["fx"], "crash{clusters=2}", calibration=one)
