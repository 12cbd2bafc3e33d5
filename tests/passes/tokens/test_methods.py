"""Each score and schedule of image tokens against the library's modules, cut by boolean masks."""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput, Refusal
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import next_step
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.vision import find_image_tokens
from graphwright.passes.tokens.fopru import FoPru
from torch import Tensor

from .llava import (
    IMAGE,
    LAYERS,
    PATCHES,
    Models,
    check_in_onnx_runtime,
    chosen_in,
    close,
    cut,
    decoded,
    last_will_pay,
    places,
    projected,
    prompts,
    run,
    saved,
    spoken,
    staged,
    staying,
    with_past,
)
from .reference_scores import KEPT, diverse, focal_rows, merged, paired, unlike, with_keep

# --- what each method keeps -----------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_equals_a_boolean_mask(models: Models, name: str) -> None:
    """On 200 images, and what the text says then."""
    for kind, graph in models.plain.items():
        view = gw.optimize(graph, with_keep(name, 8), samples=[prompts(3)]).graph
        for seed in range(5 if kind == "fx" else 1):
            batch = prompts(40 if kind == "fx" else 8, seed)
            with torch.no_grad():
                chosen = KEPT[name](models.eager, batch["pixel_values"], 8)
                expected, _ = run(models.eager, batch, layer=0, chosen=chosen, renumber=True)
            columns = places(chosen)
            if "row" in name:
                columns = columns[:, ::4] // 4
            assert torch.equal(chosen_in(view, batch), columns)
            kept = cut(batch["attention_mask"], staying(batch["input_ids"], chosen)).bool()
            close(sweep(view, batch)["logits"], expected, kept)


def components(picture: Tensor) -> list[set[int]]:
    """Of a picture of 4 x 4 patches the areas of equal ones."""
    flat = picture.unflatten(2, (4, 8)).unflatten(1, (4, 8)).permute(1, 3, 0, 2, 4).flatten(2)
    areas: list[set[int]] = []
    for start in range(PATCHES):
        if any(start in area for area in areas):
            continue
        area, edge = {start}, [start]
        while edge:
            y, x = divmod(edge.pop(), 4)
            for i, j in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= i < 4 and 0 <= j < 4
                if inside and 4 * i + j not in area and torch.equal(flat[i, j], flat[y, x]):
                    area.add(4 * i + j)
                    edge.append(4 * i + j)
        areas.append(area)
    return areas


def test_each_area_of_equal_patches_keeps_one_before_any_keeps_two(models: Models) -> None:
    generator = torch.Generator().manual_seed(5)
    looks = torch.randn(3, 3, 8, 8, generator=generator)
    which = torch.randint(0, 3, (30, 4, 4), generator=generator)
    batch = prompts(30) | {"pixel_values": looks[which].permute(0, 3, 1, 4, 2, 5).flatten(4)
                           .flatten(2, 3)}  # fmt: skip
    for kind in ("fx", "onnx"):
        view = gw.optimize(models.plain[kind], "ui-components{keep=6}", samples=[prompts(3)]).graph
        for picture, row in zip(batch["pixel_values"], chosen_in(view, batch), strict=True):
            chosen, areas = set(row.tolist()), components(picture)
            counts = [len(area & chosen) for area in areas]
            full = min(6 // len(areas), 1)
            assert all(n >= full for n in counts), (areas, chosen)
            most = max(counts)
            assert all(n >= most - 1 or n == len(a) for n, a in zip(counts, areas, strict=True))


# --- merging --------------------------------------------------------------------------------------


def test_dropped_tokens_go_into_their_nearest(models: Models) -> None:
    batch = prompts(20, 4)
    with torch.no_grad():
        x = projected(models.eager, batch["pixel_values"])
        choice = unlike(models.eager, batch["pixel_values"], 5)
        expected = spoken(models.eager, batch, merged(x, choice), {0: choice}, renumber=True)
    kept = cut(batch["attention_mask"], staying(batch["input_ids"], choice)).bool()
    for graph in models.plain.values():
        recipe = "similarity{keep=5 merge=true}"
        view = gw.optimize(graph, recipe, samples=[prompts(3)]).graph
        close(sweep(view, batch)["logits"], expected, kept)


def linked(before: Tensor, here: Tensor) -> Tensor:
    """PageRank of AIM; of softmax(logits / .1) is left what the tenth power of softmax leaves."""
    weights = before**10 / (before**10).sum(3, keepdim=True)
    start = (before[:, :, -1:] > 0).float()
    ranked = start / start.sum(3, keepdim=True)
    for _ in range(5):
        ranked = ranked @ weights
    return ranked.square().mean(1).sqrt().squeeze(1)


def test_aim_merges_and_prunes(models: Models) -> None:
    batch_size = 4
    batch = prompts(batch_size, 6)
    with torch.no_grad():
        features = torch.zeros(batch_size, PATCHES, 24)
        chosen = torch.zeros(batch_size, PATCHES, dtype=torch.bool)
        for row, x in enumerate(projected(models.eager, batch["pixel_values"])):
            vectors, homes = paired(x, 6)
            features[row, homes], chosen[row, homes] = vectors, True
        cuts = {0: chosen, 2: 3, 3: 0}
        expected = spoken(models.eager, batch, features, cuts, score=linked, renumber=[0])
    for graph in models.plain.values():
        recipe = "aim{merge=6 prune_from=1 prune_to=3}"
        pruned = gw.optimize(graph, recipe, samples=[prompts(3)])
        sites = [site.shape for site in pruned.report.passes[0].result.sites]
        assert sites == [(16, 6), (6, 3), (3, 0)]
        actual = sweep(pruned.graph, batch)["logits"]
        close(actual[:, -2:], expected[:, -2:])


# --- schedules, with a cache ----------------------------------------------------------------------

STEPS = 12
"""``bench.token_steps`` goes 32, with all methods."""


@pytest.mark.parametrize(
    ("kind", "recipe", "cuts", "renumber"),
    [
        ("onnx", "pyramid-drop", {1: 8, 2: 4, 3: 2}, True),
        ("fx", "visual-exit{layer=1}", {1: 0}, False),
        ("onnx", "diverse{keep=5}", {0: 5}, True),
        ("onnx", "aim{merge=100% prune_from=1 prune_to=3}", {2: 8, 3: 0}, False),
    ],
)
def test_steps_after_a_prompt_in_stages(
    models: Models, kind: str, recipe: str, cuts: dict[int, int | Tensor], renumber: bool
) -> None:
    """As one forward over prompt and words with the prompt's choices; batches of 1 and 4."""
    graph = models.cached[kind]
    view: View | None = None
    for batch, steps in ((4, STEPS), (1, 3)):
        prompt = prompts(batch, 3)
        words = torch.randint(1, IMAGE, (batch, steps), generator=torch.Generator().manual_seed(1))
        if view is None:
            view = gw.optimize(graph, recipe, samples=[with_past(graph, prompt)]).graph
        score = linked if recipe.startswith("aim") else last_will_pay
        if 0 in cuts:
            cuts[0] = diverse(models.eager, prompt["pixel_values"], 5)
        with torch.no_grad():
            _, choices = staged(models.eager, prompt, cuts, score=score, renumber=renumber)
            whole = prompt | {
                "input_ids": torch.cat([prompt["input_ids"], words], 1),
                "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(words)], 1),
            }
            chosen = dict(zip(cuts, choices, strict=True))
            expected, _ = staged(models.eager, whole, chosen, renumber=renumber)
        logits, lengths = decoded(view, prompt, words)
        length = prompt["input_ids"].shape[1]
        expected_lengths = [length] * LAYERS
        for block, choice in chosen.items():
            expected_lengths[block:] = [length - PATCHES + int(choice[0].sum())] * (LAYERS - block)
        assert lengths == expected_lengths
        close(logits, expected[:, -steps - 1 :])


# --- entropy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_logits_are_scaled_by_the_tokens_that_are_left(models: Models, kind: str) -> None:
    """In the library's model too; blocks before the cut stay as they are."""
    batch = prompts(4, 3)
    recipe = "fastv{layer=2 keep=4},keep-entropy{text=6}"
    scaled = gw.optimize(models.plain[kind], recipe, samples=[prompts(3)])
    result = scaled.report.passes[-1].result
    assert [site.shape for site in result.sites] == [(22, 10)] * 2
    columns = chosen_in(scaled.graph, batch)
    chosen = torch.zeros(4, PATCHES, dtype=torch.bool).scatter(1, columns, True)
    late = [layer.self_attn for layer in models.eager.model.language_model.layers[2:]]
    before = late[0].scaling
    try:
        for site in late:
            site.scaling = before * (math.log(10) / math.log(22)) ** 0.5
        with torch.no_grad():
            expected, _ = run(models.eager, batch, layer=2, chosen=chosen)
    finally:
        for site in late:
            site.scaling = before
    kept = cut(batch["attention_mask"], staying(batch["input_ids"], chosen)).bool()
    close(sweep(scaled.graph, batch)["logits"], expected, kept)


# --- what is exported -----------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("recipe", "cache"),
    [
        ("similarity{keep=4 merge=true}", False), ("fopru{keep=4 strategy=row}", False),
        ("aim", True), ("tome{r=2}", True),
    ],
)  # fmt: skip
def test_the_onnx_form_has_no_data_dependent_shape(
    models: Models, recipe: str, cache: bool
) -> None:
    """And gives in ONNX Runtime what the FX graph gives: for a prompt, and for steps after it."""
    graph = (models.cached if cache else models.plain)["fx"]
    check_in_onnx_runtime(graph, recipe, prompts(4, 3), steps=int(cache))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("keep-entropy", "needs fewer tokens, which no pass before it provides"),
        ("uniform-tokens{keep=8},keep-entropy{text=1}", "text=1 must be at least 2"),
        ("vispruner{keep=4 important=2}", "important=2 must be from 0 to 1"),
        ("ui-components{keep=4 within=-1}", "within=-1 must be at least 0"),
        ("diverse{keep=8},ui-components{keep=4}", "components are of all patches"),
        ("diverse{keep=8},vispruner{keep=4}", "CLS scores are of all patches"),
        ("fopru{keep=6 strategy=row}", "keep=6 is not a number of whole rows of 4 patches in each"),
        ("fopru{keep=2 strategy=row}", "1 pictures: 4 or 8 is"),
        ("fopru{keep=8 strategy=column}", "strategy"),
        ("pyramid-drop{stages=1}", "stages=1 must be at least 2"),
        ("pyramid-drop{stages=5}", "stages=5: the language model has 4 blocks"),
        ("pyramid-drop{ratio=0.1}", "ratio=0.1 leaves none of 16 image tokens from block 2 on"),
        ("pyramid-drop{ratio=1.5}", "must be above 0 and at most 1"),
        ("visual-exit{layer=0}", "without any layer that sees the image the answer is blind"),
        ("visual-exit{layer=4}", "the blocks 0 to 3"),
        ("visual-exit{layer=2},fastv{layer=3 keep=50%}", "0 image tokens"),
        ("visual-exit{layer=2},visual-exit{layer=3}", "all image tokens left before already"),
        ("aim{merge=0%}", "merge=0% must be above 0 %"),
        ("aim{prune_from=3 prune_to=2}", "the second must be a block behind the first"),
        ("aim{prune_from=3 prune_to=4}", "prune_to=4: the language model has the blocks 0 to"),
        ("diverse{keep=8},aim", "put aim first in the recipe"),
        ("diverse{keep=8},similarity{keep=4}", "it compares all patches"),
        ("uniform-tokens{keep=8},diverse{keep=4}", "it chooses among all patches"),
        ("fastv{layer=2 keep=8},fastv{layer=1 keep=4}", "tokens leave behind block 1 already"),
        ("pyramid-drop,diverse{keep=8}", "put the cut that comes first in the model first"),
    ],
)
def test_bad_options(models: Models, recipe: str, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        gw.optimize(models.plain["onnx"], recipe, samples=[prompts(2)])


# --- the grid of patches --------------------------------------------------------------------------


def test_rows_of_a_grid_that_is_not_square_or_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patches that are taller than wide: 2 rows of 8."""
    tower = importlib.import_module("transformers.models.clip.modeling_clip").CLIPVisionEmbeddings
    original = tower.__init__

    def initialize(self: Any, config: Any) -> None:
        original(self, config)
        self.patch_embedding = torch.nn.Conv2d(3, 16, (16, 4), (16, 4), bias=False)

    monkeypatch.setattr(tower, "__init__", initialize)
    model = saved(tmp_path)
    graph = load(tmp_path, cache=False)
    view = gw.optimize(graph, "fopru{keep=8 strategy=row}", samples=[prompts(3)]).graph
    batch = prompts(8, 1)
    with torch.no_grad():
        chosen = focal_rows(model, batch["pixel_values"], 8, columns=8)
        expected, _ = run(model, batch, layer=0, chosen=chosen, renumber=True)
    assert torch.equal(chosen_in(view, batch), places(chosen)[:, ::8] // 8)
    kept = cut(batch["attention_mask"], staying(batch["input_ids"], chosen)).bool()
    close(sweep(view, batch)["logits"], expected, kept)
    with pytest.raises(BadInput, match="keep=4 is not a number of whole rows of 8 patches"):
        gw.optimize(graph, "fopru{keep=4 strategy=row}", samples=[batch])
    canonicalize(graph)
    images = find_image_tokens(graph, recognize(graph))
    assert images.grid == (2, 8)
    with pytest.raises(Refusal, match="strategy=row needs a grid of patches, and none is seen"):
        FoPru(keep="8", strategy="row").check(replace(images, grid=None))


# --- images that no text names --------------------------------------------------------------------


def test_a_step_may_be_given_an_image_where_no_token_leaves(models: Models) -> None:
    """Nothing reads it; of a pruned model words would leave in its place, in every runtime."""
    graph, prompt = models.cached["fx"], with_past(models.cached["fx"], prompts(2))
    step = next_step(prompt, sweep(graph, prompt))
    assert step is not None
    shown = step | {"pixel_values": prompt["pixel_values"]}
    assert torch.equal(sweep(graph, shown)["logits"], sweep(graph, step)["logits"])
    pruned = gw.optimize(graph, "uniform-tokens{keep=8}", samples=[prompt]).graph
    following = next_step(prompt, sweep(pruned, prompt))
    assert following is not None
    shown = following | {"pixel_values": prompt["pixel_values"]}
    run = gw.compile(pruned, backend="onnxruntime")
    for call in (run, lambda **inputs: sweep(pruned, inputs)):
        assert call(**following)["logits"].shape[1] == 1
        with pytest.raises(BadInput, match="row 0 of input_ids holds 0 times the token 29, and an"):
            call(**shown)
