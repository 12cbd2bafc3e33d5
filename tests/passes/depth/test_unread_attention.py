"""Attention that is not read as ``sdpa`` starts a layer too; where none is seen, depth refuses."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.lowering import translated
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.trace import trace
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize

transformers: Any = importlib.import_module("transformers")
LAYERS, VOCAB = 2, 40
IDS = torch.arange(12).reshape(2, 6)


def bloom() -> tuple[Any, str]:
    """Positions are added within the product."""
    config = transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=LAYERS, n_head=4, use_cache=False
    )
    return transformers.BloomModel(config), "h"


def mpt() -> tuple[Any, str]:
    config = transformers.MptConfig(
        vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=LAYERS, max_seq_len=32, use_cache=False
    )
    return transformers.MptModel(config), "blocks"


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
        made: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return made


@pytest.mark.parametrize(("make", "kind"), [(bloom, "fx"), (mpt, "onnx"), (deberta, "fx")])
def test_a_path_equals_the_models_own_layers(
    make: Callable[[], tuple[Any, str]], kind: str
) -> None:
    torch.manual_seed(0)
    model, place = make()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    graph = trace(Called(model).eval(), kwargs=inputs)
    graph = graph if kind == "fx" else translated(graph)
    found = gw.optimize(graph, "path{blocks=0}")
    assert [len(block.sub_blocks) for block in recognize(found.graph).blocks] == [2]
    del model.get_submodule(place)[1]
    with torch.no_grad():
        expected = Called(model)(**inputs)
    (actual,) = sweep(found.graph, inputs).values()
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
