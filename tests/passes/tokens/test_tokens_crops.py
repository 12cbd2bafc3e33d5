"""Token passes where an image comes as a thumbnail and four quarters."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.fx.view import FxView
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import empty_past
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.vision import find_image_tokens
from torch import Tensor

from ...ir.load.test_hf_llava import prompts, save_llava
from .llava import best, close, cls_scores, cut, run, staying

CROPS, PATCHES = 5, 9
TOKENS = CROPS * PATCHES
Graphs = dict[tuple[str, bool], View]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Graphs]:
    """The library's model, and its graphs by kind and by whether they have a cache."""
    folder = tmp_path_factory.mktemp("crops")
    model = save_llava(folder, image_seq_length=TOKENS)
    model.set_attn_implementation("eager")
    plain, cached = load(folder, cache=False), load(folder, cache=True)
    assert isinstance(plain, FxView) and isinstance(cached, FxView)
    return model, {
        ("fx", False): plain, ("onnx", False): translated(plain),
        ("fx", True): cached, ("onnx", True): translated(cached),
    }  # fmt: skip


def inputs(view: View, batch: int) -> dict[str, Tensor]:
    given = prompts(TOKENS, batch, (CROPS,))
    types = {n: view.type(v) for n, v in zip(view.input_names(), view.inputs(), strict=True)}
    return given | empty_past(types, given)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_the_pictures_are_recognised(made: tuple[Any, Graphs], kind: str, cache: bool) -> None:
    view = made[1][kind, cache].copy()
    canonicalize(view)
    found = find_image_tokens(view, recognize(view))
    assert (found.grid, found.patches, found.pictures) == ((3, 3), PATCHES, CROPS)
    assert found.count == TOKENS


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize(("cache", "each"), [(False, 1), (True, 4)])
def test_fastervlm_keeps_as_many_of_each_picture(
    made: tuple[Any, Graphs], kind: str, cache: bool, each: int
) -> None:
    model, graphs = made
    graph = graphs[kind, cache]
    recipe = f"fastervlm{{keep={CROPS * each}}}"
    view = gw.optimize(graph, recipe, samples=[inputs(graph, 3)]).graph
    for batch in (1, 4):
        given = inputs(graph, batch)
        flat = given | {"pixel_values": given["pixel_values"].flatten(0, 1)}
        with torch.no_grad():
            scores = cls_scores(model, flat["pixel_values"])
            wanted = best(scores, each).reshape(batch, TOKENS)
            expected, _ = run(model, flat, layer=0, chosen=wanted, renumber=True)
        kept = cut(given["attention_mask"], staying(given["input_ids"], wanted)).bool()
        assert kept.shape[1] == given["input_ids"].shape[1] - TOKENS + CROPS * each
        close(sweep(view, given)["logits"], expected, kept)


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize(
    "recipe", ["random-tokens{keep=11}", "uniform-tokens{keep=11}", "fastv{layer=1 keep=11}"]
)
def test_other_passes_count_over_all_pictures(
    made: tuple[Any, Graphs], kind: str, recipe: str
) -> None:
    graph = made[1][kind, False]
    given = inputs(graph, 2)
    found = gw.optimize(graph, recipe, samples=[given])
    assert found.report.passes[0].result.sites[0].shape == (TOKENS, 11)
    logits = sweep(found.graph, given)["logits"]
    assert logits.shape[1] == given["input_ids"].shape[1] - TOKENS + 11
    assert logits.isfinite().all()


def test_a_number_that_the_pictures_cannot_share(made: tuple[Any, Graphs]) -> None:
    graph = made[1]["fx", False]
    with pytest.raises(BadInput, match=r"keep=11 is not divisible among the 5 pictures.*: 10 is"):
        gw.optimize(graph, "fastervlm{keep=11}", samples=[inputs(graph, 2)])
