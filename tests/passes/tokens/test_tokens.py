"""Token passes against the model's own modules, cut by boolean masks with eager attention."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import empty_past, next_step
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.vision import find_image_tokens
from torch import Tensor

transformers: Any = importlib.import_module("transformers")

PATCHES, IMAGE, LAYERS, WORDS = 16, 29, 4, 30
Batch = dict[str, Tensor]


@dataclass
class Models:
    """One random LLaVA: the library's, and its graphs by kind, without and with a cache."""

    eager: Any
    plain: dict[str, View]
    cached: dict[str, View]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=32, patch_size=8, hidden_size=16, intermediate_size=24,
            num_hidden_layers=3, num_attention_heads=2, projection_dim=16,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=24, intermediate_size=32, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
        ),
        image_token_id=IMAGE, vision_feature_layer=-2, image_seq_length=PATCHES,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    model.set_attn_implementation("eager")
    plain, cached = load(folder, cache=False), load(folder, cache=True)
    return Models(
        model,
        {"fx": plain, "onnx": translated(plain)},
        {"fx": cached, "onnx": translated(cached)},
    )


def prompts(batch: int, seed: int = 0, more: int = 0) -> Batch:
    """Rows of unequal length, padded on the left, one image each; ``more`` words behind."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> Tensor:
        return torch.randint(1, IMAGE, (count,), generator=generator)

    rows = [
        torch.cat([words(1 + row % 2), torch.full((PATCHES,), IMAGE), words(2 + row % 3 + more)])
        for row in range(batch)
    ]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0)) for r in rows])
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


# --- the reference ------------------------------------------------------------------------------


def cls_scores(model: Any, pixels: Tensor, layers: int = 1) -> Tensor:
    """Of the last layers but one, which makes no features."""
    found = model.model.vision_tower(pixels, output_attentions=True)
    rows: list[Tensor] = [a[:, :, 0, 1:].mean(1) for a in found.attentions[-1 - layers : -1]]
    return torch.stack(rows).sum(0)


def best(scores: Tensor, count: int) -> Tensor:
    """Which of the columns are among each row's ``count`` highest: bool."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(count).indices, True)


def staying(ids: Tensor, chosen: Tensor) -> Tensor:
    """Positions that stay, bool ``[rows, seq]``."""
    keep = ids != IMAGE
    for row, wanted in zip(keep, chosen, strict=True):
        row[(~row).nonzero().squeeze(1)[wanted]] = True
    return keep


def cut(tensor: Tensor, keep: Tensor) -> Tensor:
    return torch.stack([row[k] for row, k in zip(tensor, keep, strict=True)])


def run(
    model: Any, batch: Batch, *, layer: int, chosen: Tensor | None = None, count: int = 0,
    renumber: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits with image tokens cut before ``layer``, and the choice: by the last token's attention
    where none is given."""  # fmt: skip
    inner = model.model
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    hidden = inner.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    features = inner.multi_modal_projector(hidden[-2][:, 1:])
    state = inner.get_input_embeddings()(ids)
    state[ids == IMAGE] = features.flatten(0, 1)
    last = torch.empty(0)
    language = inner.language_model
    length = ids.shape[1]
    places = torch.arange(length).expand(len(ids), -1)
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None]
    for index, block in enumerate(language.layers):
        if index == layer:
            if chosen is None:
                row = last[ids == IMAGE].reshape(len(ids), -1)
                chosen = best(row, count)
            keep = staying(ids, chosen)
            state, places = cut(state, keep), cut(places, keep)
            seen = torch.stack([s[k][:, k] for s, k in zip(seen, keep, strict=True)])
            if renumber:
                places = torch.arange(state.shape[1]).expand(len(ids), -1)
        tables = language.rotary_emb(state, places)
        bias = torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None]
        normed = block.input_layernorm(state)
        given = {"position_embeddings": tables, "attention_mask": bias}
        last = block.self_attn(normed, **given)[1][:, :, -1].mean(1)
        state = block(state, **given)
        state = state[0] if isinstance(state, tuple) else state
    assert chosen is not None
    return model.lm_head(language.norm(state)), chosen


def places(chosen: Tensor) -> Tensor:
    """The same choice as column numbers, ascending."""
    return cut(torch.arange(chosen.shape[1]).expand_as(chosen), chosen)


def chosen_in(view: View, batch: Batch) -> Tensor:
    """The places among the image tokens that the graph chose: the last ascending ``topk``."""
    found: list[Tensor] = []

    def note(node: Any, given: list[Any], results: tuple[Any, ...]) -> None:
        if view.op(node) == "topk" and not view.attrs(node)["largest"]:
            found.append(results[0])

    sweep(view, batch, observe=note)
    return found[-1]


def close(actual: Tensor, expected: Tensor, rows: Tensor | None = None) -> None:
    if rows is not None:
        actual, expected = actual[rows], expected[rows]
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize("count", [1, 5, 15])
def test_fastervlm_equals_a_boolean_mask(models: Models, kind: str, count: int) -> None:
    """On close to 200 images."""
    first = prompts(3)
    view = gw.optimize(models.plain[kind], f"fastervlm{{keep={count}}}", samples=[first]).graph
    with torch.no_grad():
        for seed in range(27 if count == 5 and kind == "fx" else 2):
            batch = prompts(8 - seed % 2, seed)
            wanted = best(cls_scores(models.eager, batch["pixel_values"]), count)
            expected, _ = run(models.eager, batch, layer=0, chosen=wanted, renumber=True)
            assert torch.equal(chosen_in(view, batch), places(wanted))
            kept = cut(batch["attention_mask"], staying(batch["input_ids"], wanted)).bool()
            close(sweep(view, batch)["logits"], expected, kept)


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_vtc_cls_sums_over_layers(models: Models, kind: str) -> None:
    recipe = "vtc-cls{keep=5 layers=2}"
    view = gw.optimize(models.plain[kind], recipe, samples=[prompts(3)]).graph
    differs = 0
    with torch.no_grad():
        for seed in range(3):
            batch = prompts(8, seed)
            wanted = best(cls_scores(models.eager, batch["pixel_values"], 2), 5)
            last = best(cls_scores(models.eager, batch["pixel_values"]), 5)
            differs += int((wanted != last).sum())
            expected, _ = run(models.eager, batch, layer=0, chosen=wanted, renumber=True)
            assert torch.equal(chosen_in(view, batch), places(wanted))
            kept = cut(batch["attention_mask"], staying(batch["input_ids"], wanted)).bool()
            close(sweep(view, batch)["logits"], expected, kept)
    assert differs, "the sum chooses other tokens than the last layer alone"


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_vtc_cls_of_one_layer_is_fastervlm(models: Models, kind: str) -> None:
    batch = prompts(3)
    one, other = (
        gw.optimize(models.plain[kind], recipe, samples=[batch]).graph
        for recipe in ("vtc-cls{keep=5 layers=1}", "fastervlm{keep=5}")
    )
    assert torch.equal(sweep(one, batch)["logits"], sweep(other, batch)["logits"])


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize(("layer", "count"), [(1, 5), (2, 8), (3, 1)])
def test_fastv_equals_a_boolean_mask(models: Models, kind: str, layer: int, count: int) -> None:
    """On close to 200 images."""
    recipe = f"fastv{{layer={layer} keep={count}}}"
    view = gw.optimize(models.plain[kind], recipe, samples=[prompts(3)]).graph
    with torch.no_grad():
        for seed in range(27 if layer == 2 and kind == "fx" else 2):
            batch = prompts(8 - seed % 2, seed)
            expected, wanted = run(models.eager, batch, layer=layer, count=count)
            assert torch.equal(chosen_in(view, batch), places(wanted))
            kept = cut(batch["attention_mask"], staying(batch["input_ids"], wanted)).bool()
            close(sweep(view, batch)["logits"], expected, kept)


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["random-tokens", "uniform-tokens"])
def test_the_baselines_keep_the_same_places_everywhere(
    models: Models, kind: str, name: str
) -> None:
    view = gw.optimize(models.plain[kind], f"{name}{{keep=25%}}", samples=[prompts(2)]).graph
    columns = {"random-tokens": [0, 6, 12, 15], "uniform-tokens": [2, 6, 10, 14]}[name]
    batch = prompts(3, 7)
    wanted = torch.zeros(3, PATCHES, dtype=torch.bool)
    wanted[:, columns] = True
    with torch.no_grad():
        expected, _ = run(models.eager, batch, layer=0, chosen=wanted, renumber=True)
    kept = cut(batch["attention_mask"], staying(batch["input_ids"], wanted)).bool()
    close(sweep(view, batch)["logits"], expected, kept)


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["fastervlm", "fastv", "random-tokens", "uniform-tokens"])
@pytest.mark.parametrize("keep", ["100%", "16"])
def test_all_kept_is_bit_identical(models: Models, kind: str, name: str, keep: str) -> None:
    batch = prompts(3)
    graph = models.plain[kind]
    found = gw.optimize(graph, f"{name}{{keep={keep}}}", samples=[batch])
    raised = graph.copy()
    canonicalize(raised)
    assert torch.equal(sweep(found.graph, batch)["logits"], sweep(raised, batch)["logits"])
    assert "all 16 image tokens" in found.report.passes[0].result.notes[-1]


def test_two_cuts_in_a_row(models: Models) -> None:
    recipe = "uniform-tokens{keep=8},fastv{layer=1 keep=50%},fastv{layer=3 keep=1}"
    batch = prompts(3)
    outputs = []
    for graph in models.plain.values():
        found = gw.optimize(graph, recipe, samples=[batch])
        sites = [p.result.sites[0].shape for p in found.report.passes]
        assert sites == [(16, 8), (8, 4), (4, 1)]
        outputs.append(sweep(found.graph, batch)["logits"])
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
        found = gw.optimize(graph, recipe, samples=[batch])
        dropped = found.report.passes[2].result
        assert [site for site, _ in dropped.refused] == ["block 1"], "fastv reads its attention"
        assert len(recognize(found.graph).blocks) == 2 + LAYERS - 1
        outputs.append(sweep(found.graph, batch)["logits"])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


# --- steps with a cache -------------------------------------------------------------------------

STEPS = 32


def decoded(view: View, prompt: Batch, words: Tensor) -> tuple[Tensor, list[int]]:
    """Logits of the prompt's last position and of each word after it, and the cache's lengths."""
    types = {n: view.type(v) for n, v in zip(view.input_names(), view.inputs(), strict=True)}
    outputs = sweep(view, prompt | empty_past(types, prompt))
    logits = [outputs["logits"][:, -1]]
    lengths = [t.shape[2] for n, t in outputs.items() if n.endswith(".key")]
    padding = prompt["attention_mask"]
    for step in range(words.shape[1]):
        past = lengths[0] + step
        ones = torch.ones(len(words), past + 1, dtype=torch.int64)
        ones[:, : padding.shape[1]] = padding[:, : past + 1]
        caches = {n.replace("present", "past_key_values"): t for n, t in outputs.items()
                  if n.startswith("present")}  # fmt: skip
        outputs = sweep(view, {
            "input_ids": words[:, step : step + 1], "attention_mask": ones,
            "pixel_values": prompt["pixel_values"][:0], **caches,
        })  # fmt: skip
        assert outputs["logits"].shape[1] == 1
        logits.append(outputs["logits"][:, -1])
    return torch.stack(logits, 1), lengths


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("recipe", "layer", "renumber"),
    [
        ("fastervlm{keep=5}", 0, True),
        ("uniform-tokens{keep=5}", 0, True),
        ("fastv{keep=5}", 2, False),
    ],
)
def test_steps_after_a_pruned_prompt(
    models: Models, kind: str, batch: int, recipe: str, layer: int, renumber: bool
) -> None:
    """Equal to one forward over prompt and words with the prompt's choice."""
    prompt = prompts(batch, 3)
    words = torch.randint(1, IMAGE, (batch, STEPS), generator=torch.Generator().manual_seed(1))
    graph = models.cached[kind]
    types = {n: graph.type(v) for n, v in zip(graph.input_names(), graph.inputs(), strict=True)}
    view = gw.optimize(graph, recipe, samples=[prompt | empty_past(types, prompt)]).graph
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
    found, lengths = decoded(view, prompt, words)
    whole_length = prompt["input_ids"].shape[1]
    assert lengths == [whole_length] * layer + [whole_length - 11] * (LAYERS - layer)
    close(found, expected[:, -STEPS - 1 :])


@pytest.mark.parametrize("recipe", ["fastervlm{keep=5}", "fastv{keep=5}", "random-tokens{keep=5}"])
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
        gw.optimize(models.plain["fx"], recipe, samples=[prompts(2)])


@pytest.mark.parametrize(
    ("model", "lacks"),
    [("tiny-llama", "vision tower: it takes no images"), ("tiny-vit", "language model: its")],
)
def test_a_model_of_text_or_of_images_alone_is_refused(model: str, lacks: str) -> None:
    graph = gw.load(f"zoo:{model}", cache=False if model == "tiny-llama" else None)
    with pytest.raises(BadInput, match=rf"no {lacks}.*vision-language model"):
        gw.optimize(graph, "fastervlm{keep=4}", samples=graph.source.samples[:1])


def test_a_tower_without_cls_token_is_refused(tmp_path: Path, models: Models) -> None:
    """All of the tower's tokens go on, as those of SigLIP do: no first one is cut off."""
    config = models.eager.config.to_dict() | {
        "vision_feature_select_strategy": "full", "image_seq_length": PATCHES + 1,
    }  # fmt: skip
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
    found = find_image_tokens(view, recognize(view))
    assert (found.grid, found.patches, found.pictures, found.count) == ((4, 4), 16, 1, 16)
    assert found.cls_token
    assert (len(found.tower), len(found.language)) == (2, LAYERS)
    assert [name.split(".")[-1] for name in found.projector] == ["linear_1", "linear_2"]
    assert found.attention.q.startswith("model.vision_tower")
    assert ".layers.1." in found.attention.q
    shape = view.type(found.features).shape
    assert shape is not None and shape[1:] == (16, 24)
