"""Caches in 8 and 4 bits: codes by their formula, one step like another, bytes, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import later
from graphwright.ir.structure.costs import graph_costs, sample_sizes
from graphwright.ir.structure.recognize import recognize
from torch import Tensor

from ...models import Small
from ..calibrated import rel
from ..test_linear_pass import Kept
from .texts import ids

KINDS = ("fx", "onnx")
FORMS = [(8, torch.int8, 127), (4, torch.uint8, 7)]
KEY = "present.0.key"


@pytest.fixture(scope="module")
def models(
    llama: tuple[Small, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, View]:
    folder = tmp_path_factory.mktemp("llama")
    module: Any = llama[0].module
    module.model.save_pretrained(folder)
    fx = load(folder, cache=True)
    return {"fx": fx, "onnx": translated(fx)}


@pytest.fixture(scope="module")
def halves(
    llama: tuple[Small, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[torch.dtype, str], View]:
    views = {}
    for dtype in (torch.float16, torch.bfloat16):
        folder = tmp_path_factory.mktemp("half")
        copy.deepcopy(llama[0].module).model.to(dtype).save_pretrained(folder)
        fx = load(folder, cache=True)
        views |= {(dtype, "fx"): fx, (dtype, "onnx"): translated(fx)}
    return views


def run(view: View, recipe: str) -> Any:
    return gw.optimize(view, recipe, samples=ids(1), calibration=ids())


def prompt(tokens: int = 9) -> dict[str, Tensor]:
    return {name: tensor[:, :tokens] for name, tensor in ids(1)[0].items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "dtype", "most"), FORMS)
def test_the_cache_holds_codes_of_what_it_held(
    bits: int, dtype: torch.dtype, most: int, kind: str, models: dict[str, View], no_reads: Any
) -> None:
    source, recipe = models[kind], f"quantize-cache{{bits={bits}}}"
    with no_reads():
        planned = gw.plan(source, recipe).passes[0][1]
    quantized = run(source, recipe)
    result = quantized.report.passes[0].result
    assert (planned.sites, planned.notes) == (result.sites, result.notes)

    kept = [graph_costs(g, sample_sizes(g, prompt())).kv_bytes for g in (source, quantized.graph)]
    assert kept[0] == 32 // bits * (kept[1] or 0)

    exact, outputs = sweep(source, prompt()), sweep(quantized.graph, prompt())
    assert outputs[KEY].dtype == dtype
    assert outputs[KEY].nbytes == exact[KEY].nbytes * bits // 32, "not a byte more"
    batches = [sweep(source, batch)[KEY] for batch in ids()]
    scale = torch.cat(batches).abs().amax((0, 2), keepdim=True) / most
    codes = outputs[KEY].float()
    if bits == 4:
        codes = torch.stack([codes % 16, (codes / 16).floor()], -1).flatten(-2) - 8
    assert float(((codes * scale - exact[KEY]).abs() / scale).max()) < 0.5 + 1e-3
    assert 0 < rel({"y": exact["logits"]}, {"y": outputs["logits"]}) < (0.02 if bits == 8 else 0.3)


def test_a_resumed_run_looks_at_no_data(
    models: dict[str, View], monkeypatch: pytest.MonkeyPatch
) -> None:
    def outputs(memory: Kept) -> dict[str, Tensor]:
        optimized = gw.optimize(
            models["fx"], "quantize-cache", samples=ids(1), calibration=ids(), checkpoints=memory
        )
        return sweep(optimized.graph, prompt())

    memory = Kept()
    expected = outputs(memory)
    monkeypatch.setattr(
        "graphwright.passes.weights.quantize_cache._ranges", lambda *_: pytest.fail("once more")
    )
    assert all(torch.equal(value, expected[n]) for n, value in outputs(memory).items())


@pytest.mark.parametrize(("bits", "kind"), [(8, "fx"), (4, "onnx")])
def test_a_step_sees_what_the_prompt_would(bits: int, kind: str, models: dict[str, View]) -> None:
    """Tokens one at a time give what all at once do; so in ONNX Runtime, from its own cache."""
    graph = run(models[kind], f"quantize-cache{{bits={bits}}}").graph
    whole = sweep(graph, prompt())
    held = later(prompt(), sweep(graph, prompt(8)), 1)
    assert held is not None
    word = {"input_ids": prompt()["input_ids"][:, 8:], "attention_mask": torch.ones(4, 9).long()}
    step = {**held, **word}
    by_steps = sweep(graph, step)
    assert rel({"y": whole["logits"][:, -1:]}, {"y": by_steps["logits"]}) < 1e-4
    assert torch.equal(by_steps[KEY], whole[KEY])
    ran = gw.compile(graph, backend="onnxruntime")(**step)
    assert ran[KEY].dtype == whole[KEY].dtype
    assert rel({"y": by_steps["logits"]}, {"y": ran["logits"]}) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_structure_and_other_passes_find_the_slots(kind: str, models: dict[str, View]) -> None:
    recipe = "quantize{bits=4 group=16},quantize-cache,drop-blocks{count=1}"
    optimized = run(models[kind], recipe)
    (site,) = recognize(optimized.graph).attentions
    assert site.cache is not None and site.k.endswith("k_proj")
    names = [n for n in optimized.graph.input_names() if "past" in n]
    assert names == ["past_key_values.0.key", "past_key_values.0.value"]
    assert sweep(optimized.graph, prompt())[KEY].dtype == torch.int8


def test_what_has_no_cache(graph: View, toy_inputs: dict[str, Tensor], models: Any) -> None:
    with pytest.raises(BadInput, match="takes no keys and values that were computed before"):
        gw.optimize(graph, "quantize-cache", samples=[toy_inputs], calibration=[toy_inputs])
    with pytest.raises(BadInput, match="quantize-cache needs calibration data"):
        gw.optimize(models["fx"], "quantize-cache", samples=ids(1))
    with pytest.raises(BadInput, match="it holds codes already"):
        run(models["fx"], "quantize-cache,quantize-cache{bits=4}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_hold_codes_of_4_bits(dtype: torch.dtype, kind: str, halves: Any) -> None:
    source = halves[dtype, kind]
    outputs = sweep(run(source, "quantize-cache{bits=4}").graph, prompt())
    assert outputs[KEY].dtype == torch.uint8 and outputs["logits"].dtype == dtype
    exact = sweep(source, prompt())["logits"].float()
    assert (outputs["logits"].float() - exact).norm() < 0.25 * exact.norm()


def test_a_file_whose_first_slot_says_how_long_the_cache_is(
    models: dict[str, View], tmp_path: Path
) -> None:
    graph = load(gw.export(models["fx"], tmp_path / "out") / "model.onnx")
    result = run(graph, "quantize-cache").report.passes[0].result
    assert not result.refused and len(result.sites) == 2 * 2
