"""Token passes where an image comes as a thumbnail and four quarters."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.fx.view import FxView
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import empty_past, next_step
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.vision import find_image_tokens
from graphwright.passes.tokens import globalcom2
from torch import Tensor

from ...ir.load.hf.test_llava import prompts, save_llava
from .llava import Models, best, close, cls_scores, cut, run, staying
from .reference_scores import cls_logits, shared_out

CROPS, PATCHES = 5, 9
TOKENS = CROPS * PATCHES
Graphs = dict[str, View]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Graphs]:
    """The library's model, and its graphs by kind: that of FX has a cache, that of ONNX none."""
    folder = tmp_path_factory.mktemp("crops")
    model = save_llava(folder, image_seq_length=TOKENS)
    model.set_attn_implementation("eager")
    plain, cached = load(folder, cache=False), load(folder, cache=True)
    assert isinstance(plain, FxView) and isinstance(cached, FxView)
    return model, {"fx": cached, "onnx": translated(plain)}


def inputs(view: View, batch: int) -> dict[str, Tensor]:
    prompt = prompts(TOKENS, batch, (CROPS,))
    types = {n: view.type(v) for n, v in zip(view.input_names(), view.inputs(), strict=True)}
    return prompt | empty_past(types, prompt)


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_the_pictures_are_recognised(llava: tuple[Any, Graphs], kind: str) -> None:
    view = llava[1][kind].copy()
    canonicalize(view)
    images = find_image_tokens(view, recognize(view))
    assert (images.grid, images.patches, images.pictures) == ((3, 3), PATCHES, CROPS)
    assert images.count == TOKENS


@pytest.mark.parametrize(("kind", "each"), [("onnx", 1), ("fx", 4)])
def test_fastervlm_keeps_as_many_of_each_picture(
    llava: tuple[Any, Graphs], kind: str, each: int
) -> None:
    model, graphs = llava
    graph = graphs[kind]
    recipe = f"fastervlm{{keep={CROPS * each}}}"
    view = gw.optimize(graph, recipe, samples=[inputs(graph, 3)]).graph
    for batch in (1, 4):
        prompt = inputs(graph, batch)
        flat = prompt | {"pixel_values": prompt["pixel_values"].flatten(0, 1)}
        with torch.no_grad():
            scores = cls_scores(model, flat["pixel_values"])
            chosen = best(scores, each).reshape(batch, TOKENS)
            expected, _ = run(model, flat, layer=0, chosen=chosen, renumber=True)
        kept = cut(prompt["attention_mask"], staying(prompt["input_ids"], chosen)).bool()
        assert kept.shape[1] == prompt["input_ids"].shape[1] - TOKENS + CROPS * each
        close(sweep(view, prompt)["logits"], expected, kept)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("onnx", "random-tokens{keep=11}"), ("onnx", "uniform-tokens{keep=11}"),
        ("onnx", "fastv{layer=1 keep=11}"), ("fx", "fastv{layer=1 keep=11}"),
    ],
)  # fmt: skip
def test_other_passes_count_over_all_pictures(
    llava: tuple[Any, Graphs], kind: str, recipe: str
) -> None:
    graph = llava[1][kind]
    prompt = inputs(graph, 2)
    pruned = gw.optimize(graph, recipe, samples=[prompt])
    assert pruned.report.passes[0].result.sites[0].shape == (TOKENS, 11)
    logits = sweep(pruned.graph, prompt)["logits"]
    assert logits.shape[1] == prompt["input_ids"].shape[1] - TOKENS + 11
    assert logits.isfinite().all()


def test_a_number_that_the_pictures_cannot_share(llava: tuple[Any, Graphs]) -> None:
    graph = llava[1]["onnx"]
    with pytest.raises(BadInput, match=r"keep=11 is not divisible among the 5 pictures.*: 10 is"):
        gw.optimize(graph, "fastervlm{keep=11}", samples=[inputs(graph, 2)])


# --- a budget for each crop -----------------------------------------------------------------------

TEMPERATURE = 0.3


def test_globalcom2_shares_out_by_the_thumbnail(
    llava: tuple[Any, Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a temperature at which so small a tower's logits make a difference."""
    monkeypatch.setattr(globalcom2, "TEMPERATURE", TEMPERATURE)
    model, graphs = llava
    uneven = 0
    for kind, ratio in (("fx", 0.25), ("onnx", 0.5)):
        graph = graphs[kind]
        recipe = f"globalcom2{{ratio={ratio}}}"
        view = gw.optimize(graph, recipe, samples=[inputs(graph, 3)]).graph
        for batch in (1, 12):
            prompt = inputs(graph, batch)
            flat = prompt | {"pixel_values": prompt["pixel_values"].flatten(0, 1)}
            with torch.no_grad():
                scores = cls_logits(model, flat["pixel_values"]).reshape(batch, CROPS, PATCHES)
                both = [shared_out(row, ratio, (2, 2), TEMPERATURE) for row in scores]
                choice = torch.stack([chosen.flatten() for chosen, _ in both])
                expected, _ = run(model, flat, layer=0, chosen=choice, renumber=True)
            counts = choice.reshape(batch, CROPS, PATCHES).sum(2)
            assert (counts.sum(1) == CROPS * round(ratio * PATCHES)).all()
            total = 4 * round(ratio * PATCHES)
            for row, (_, share) in zip(counts, both, strict=True):
                assert ((row[1:] - total * share / share.sum()).abs() < 1).all()
            uneven += int((counts[:, 1:].amax(1) > counts[:, 1:].amin(1)).sum())
            kept = cut(prompt["attention_mask"], staying(prompt["input_ids"], choice)).bool()
            close(sweep(view, prompt)["logits"], expected, kept)
    assert uneven, "some image has crops of unequal counts"


def test_a_step_without_pictures_runs_in_onnx_runtime(llava: tuple[Any, Graphs]) -> None:
    """As one does after a prompt: products of none of them must not be refused."""
    graph = llava[1]["fx"]
    prompt = inputs(graph, 2)
    view = gw.optimize(graph, "globalcom2{ratio=0.5}", samples=[prompt]).graph
    step = next_step(prompt, sweep(view, prompt))
    assert step is not None and not len(step["pixel_values"])
    logits = gw.compile(view, backend="onnxruntime")(**step)["logits"]
    torch.testing.assert_close(logits, sweep(view, step)["logits"], rtol=1e-4, atol=1e-4)


def test_globalcom2_and_others_by_picture(llava: tuple[Any, Graphs], models: Models) -> None:
    """Each picture keeps as many, and merges within itself; what has no crops is refused."""
    graph = llava[1]["onnx"]
    prompt = inputs(graph, 2)
    for recipe, count in (
        ("diverse{keep=10}", 10), ("similarity{keep=10 merge=true}", 10), ("tome{r=1}", 35),
        ("fopru{keep=15 strategy=row}", 15),
    ):  # fmt: skip
        logits = sweep(gw.optimize(graph, recipe, samples=[prompt]).graph, prompt)["logits"]
        assert logits.shape[1] == prompt["input_ids"].shape[1] - TOKENS + count, recipe
        assert logits.isfinite().all()
    for recipe, message in (
        ("globalcom2{ratio=0}", "must be above 0 and at most 1"),
        ("globalcom2{grid=2by2}", "is not a grid of crops"),
        ("globalcom2{grid=1x3}", "4 crops are no grid of 1x3: give theirs, as grid=1x4"),
        ("globalcom2{ratio=0.01}", "keeps none of 9 patches"),
        ("aim{merge=11}", "not divisible among the 5 pictures.*: 10 is"),
        ("aim{merge=10}", "prune_to=2: the language model has the blocks 0 to 1"),
        ("fopru{keep=20 strategy=row}", "whole rows of 3 patches in each of 5 pictures: 15 or 30"),
    ):
        with pytest.raises(BadInput, match=message):
            gw.optimize(graph, recipe, samples=[prompt])
    with pytest.raises(BadInput, match="an image is one picture here: there are no crops"):
        gw.optimize(models.plain["fx"], "globalcom2{ratio=0.25}")
