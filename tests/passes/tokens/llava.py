"""A random LLaVA: its graphs, prompts for it, and the library's modules cut by boolean masks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphwright as gw
import torch
from graphwright.backends.onnx.lowering import lowered, translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import empty_past, next_step
from torch import Tensor

transformers: Any = importlib.import_module("transformers")

PATCHES, IMAGE, LAYERS, WORDS = 16, 29, 4, 30
FRAMES = 6
"""Of a video, where an image is one."""
Batch = dict[str, Tensor]


@dataclass
class Models:
    """One random LLaVA: the library's, and its graphs by kind, without and with a cache."""

    eager: Any
    plain: dict[str, View]
    cached: dict[str, View]


def models_in(folder: Path, pictures: int = 1) -> Models:
    """The model, written to a folder and loaded from there; an image is so many ``pictures``."""
    model = saved(folder, pictures)
    plain, cached = load(folder, cache=False), load(folder, cache=True)
    made = Models(
        model,
        {"fx": plain, "onnx": translated(plain)},
        {"fx": cached, "onnx": translated(cached)},
    )
    for view in (*made.plain.values(), *made.cached.values()):
        canonicalize(view)  # once, not in every test
    return made


def saved(folder: Path, pictures: int = 1) -> Any:
    """The library's model, written to a folder."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=32, patch_size=8, hidden_size=16, intermediate_size=24,
            num_hidden_layers=3, num_attention_heads=2, projection_dim=16,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=24, intermediate_size=32, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        ),
        image_token_id=IMAGE, vision_feature_layer=-2, image_seq_length=pictures * PATCHES,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    model.set_attn_implementation("eager")
    return model


def prompts(batch: int, seed: int = 0, more: int = 0, pictures: int = 1) -> Batch:
    """Rows of unequal length, padded on the left, one image each, of so many ``pictures``;
    ``more`` words behind."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> Tensor:
        return torch.randint(1, IMAGE, (count,), generator=generator)

    rows = [
        torch.cat([
            words(1 + row % 2), torch.full((pictures * PATCHES,), IMAGE), words(2 + row % 3 + more)
        ])
        for row in range(batch)
    ]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0)) for r in rows])
    crops = (pictures,) if pictures > 1 else ()
    pixels = torch.randn(batch, *crops, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


# --- the reference ------------------------------------------------------------------------------


def cls_scores(model: Any, pixels: Tensor, layers: int = 1) -> Tensor:
    """Of the last layers but one, which makes no features."""
    features = model.model.vision_tower(pixels, output_attentions=True)
    rows: list[Tensor] = [a[:, :, 0, 1:].mean(1) for a in features.attentions[-1 - layers : -1]]
    return torch.stack(rows).sum(0)


def projected(model: Any, pixels: Tensor) -> Tensor:
    """Of pictures ``[n, 3, 32, 32]`` the tokens ``[n, 16, 24]``."""
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    features: Tensor = model.model.multi_modal_projector(hidden)
    return features


def best(scores: Tensor, count: int) -> Tensor:
    """Which of the columns are among each row's ``count`` highest: bool."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(count).indices, True)


def staying(ids: Tensor, chosen: Tensor) -> Tensor:
    """Positions that stay, bool ``[rows, seq]``."""
    keep: Tensor = ids != IMAGE
    for row, choice in zip(keep, chosen, strict=True):
        row[(~row).nonzero().squeeze(1)[choice]] = True
    return keep


def cut(tensor: Tensor, keep: Tensor) -> Tensor:
    return torch.stack([row[k] for row, k in zip(tensor, keep, strict=True)])


Score = Callable[[Tensor, Tensor], Tensor]
"""Of the attention of the block before a cut and of the block behind it, ``[rows, heads, queries,
keys]`` each and both of the tokens before the cut, what each token counts: ``[rows, tokens]``."""


def last_paid(before: Tensor, here: Tensor) -> Tensor:
    return before[:, :, -1].mean(1)


def last_will_pay(before: Tensor, here: Tensor) -> Tensor:
    return here[:, :, -1].mean(1)


def staged(
    model: Any, batch: Batch, cuts: Mapping[int, int | Tensor], *, score: Score = last_paid,
    renumber: bool | Collection[int] = False, features: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Logits with image tokens cut before blocks, and each choice among those that came there: what
    is given, or so many by the score; positions are counted anew behind all cuts, or those before
    such blocks. ``features`` are the tower's, where they are not its own."""
    inner = model.model
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if features is None:
        tower = inner.vision_tower(batch["pixel_values"], output_hidden_states=True)
        features = tower.hidden_states[-2][:, 1:]
    return _decoded(model, ids, mask, inner.multi_modal_projector(features), cuts, score, renumber)


def _decoded(
    model: Any, ids: Tensor, mask: Tensor, projected: Tensor, cuts: Mapping[int, int | Tensor],
    score: Score, renumber: bool | Collection[int],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    inner = model.model
    state = inner.get_input_embeddings()(ids)
    state[ids == IMAGE] = projected.flatten(0, 1)
    language = inner.language_model
    length = ids.shape[1]
    places = torch.arange(length).expand(len(ids), -1)
    visible = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None]
    before, choices = torch.empty(0), []
    for index, block in enumerate(language.layers):
        here = _attention(language, block, state, places, visible)
        if index in cuts:
            choice = cuts[index]
            if isinstance(choice, int):
                row = score(before, here)[ids == IMAGE].reshape(len(ids), -1)
                choice = best(row, choice)
            choices.append(choice)
            keep = staying(ids, choice)
            ids, state, places = cut(ids, keep), cut(state, keep), cut(places, keep)
            visible = torch.stack([s[k][:, k] for s, k in zip(visible, keep, strict=True)])
            if renumber is True or (renumber and index in renumber):
                places = torch.arange(state.shape[1]).expand(len(ids), -1)
            here = _attention(language, block, state, places, visible)
        before = here
        inputs = _block_inputs(language, state, places, visible)
        state = block(state, **inputs)
        state = state[0] if isinstance(state, tuple) else state
    return model.lm_head(language.norm(state)), choices


def _block_inputs(language: Any, state: Tensor, places: Tensor, visible: Tensor) -> dict[str, Any]:
    bias = torch.zeros(visible.shape).masked_fill(~visible, -1e9)[:, None]
    return {"position_embeddings": language.rotary_emb(state, places), "attention_mask": bias}


def _attention(
    language: Any, block: Any, state: Tensor, places: Tensor, visible: Tensor
) -> Tensor:
    inputs = _block_inputs(language, state, places, visible)
    weights: Tensor = block.self_attn(block.input_layernorm(state), **inputs)[1]
    return weights


def spoken(
    model: Any, batch: Batch, features: Tensor, cuts: Mapping[int, int | Tensor], **options: Any
) -> Tensor:
    """Logits of ``staged`` by a text that reads features which are projected already."""
    projector = model.model.multi_modal_projector
    forward, projector.forward = projector.forward, lambda x: x
    try:
        logits, _ = staged(model, batch, cuts, features=features, **options)
    finally:
        projector.forward = forward
    return logits


def run(
    model: Any, batch: Batch, *, layer: int, chosen: Tensor | None = None, count: int = 0,
    renumber: bool | Collection[int] = False, features: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``staged`` with one cut."""
    choice = count if chosen is None else chosen
    logits, choices = staged(
        model, batch, {layer: choice}, renumber=renumber, features=features
    )
    return logits, choices[0]


def places(chosen: Tensor) -> Tensor:
    """The same choice as column numbers, ascending."""
    return cut(torch.arange(chosen.shape[1]).expand_as(chosen), chosen)


def chosen_in(view: View, batch: Batch) -> Tensor:
    """The places among the image tokens that the graph chose: the last ascending ``topk``."""
    choices: list[Tensor] = []

    def note(node: Any, operands: list[Any], results: tuple[Any, ...]) -> None:
        if view.op(node) == "topk" and not view.attrs(node)["largest"]:
            choices.append(results[0])

    sweep(view, batch, observe=note)
    return choices[-1]


def close(actual: Tensor, expected: Tensor, rows: Tensor | None = None) -> None:
    if rows is not None:
        actual, expected = actual[rows], expected[rows]
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


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


def with_past(view: View, prompt: Batch) -> Batch:
    """A prompt with nothing in the cache, where the graph has one."""
    types = {n: view.type(v) for n, v in zip(view.input_names(), view.inputs(), strict=True)}
    return prompt | empty_past(types, prompt)


def check_in_onnx_runtime(graph: View, recipe: str, prompt: Batch, steps: int) -> None:
    """ONNX Runtime gives what the rewritten graph gives, for a prompt and steps after it, and no
    shape in the ONNX form depends on data."""
    batch = with_past(graph, prompt)
    expected: Batch = {}
    view = gw.optimize(graph, recipe, samples=[batch]).graph
    onnx = lowered(view)
    ops = {onnx.native_op(node) for node in onnx.nodes()}
    assert not ops & {"NonZero", "Loop", "If", "Scan"}
    executable = gw.compile(view, backend="onnxruntime")
    for step in range(steps + 1):
        if step:
            following = next_step(batch, expected)
            assert following is not None
            batch = following
        expected = sweep(view, batch)
        actual = executable(**batch)
        for name, value in expected.items():
            assert actual[name].shape == value.shape, name
            assert (actual[name] - value).norm() <= 2e-5 * value.norm()
