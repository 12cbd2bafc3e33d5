"""``tome`` against a tower that merges its tokens one by one."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.vision import find_image_tokens
from torch import Tensor

from ... import models as small_models
from .llava import PATCHES, Models, close, cut, prompts, run, staying

Tokens = tuple[Tensor, list[int], list[list[int]]]
"""Vectors, and of each how many patches it stands for and which."""


# --- the reference ------------------------------------------------------------------------------


def attend(layer: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The state after attention, and the keys, the mean of the heads."""
    site, normed = layer.self_attn, layer.layer_norm1(x)
    q, k, v = (p(normed).unflatten(1, (site.num_heads, -1)).transpose(0, 1)
               for p in (site.q_proj, site.k_proj, site.v_proj))  # fmt: skip
    logits = q @ k.mT / q.shape[-1] ** 0.5 + torch.tensor(sizes).log()
    mixed = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return x + site.out_proj(mixed), k.mean(0)


def merge(tokens: Tokens, keys: Tensor, r: int) -> Tokens:
    """The ``r`` even tokens most alike to an odd one become a part of it; the first one stays."""
    x, sizes, members = tokens
    unit = keys / keys.norm(dim=1, keepdim=True)
    likeness = unit @ unit.T
    odd = range(1, len(x), 2)
    pairs = [(max(odd, key=lambda j: float(likeness[i, j])), i) for i in range(2, len(x), 2)]
    pairs.sort(key=lambda pair: -float(likeness[pair[1], pair[0]]))
    gone = {i: j for j, i in pairs[:r]}
    order = [i for i in range(0, len(x), 2) if i not in gone] + list(odd)
    groups = [[i, *(s for s, j in gone.items() if j == i)] for i in order]
    return (
        torch.stack([sum(x[i] * sizes[i] for i in g) / sum(sizes[i] for i in g) for g in groups]),
        [sum(sizes[i] for i in group) for group in groups],
        [[m for i in group for m in members[i]] for group in groups],
    )


def merged(vision: Any, picture: Tensor, r: int, layers: int) -> Tokens:
    x = vision.pre_layrnorm(vision.embeddings(picture[None]))[0]
    tokens: Tokens = (x, [1] * len(x), [[i] for i in range(len(x))])
    for layer in vision.encoder.layers[:layers]:
        state, keys = attend(layer, tokens[0], tokens[1])
        x, sizes, members = merge((state, *tokens[1:]), keys, min(r, (len(state) - 1) // 2))
        tokens = (x + layer.mlp(layer.layer_norm2(x)), sizes, members)
    return tokens


# --- classifiers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> tuple[Any, dict[str, View]]:
    small = small_models.clip_vision(layers=3)
    return small, small_models.raised(small)


@pytest.fixture(scope="module")
def vit() -> tuple[Any, dict[str, View]]:
    small = small_models.vit(layers=2)
    return small, small_models.raised(small)


@pytest.mark.parametrize("r", [1, 3, 100])
def test_a_tower_read_by_its_cls_token(clip: tuple[Any, dict[str, View]], r: int) -> None:
    """A hundred pairs are as many as there are; layers go from 17 to 9, 5, 3 tokens."""
    small, views = clip
    model: Any = small.module
    pixels = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        states = [merged(model.model.vision_model, p, r, 3)[0][0] for p in pixels]
        vision = model.model.vision_model.post_layernorm(torch.stack(states))
        expected = model.model.visual_projection(vision)
    for kind, view in views.items():
        smaller = gw.optimize(view, f"tome{{r={r}}}", samples=[small.inputs])
        assert len(recognize(smaller.graph).blocks) == 3
        sites = [s.shape for s in smaller.report.passes[0].result.sites]
        assert sites == {1: [(17, 16), (16, 15), (15, 14)], 3: [(17, 14), (14, 11), (11, 8)],
                         100: [(17, 9), (9, 5), (5, 3)]}[r]  # fmt: skip
        (actual,) = sweep(smaller.graph, {"pixel_values": pixels}).values()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=kind)


def test_patches_are_given_back_to_who_reads_them(vit: tuple[Any, dict[str, View]]) -> None:
    """ViT's last states have all their rows: those of one token are equal."""
    small, views = vit
    outputs = []
    for view in views.values():
        smaller = gw.optimize(view, "tome{r=6}", samples=[small.inputs])
        outputs.append(sweep(smaller.graph, small.inputs)["last_hidden_state"])
        assert [len(row.unique(dim=0)) for row in outputs[-1]] == [6, 6]
        actual = gw.compile(smaller.graph, backend="onnxruntime")(**small.inputs)
        torch.testing.assert_close(actual["last_hidden_state"], outputs[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_no_pair_merged_changes_no_bit(vit: tuple[Any, dict[str, View]]) -> None:
    small, views = vit
    for view in views.values():
        smaller = gw.optimize(view, "tome{r=0}", samples=[small.inputs]).graph
        before, after = sweep(view, small.inputs), sweep(smaller, small.inputs)
        assert all(torch.equal(before[name], after[name]) for name in before)


# --- vision-language models -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_a_text_reads_each_token_once(models: Models, kind: str) -> None:
    """At the place of the patch that the others were merged into."""
    batch = prompts(4, 3)
    smaller = gw.optimize(models.plain[kind], "tome{r=3}", samples=[batch])
    vision = models.eager.model.vision_tower
    with torch.no_grad():
        rows = [merged(vision, p, 3, 2) for p in batch["pixel_values"]]
        chosen = torch.zeros(4, PATCHES, dtype=torch.bool)
        features = torch.zeros(4, PATCHES, 16)
        for row, (x, _, members) in enumerate(rows):
            for vector, (home, *_) in zip(x[1:], members[1:], strict=True):
                chosen[row, home - 1] = True
                features[row, home - 1] = vector
        assert chosen.sum(1).tolist() == [10] * 4
        expected, _ = run(
            models.eager, batch, layer=0, chosen=chosen, renumber=True, features=features
        )
    kept = cut(batch["attention_mask"], staying(batch["input_ids"], chosen)).bool()
    close(sweep(smaller.graph, batch)["logits"], expected, kept)
    images = find_image_tokens(smaller.graph, recognize(smaller.graph))
    assert (images.count, images.patches, images.pictures) == (10, PATCHES, 1)


def test_a_cut_by_another_score_goes_on_from_it(models: Models) -> None:
    """``tome`` first, and then what a language model's attention says of the tokens left."""
    batch = prompts(3)
    outputs = []
    for graph in models.plain.values():
        smaller = gw.optimize(graph, "tome{r=3},fastv{layer=2 keep=4}", samples=[batch])
        assert [p.result.sites[-1].shape for p in smaller.report.passes] == [(14, 11), (10, 4)]
        outputs.append(sweep(smaller.graph, batch)["logits"])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


# --- refusals -------------------------------------------------------------------------------------


def windows(layers: int) -> Any:
    """A tower whose second half attends within two windows."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 16, 4, 4)
            self.linears = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(6 * layers))

        def forward(self, pixel_values: Tensor) -> Tensor:
            x = self.patches(pixel_values).flatten(2).transpose(1, 2)
            for i in range(layers):
                q, k, v, o, up, down = self.linears[6 * i : 6 * i + 6]
                y = x.reshape(-1, 8, 16) if i else x
                heads = [p(y).unflatten(2, (2, 8)).transpose(1, 2) for p in (q, k, v)]
                y = torch.nn.functional.scaled_dot_product_attention(*heads)
                y = o(y.transpose(1, 2).flatten(2))
                x = x + (y.reshape(-1, 16, 16) if i else y)
                x = x + down(torch.nn.functional.gelu(up(x)))
            return x

    return Net()


def test_a_tower_with_windows_is_refused() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16)
    view = gw.trace(windows(2), (pixels,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    with pytest.raises(BadInput, match="a tower with windows, or with positions inside its blocks"):
        gw.optimize(view, "tome{r=2}", samples=[{"pixel_values": pixels}])


def test_bad_options_and_models(models: Models) -> None:
    view: View = models.plain["fx"]
    with pytest.raises(BadInput, match="r=-1 must be at least 0"):
        gw.optimize(view, "tome{r=-1}")
    with pytest.raises(BadInput, match="tokens were pruned before already: put tome first"):
        gw.optimize(view, "uniform-tokens{keep=8},tome{r=2}", samples=[prompts(2)])
