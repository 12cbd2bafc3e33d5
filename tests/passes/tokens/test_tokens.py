"""Token passes against the model's own modules, cut by boolean masks with eager attention."""

from __future__ import annotations

import re
from pathlib import Path

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import empty_past, next_step
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.vision import find_image_tokens

from ... import models as small_models
from .llava import (
    FRAMES,
    IMAGE,
    LAYERS,
    PATCHES,
    Batch,
    Models,
    best,
    chosen_in,
    close,
    cls_scores,
    cut,
    decoded,
    places,
    prompts,
    run,
    staying,
    transformers,
)

# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "count"), [("fx", 5), ("onnx", 1), ("onnx", 15)])
def test_fastervlm_equals_a_boolean_mask(models: Models, kind: str, count: int) -> None:
    """On 200 images."""
    first = prompts(3)
    view = gw.optimize(models.plain[kind], f"fastervlm{{keep={count}}}", samples=[first]).graph
    with torch.no_grad():
        for seed in range(5 if kind == "fx" else 2):
            batch = prompts(40 if kind == "fx" else 8 - seed, seed)
            chosen = best(cls_scores(models.eager, batch["pixel_values"]), count)
            expected, _ = run(models.eager, batch, layer=0, chosen=chosen, renumber=True)
            assert torch.equal(chosen_in(view, batch), places(chosen))
            kept = cut(batch["attention_mask"], staying(batch["input_ids"], chosen)).bool()
            close(sweep(view, batch)["logits"], expected, kept)


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_vtc_cls_sums_over_layers(models: Models, kind: str) -> None:
    recipe = "vtc-cls{keep=5 layers=2}"
    view = gw.optimize(models.plain[kind], recipe, samples=[prompts(3)]).graph
    differs = 0
    with torch.no_grad():
        for seed in range(3):
            batch = prompts(8, seed)
            chosen = best(cls_scores(models.eager, batch["pixel_values"], 2), 5)
            last = best(cls_scores(models.eager, batch["pixel_values"]), 5)
            differs += int((chosen != last).sum())
            expected, _ = run(models.eager, batch, layer=0, chosen=chosen, renumber=True)
            assert torch.equal(chosen_in(view, batch), places(chosen))
            kept = cut(batch["attention_mask"], staying(batch["input_ids"], chosen)).bool()
            close(sweep(view, batch)["logits"], expected, kept)
    assert differs, "the sum chooses other tokens than the last layer alone"


def test_damro_leaves_out_what_cls_looks_at_most(models: Models) -> None:
    """Three of 16; and fewer where nearly all are kept."""
    batch = prompts(8)
    with torch.no_grad():
        order = cls_scores(models.eager, batch["pixel_values"]).argsort(1, descending=True)
    for kind, count, skipped in (("fx", 5, 3), ("onnx", 15, 1)):
        recipe = f"fastervlm{{keep={count} background=damro outliers=3}}"
        view = gw.optimize(models.plain[kind], recipe, samples=[prompts(3)]).graph
        columns = order[:, skipped : skipped + count].sort(1).values
        assert torch.equal(chosen_in(view, batch), columns)


def test_vtc_cls_of_one_layer_is_fastervlm(models: Models) -> None:
    batch = prompts(3)
    one, other = (
        gw.optimize(models.plain["onnx"], recipe, samples=[batch]).graph
        for recipe in ("vtc-cls{keep=5 layers=1}", "fastervlm{keep=5}")
    )
    assert torch.equal(sweep(one, batch)["logits"], sweep(other, batch)["logits"])


@pytest.mark.parametrize(
    ("kind", "layer", "count"), [("fx", 2, 8), ("onnx", 1, 5), ("onnx", 3, 1)]
)
def test_fastv_equals_a_boolean_mask(models: Models, kind: str, layer: int, count: int) -> None:
    """On 200 images."""
    recipe = f"fastv{{layer={layer} keep={count}}}"
    view = gw.optimize(models.plain[kind], recipe, samples=[prompts(3)]).graph
    with torch.no_grad():
        for seed in range(5 if kind == "fx" else 2):
            batch = prompts(40 if kind == "fx" else 8 - seed, seed)
            expected, chosen = run(models.eager, batch, layer=layer, count=count)
            assert torch.equal(chosen_in(view, batch), places(chosen))
            kept = cut(batch["attention_mask"], staying(batch["input_ids"], chosen)).bool()
            close(sweep(view, batch)["logits"], expected, kept)


@pytest.mark.parametrize(
    ("kind", "name"), [("fx", "random-tokens"), ("onnx", "uniform-tokens")]
)
def test_the_baselines_keep_the_same_places_everywhere(
    models: Models, kind: str, name: str
) -> None:
    view = gw.optimize(models.plain[kind], f"{name}{{keep=25%}}", samples=[prompts(2)]).graph
    columns = {"random-tokens": [0, 6, 12, 15], "uniform-tokens": [2, 6, 10, 14]}[name]
    batch = prompts(3, 7)
    chosen = torch.zeros(3, PATCHES, dtype=torch.bool)
    chosen[:, columns] = True
    with torch.no_grad():
        expected, _ = run(models.eager, batch, layer=0, chosen=chosen, renumber=True)
    kept = cut(batch["attention_mask"], staying(batch["input_ids"], chosen)).bool()
    close(sweep(view, batch)["logits"], expected, kept)


@pytest.mark.parametrize(("kind", "keep"), [("fx", "100%"), ("onnx", "16")])
def test_all_kept_is_bit_identical(models: Models, kind: str, keep: str) -> None:
    """The cut is not made; a pass that makes one nevertheless is told by ``sites`` as well."""
    batch = prompts(3)
    graph = models.plain[kind]
    names = ("fastervlm", "fastv", "random-tokens", "uniform-tokens")
    recipe = ",".join(f"{name}{{keep={keep}}}" for name in names)
    pruned = gw.optimize(graph, recipe, samples=[batch])
    raised = graph.copy()
    canonicalize(raised)
    assert torch.equal(sweep(pruned.graph, batch)["logits"], sweep(raised, batch)["logits"])
    for done in pruned.report.passes:
        assert "all 16 image tokens" in done.result.notes[-1]


def test_two_cuts_in_a_row(models: Models) -> None:
    recipe = "uniform-tokens{keep=8},fastv{layer=1 keep=50%},fastv{layer=3 keep=1}"
    batch = prompts(3)
    outputs = []
    for graph in models.plain.values():
        pruned = gw.optimize(graph, recipe, samples=[batch])
        sites = [p.result.sites[0].shape for p in pruned.report.passes]
        assert sites == [(16, 8), (8, 4), (4, 1)]
        outputs.append(sweep(pruned.graph, batch)["logits"])
    assert outputs[0].shape[1] == batch["input_ids"].shape[1] - 15
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_blocks_leave_and_weights_shrink_behind_a_cut(models: Models) -> None:
    recipe = (
        "fastervlm{keep=4},fastv{layer=2 keep=2},drop-blocks{score=random count=1 seed=1},"
        "quantize{bits=8 group=0 accuracy_level=0}"
    )
    batch = prompts(3)
    outputs = []
    for graph in models.plain.values():
        pruned = gw.optimize(graph, recipe, samples=[batch])
        dropped = pruned.report.passes[2].result
        assert [site for site, _ in dropped.refused] == ["block 1"], "fastv reads its attention"
        assert len(recognize(pruned.graph).blocks) == 2 + LAYERS - 1
        outputs.append(sweep(pruned.graph, batch)["logits"])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


# --- steps with a cache -------------------------------------------------------------------------

STEPS = 12
"""``bench.token_steps`` goes 32, with all methods."""


@pytest.mark.parametrize(
    ("kind", "recipe", "layer", "renumber"),
    [
        ("onnx", "fastervlm{keep=5}", 0, True),
        ("fx", "uniform-tokens{keep=5}", 0, True),
        ("fx", "fastv{keep=5}", 2, False),
        ("onnx", "fastv{keep=5}", 2, False),
    ],
)
def test_steps_after_a_pruned_prompt(
    models: Models, kind: str, recipe: str, layer: int, renumber: bool
) -> None:
    """Equal to one forward over prompt and words with the prompt's choice."""
    graph = models.cached[kind]
    types = {n: graph.type(v) for n, v in zip(graph.input_names(), graph.inputs(), strict=True)}
    sample = prompts(4, 3)
    view = gw.optimize(graph, recipe, samples=[sample | empty_past(types, sample)]).graph
    for batch, steps in ((4, STEPS), (1, 3)):
        prompt = prompts(batch, 3)
        words = torch.randint(1, IMAGE, (batch, steps), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            if recipe.startswith("uniform"):
                chosen = torch.zeros(batch, PATCHES, dtype=torch.bool)
                chosen[:, [(2 * i + 1) * 16 // 10 for i in range(5)]] = True
            elif renumber:
                chosen = best(cls_scores(models.eager, prompt["pixel_values"]), 5)
            else:
                chosen = run(models.eager, prompt, layer=layer, count=5)[1]
            more = torch.ones_like(words)
            whole = prompt | {
                "input_ids": torch.cat([prompt["input_ids"], words], 1),
                "attention_mask": torch.cat([prompt["attention_mask"], more], 1),
            }
            expected, _ = run(models.eager, whole, layer=layer, chosen=chosen, renumber=renumber)
        logits, lengths = decoded(view, prompt, words)
        whole_length = prompt["input_ids"].shape[1]
        assert lengths == [whole_length] * layer + [whole_length - 11] * (LAYERS - layer)
        close(logits, expected[:, -steps - 1 :])


@pytest.mark.parametrize(
    "recipe", ["fastervlm{keep=5}", "random-tokens{keep=8},fastv{keep=5}"]
)
def test_a_pruned_graph_with_a_cache_has_an_onnx_form(models: Models, recipe: str) -> None:
    """In ONNX Runtime it gives what the FX graph gives: for the prompt, and for steps after it."""
    prompt = prompts(4, 3)
    graph = models.cached["fx"]
    types = {n: graph.type(v) for n, v in zip(graph.input_names(), graph.inputs(), strict=True)}
    prompt |= empty_past(types, prompt)
    view = gw.optimize(graph, recipe, samples=[prompt]).graph
    assert view.kind == "fx"
    executable = gw.compile(view, backend="onnxruntime")
    batch: Batch | None = prompt
    for _ in range(3):
        assert batch is not None
        expected = sweep(view, batch)
        actual = executable(**batch)
        for name, value in expected.items():
            assert actual[name].shape == value.shape
            assert (actual[name] - value).norm() <= 1e-5 * value.norm()
        batch = next_step(batch, expected)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("fastervlm{keep=0}", "keep=0 must be at least 1"),
        ("fastervlm{keep=0%}", "above 0 %"),
        ("fastervlm{keep=101%}", "at most 100 %"),
        ("fastervlm{keep=17}", "keep=17 of 16 image tokens is 17; between 1 and 16 can be"),
        ("fastervlm{keep=some}", "neither a count, as 144, nor a share, as 25%"),
        ("uniform-tokens{keep=1%}", "keep=1% of 16 image tokens is 0; between 1 and 16"),
        ("fastervlm{keep=4 outliers=2}", "is an option of background=damro"),
        ("fastv{layer=0}", "to prune before the language model, use fastervlm"),
        ("fastv{layer=4}", "the blocks 0 to 3"),
        ("uniform-tokens{keep=8},fastervlm{keep=4}", "pruned before already"),
        ("uniform-tokens{keep=8},vtc-cls{keep=4 layers=1}", "pruned before already"),
        ("vtc-cls{keep=4}", "layers=7: the vision tower has 2 layers"),
        ("vtc-cls{keep=4 layers=0}", "layers=0 must be at least 1"),
    ],
)
def test_bad_options(models: Models, recipe: str, message: str) -> None:
    with pytest.raises(BadInput, match=f"(?i){re.escape(message)}"):
        gw.optimize(models.plain["onnx"], recipe, samples=[prompts(2)])


@pytest.mark.parametrize(
    ("name", "lacks"),
    [("llama", "vision tower: it takes no images"), ("vit", "language model: its")],
)
def test_a_model_of_text_or_of_images_alone_is_refused(name: str, lacks: str) -> None:
    small = getattr(small_models, name)(layers=1)
    graph = small_models.plain(small)
    with pytest.raises(BadInput, match=rf"no {lacks}.*vision-language model"):
        gw.optimize(graph, "fastervlm{keep=4}", samples=[small.inputs])
    if name == "llama":
        with pytest.raises(BadInput, match="It needs a vision tower, of a classifier or"):
            gw.optimize(graph, "tome{r=2}", samples=[small.inputs])


def test_a_tower_without_cls_token_is_refused(tmp_path: Path, models: Models) -> None:
    """All of the tower's tokens go on, as those of SigLIP do: no first one is cut off."""
    config = models.eager.config.to_dict() | {
        "vision_feature_select_strategy": "full", "image_seq_length": PATCHES + 1,
    }  # fmt: skip
    config["text_config"]["num_hidden_layers"] = 1
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**config))
    model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"no CLS token.*uniform-tokens"):
        gw.optimize(load(tmp_path, cache=False), "fastervlm{keep=4}")


# --- structure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_where_images_enter(models: Models, kind: str, cache: bool) -> None:
    view = (models.cached if cache else models.plain)[kind].copy()
    canonicalize(view)
    images = find_image_tokens(view, recognize(view))
    assert (images.grid, images.patches, images.pictures, images.count) == ((4, 4), 16, 1, 16)
    assert images.cls_token
    assert (len(images.tower), len(images.language)) == (2, LAYERS)
    assert [name.split(".")[-1] for name in images.projector] == ["linear_1", "linear_2"]
    assert images.attention.q.startswith("model.vision_tower")
    assert ".layers.1." in images.attention.q
    shape = view.type(images.features).shape
    assert shape is not None and shape[1:] == (16, 24)


def test_a_pruned_graph_refuses_inputs_of_another_case(models: Models, videos: Models) -> None:
    """Another resolution, number of frames or of images than traced, and a prompt without its
    image: in words, by the reference and by ONNX Runtime."""
    one, seen = prompts(2), prompts(2, pictures=FRAMES)
    views = [
        gw.optimize(loaded.plain["onnx"], "uniform-tokens{keep=6}", samples=[batch]).graph
        for loaded, batch in ((models, one), (videos, seen))
    ]
    pixels = one["pixel_values"]
    twice = {name: torch.cat([value, value], 1) for name, value in one.items()}
    for view, batch, message in (
        (views[0], one | {"pixel_values": torch.zeros(2, 3, 40, 40)}, r", 3, 32, 32\]"),
        (views[1], seen | {"pixel_values": seen["pixel_values"][:, :5]}, r", 6, 3, 32, 32\]"),
        (views[0], twice | {"pixel_values": pixels}, "images of pixel_values"),
        (views[0], one | {"pixel_values": pixels[:0]}, "in input input_ids and 0 in input pixel_"),
    ):
        with pytest.raises(BadInput, match=message):
            sweep(view, batch)
        with pytest.raises(BadInput, match=message):
            gw.compile(view, backend="onnxruntime")(**batch)
