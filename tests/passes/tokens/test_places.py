"""Tokens that stand down and across, in squares of patches: cut as the library's modules are."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.hf.pictures import as_the_library_takes
from graphwright.ir.load.sources import load
from graphwright.tools.bench.family_models import FAMILIES
from torch import Tensor

from ...models import joined
from .llava import Batch, chosen_in, close, decoded, transformers

IMAGE, TOKENS, SIDES = 96, 24, (32, 48)
HALF = "keep=50%"


@dataclass
class Models:
    library: Any
    fx: View
    onnx: View


def models_of(name: str, folder: Any) -> Models:
    family = FAMILIES[name]
    vision = family.sizes["vision_config"] | {"image_size": list(SIDES)}
    config = getattr(transformers, family.config)(**{**family.sizes, "vision_config": vision})
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) * 0.1
    model.save_pretrained(folder)
    graph = load(folder)
    return Models(model, graph, translated(graph))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return models_of("qwen2-vl", tmp_path_factory.mktemp("qwen2-vl"))


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The first layer of its text adds features too."""
    return models_of("qwen3-vl", tmp_path_factory.mktemp("qwen3-vl"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Its tower has its patches in the order of windows."""
    return models_of("qwen2.5-vl", tmp_path_factory.mktemp("qwen2.5-vl"))


def prompts() -> Batch:
    """Padded on the left, an image each."""
    texts = [[5, 6, *[IMAGE] * TOKENS, 7, 8, 9], [4, *[IMAGE] * TOKENS, 3, 2]]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    pixels = torch.randn(2, 3, *SIDES, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def cut_by_the_library(model: Any, batch: Batch, kept: Tensor, words: Tensor, block: int) -> Tensor:
    """Logits where the tokens ``kept`` ``[rows, tokens]`` of each image reach the block and those
    behind it, at the places that they have in the whole prompt, with more words behind."""
    batch = batch | {
        "input_ids": torch.cat([batch["input_ids"], words], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(words)], 1),
    }
    taken = as_the_library_takes(model, batch)
    ids, mask, inner = batch["input_ids"], batch["attention_mask"].bool(), model.model
    positions, _ = inner.get_rope_index(
        ids, mm_token_type_ids=taken["mm_token_type_ids"], attention_mask=mask.long(),
        image_grid_thw=taken["image_grid_thw"],
    )  # fmt: skip
    state = model.get_input_embeddings()(ids).clone()
    given = inner.get_image_features(taken["pixel_values"], taken["image_grid_thw"])
    state[ids == IMAGE] = joined(given.pooler_output)
    beside = [torch.zeros_like(state) for _ in getattr(given, "deepstack_features", ())]
    for level, features in zip(beside, getattr(given, "deepstack_features", ()), strict=True):
        level[ids == IMAGE] = joined(features)
    stays = (ids != IMAGE).clone()
    for row, places in enumerate(kept):
        stays[row, (ids[row] == IMAGE).nonzero().squeeze(1)[places]] = True
    text = inner.language_model
    for number, layer in enumerate(text.layers):
        if number == block:
            state = torch.stack([x[stay] for x, stay in zip(state, stays, strict=True)])
            positions = torch.stack([
                torch.stack([p[stay] for p, stay in zip(axis, stays, strict=True)])
                for axis in positions
            ])  # fmt: skip
            mask = torch.stack([m[stay] for m, stay in zip(mask, stays, strict=True)])
            beside = [
                torch.stack([x[stay] for x, stay in zip(level, stays, strict=True)])
                for level in beside
            ]
        count = state.shape[1]
        seen = (mask[:, None] & torch.ones(count, count).tril().bool())[:, None]
        seen = seen | torch.eye(count).bool()
        turns = text.rotary_emb(state, positions)
        state = layer(state, attention_mask=seen, position_embeddings=turns)
        if number < len(beside):
            state = state + beside[number]
    logits: Tensor = model.lm_head(text.norm(state))
    return logits[:, -1 - words.shape[1] :]


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [("windowed", 0, "fx"), ("windowed", 1, "onnx"), ("stacked", 0, "onnx"), ("stacked", 1, "fx")],
)
def test_kept_tokens_and_what_follows_keep_their_places(
    name: str, block: int, kind: str, request: pytest.FixtureRequest
) -> None:
    """In a prompt, and in steps behind it that read the cache; features that early layers add are
    those of the tokens that are left."""
    models = request.getfixturevalue(name)
    recipe = f"fastv{{layer=1 {HALF}}}" if block else f"uniform-tokens{{{HALF}}}"
    graph = gw.optimize(getattr(models, kind), recipe).graph
    batch, words = prompts(), torch.tensor([[11, 12], [13, 14]])
    with torch.no_grad():
        if block:
            kept = chosen_in(graph, batch | _empty(graph))
        else:
            kept = torch.arange(1, TOKENS, 2).expand(2, -1)
        expected = cut_by_the_library(models.library, batch, kept, words, block)
        steps, lengths = decoded(graph, batch, words)
    assert lengths == [(TOKENS // 2 if number >= block else TOKENS) + 5 for number in range(2)]
    close(steps, expected)


def _empty(graph: View) -> Batch:
    caches = (n for n in graph.input_names() if n.endswith((".key", ".value")))
    shift = {"past_key_values.shift": torch.zeros(2, 1, dtype=torch.int64)}
    return {name: torch.zeros(2, 2, 0, 8) for name in caches} | shift


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_fopru_scores_a_token_by_its_patches(
    windowed: Models, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the library's own attention of its last block gives, in the order of windows."""
    module: Any = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    eager, maps = module.eager_attention_forward, []

    def noted(*args: Any, **options: Any) -> Any:
        result = eager(*args, **options)
        maps.append(result[1])
        return result

    monkeypatch.setattr(module, "eager_attention_forward", noted)
    batch, library = prompts(), windowed.library
    taken = as_the_library_takes(library, batch)
    library.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            library.model.get_image_features(taken["pixel_values"], taken["image_grid_thw"])
    finally:
        library.set_attn_implementation("sdpa")
    index, _ = module.get_vision_window_index(taken["image_grid_thw"][:1], 2, 16, 4)
    received = torch.cat([m.mean(1).sum(1) for m in maps[-2:]])
    scores = received.reshape(2, TOKENS, 4).mean(2)[:, index.argsort()]
    expected = scores.topk(TOKENS // 2).indices.sort().values
    graph = gw.optimize(getattr(windowed, kind), f"fopru{{{HALF}}}").graph
    assert torch.equal(chosen_in(graph, batch | _empty(graph)), expected)
    rows = scores.reshape(2, 4, 6).sum(2).topk(2).indices.sort().values
    graph = gw.optimize(getattr(windowed, kind), f"fopru{{{HALF} strategy=row}}").graph
    chosen = chosen_in(graph, batch | _empty(graph))
    assert torch.equal(chosen, rows)


@pytest.mark.parametrize("name", ["diverse", "similarity", "random-tokens"])
def test_passes_that_ask_for_no_attention(qwen2: Models, name: str) -> None:
    done = gw.optimize(qwen2.fx, f"{name}{{{HALF}}}")
    assert [site.shape for site in done.report.passes[-1].result.sites] == [(TOKENS, TOKENS // 2)]


def test_tokens_are_not_merged_where_early_layers_read_more_of_them(stacked: Models) -> None:
    with pytest.raises(BadInput, match="early layers of the text add features of their own"):
        gw.optimize(stacked.fx, f"similarity{{{HALF} merge=true}}")


def test_no_layer_is_repeated_that_adds_features(stacked: Models) -> None:
    with pytest.raises(BadInput, match=r"features of images join the stream \(DeepStack\)"):
        gw.plan(stacked.fx, "path{blocks=0,0,1}")


def test_no_patch_leaves_a_tower_that_puts_them_together(windowed: Models) -> None:
    with pytest.raises(BadInput, match="24 tokens is 4 patches of the vision tower's"):
        gw.plan(windowed.fx, "tome{r=2}")
