"""AutoRound: sign descent on a block, the stored form, both kinds, resuming, refusals."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.blocks import block_graphs, captured
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.weights import descent
from graphwright.passes.weights.descent import Rounding
from graphwright.passes.weights.quantizers import rtn
from torch import Tensor

from ...models import BUILDERS, Small, traced
from ..calibrated import rel
from ..test_linear_pass import Kept
from .texts import ids as texts

KINDS = ("fx", "onnx")
FORMATS = [(4, 32, True), (3, 0, False), (2, 16, False), (8, 64, True)]


@pytest.fixture(scope="module")
def models(llama: tuple[Small, dict[str, View]]) -> dict[str, View]:
    return llama[1]


def run(view: View, recipe: str, **options: Any) -> Any:
    return gw.optimize(view, recipe, samples=texts(1), calibration=texts(), **options)


# --- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
def test_it_starts_as_rounding_to_nearest(bits: int, group: int, symmetric: bool) -> None:
    weight = torch.randn(6, 72, generator=torch.Generator().manual_seed(0))
    start = rtn(weight, bits, group, symmetric)
    rounding = Rounding.of(weight, start)
    assert torch.allclose(rounding.rounded(), start.dequantized(), atol=1e-6)
    quantized = rounding.quantized()
    for operand, expected in zip(quantized.operands(), start.operands(), strict=True):
        assert operand is expected or torch.equal(operand, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
def test_what_is_learned_is_what_is_stored(bits: int, group: int, symmetric: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 72, generator=rng)
    rounding = Rounding.of(weight, rtn(weight, bits, group, symmetric))
    rounding.rounded().square().sum().backward()
    rounding.step(0.2)
    for parameter, (low, high) in zip(rounding.parameters, ((-0.2, 0.2), (0.8, 1.0)), strict=True):
        assert low - 1e-6 <= float(parameter.detach().min())
        assert float(parameter.detach().max()) <= high + 1e-6
        assert len(parameter.unique()) <= 3, "a step goes by signs"
        assert parameter.grad is None
    quantized = rounding.quantized()
    assert torch.allclose(quantized.dequantized(), rounding.rounded(), atol=1e-6)
    assert quantized.nbytes == rounding.start.nbytes
    for _ in range(9):
        rounding.rounded().square().sum().backward()
        rounding.step(0.2)
    moves, shrinks = (parameter.detach() for parameter in rounding.parameters)
    assert float(moves.abs().max()) <= 0.5 and float(shrinks.min()) >= 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_run_by_themselves_with_gradients(kind: str, models: dict[str, View]) -> None:
    view = models[kind]
    blocks = recognize(view).blocks
    graphs = block_graphs(view, blocks)
    ends = [graphs[0].entry, *(graph.exit for graph in graphs)]
    (values,) = captured(view, texts(1), [*ends, *(v for g in graphs for v in g.outside)])
    for graph in graphs:
        assert graph.without_gradient() is None
        constants = {value: x.clone() for value, x in graph.constants().items()}
        for value in constants.values():
            if value.is_floating_point():
                value.requires_grad_()
        out = graph.run(values[graph.entry], values, constants)
        assert torch.allclose(out, values[graph.exit], atol=1e-5)
        out.square().sum().backward()
        missing = [view.name(v) for v, x in constants.items() if x.requires_grad and x.grad is None]
        assert missing == []
        # By finite differences, through all of attention: a weight of q.
        (q,) = (v for v in constants if "q_proj.weight" in view.name(v))
        step, places = 1e-2, (3, 5)
        losses = []
        for sign in (1, -1):
            moved = constants[q].detach().double().clone()
            moved[places] += sign * step
            with torch.no_grad():
                y = graph.run(values[graph.entry], values, {**constants, q: moved.float()})
            losses.append(float(y.double().square().sum()))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float(constants[q].grad[places]) == pytest.approx(slope, rel=0.05, abs=1e-3)


# --- on graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_beats_rounding(kind: str, models: dict[str, View], no_reads: Any) -> None:
    source, recipe = models[kind], "autoround{bits=2 group=16 steps=60}"
    with no_reads():
        planned = gw.plan(source, recipe)
    learned = run(source, recipe)
    (step,) = learned.report.passes
    assert step.bytes_after == planned.artifact_bytes
    notes = {site.name: site.note for site in step.result.sites}
    assert notes.pop("model.lm_head") == "in no block that has gradients: rounded to nearest"
    phrase = "of rounding's error in the block's output"
    assert all(note.startswith(phrase) for note in notes.values())

    plain = run(source, "quantize{bits=2 group=16}")
    expected = [sweep(source, batch) for batch in texts()]

    def error(view: View) -> float:
        return sum(rel(e, sweep(view, b)) for e, b in zip(expected, texts(), strict=True))

    assert error(learned.graph) < 0.8 * error(plain.graph)


def test_both_kinds_give_the_same_sites(models: dict[str, View]) -> None:
    results = [run(models[kind], "autoround{bits=3 group=16 steps=8}") for kind in KINDS]
    fx, onnx = (result.report.passes[0].result.sites for result in results)
    for site, other in zip(fx, onnx, strict=True):
        assert (site.name, site.bytes_after) == (other.name, other.bytes_after)
        assert site.rel_l2 == pytest.approx(other.rel_l2, rel=0.02)
    assert rel(*(sweep(result.graph, texts(1)[0]) for result in results)) < 0.1


def test_a_path_behind_it(models: dict[str, View]) -> None:
    source, learned = models["fx"], "autoround{bits=2 group=16 steps=8}"
    expected = sweep(source, texts(1)[0])
    alone, whole = (
        rel(expected, sweep(run(source, learned + more).graph, texts(1)[0]))
        for more in ("", ",eora{rank=64 factors=float32}")
    )
    assert whole < 1e-4 < alone


def test_a_killed_run_goes_on_to_the_same_bytes(
    models: dict[str, View], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored(result: Any) -> dict[str, Tensor]:
        return {name: weight.read() for name, weight in result.graph.weights().items()}

    source, recipe, whole = models["fx"], "autoround{bits=3 group=16 steps=3}", Kept()
    expected = stored(run(source, recipe, checkpoints=whole))
    memory = Kept()
    memory.most = next(i for i, key in enumerate(whole) if key.endswith("block 1"))
    with pytest.raises(KeyboardInterrupt):
        run(source, recipe, checkpoints=memory)
    memory.most, learned = 10_000, []
    monkeypatch.setattr(
        "graphwright.passes.weights.autoround.descend",
        lambda *a, **o: learned.append(1) or descent.descend(*a, **o),
    )
    resumed = stored(run(source, recipe, checkpoints=memory))
    assert len(learned) == 1, "the first block is not learned again"
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in resumed)


# --- refusals ------------------------------------------------------------------------------------


def test_what_it_needs(models: dict[str, View]) -> None:
    with pytest.raises(BadInput, match="autoround needs calibration data"):
        gw.optimize(models["fx"], "autoround", samples=texts(1))
    with pytest.raises(BadInput, match="must be at least 1"):
        gw.passes.AutoRound(steps=0)


def test_images_too() -> None:
    small = BUILDERS["vit"](layers=1)
    view = traced(small)
    recipe = "autoround{bits=2 group=16 steps=20}"
    learned = gw.optimize(view, recipe, samples=[small.inputs], calibration=[small.inputs])
    plain = gw.optimize(view, "quantize{bits=2 group=16}", samples=[small.inputs])
    expected = sweep(view, small.inputs)
    errors = [rel(expected, sweep(r.graph, small.inputs)) for r in (learned, plain)]
    assert errors[0] < errors[1]
