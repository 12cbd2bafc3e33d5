"""Layers of attention in many spellings, and of one that is not read as ``sdpa``, start where the
library's do; where no attention is seen, depth refuses."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.moves import Path, follow
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import last_tower, recognize

transformers: Any = importlib.import_module("transformers")
LAYERS, VOCAB = 2, 40
IDS = torch.arange(12).reshape(2, 6)


def bloom() -> tuple[Any, str]:
    """Positions are added within the product."""
    config = transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=LAYERS, n_head=4, use_cache=False
    )
    return transformers.BloomModel(config), "h"


def deberta() -> tuple[Any, str]:
    """Three products of matrices are added up in each row of scores."""
    config = transformers.DebertaV2Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        intermediate_size=48, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=4, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.DebertaV2Model(config), "encoder.layer"


class Called(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return hidden


class TalkingLayer(torch.nn.Module):
    """Heads that mix their logits before the softmax (arXiv 2003.02436), which ``sdpa`` cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mix = torch.nn.Linear(8, 24), torch.nn.Linear(2, 2)
        self.out = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        logits = self.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = torch.softmax(logits * mask[:, None, None], -1)
        x = x + (weights @ v).transpose(1, 2).flatten(2)
        state: torch.Tensor = x + torch.relu(self.out(x))
        return state


class Talking(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(VOCAB, 8)
        self.layers = torch.nn.ModuleList(TalkingLayer() for _ in range(LAYERS))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor]:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return (x,)


def talking() -> tuple[Any, str]:
    return Talking(), "layers"


@pytest.mark.parametrize(
    ("make", "kind", "read"), [(bloom, "onnx", 1), (talking, "onnx", 0), (deberta, "fx", 1)]
)
def test_a_path_equals_the_models_own_layers(
    make: Callable[[], tuple[Any, str]], kind: str, read: int
) -> None:
    torch.manual_seed(0)
    model, place = make()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    graph = trace(Called(model).eval(), kwargs=inputs)
    graph = graph if kind == "fx" else translated(graph)
    canonicalize(graph)
    follow(graph, last_tower(recognize(graph)), Path.of((0,)), rule="path")
    structure = recognize(graph)
    assert [len(block.sub_blocks) for block in structure.blocks] == [2]
    assert len(structure.attentions) == read
    del model.get_submodule(place)[1]
    with torch.no_grad():
        expected = Called(model)(**inputs)
    (actual,) = sweep(graph, inputs).values()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class Mixer(torch.nn.Module):
    """Layers that join tokens and then features, without attention (arXiv 2105.01601)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(LAYERS))
        self.features = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for tokens, features in zip(self.tokens, self.features, strict=True):
            x = x + torch.relu(tokens(x.transpose(1, 2))).transpose(1, 2)
            x = x + torch.relu(features(x))
        return x


@pytest.mark.parametrize("recipe", ["path{blocks=0}", "drop-blocks{score=random}"])
def test_without_any_attention_a_layer_is_not_known(recipe: str) -> None:
    graph = trace(Mixer().eval(), (torch.randn(2, 6, 8),))
    with pytest.raises(BadInput, match=r"repeat after 2: tokens.0; features.0. Which"):
        gw.optimize(graph, recipe)
