"""One folder, several paths: each is the library's model of those layers, on bytes that are there
once."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load

transformers: Any = importlib.import_module("transformers")
IDS = torch.tensor([[3, 9, 27, 5]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, View]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    fx = load(folder)
    return model, {"fx": fx, "onnx": translated(fx)}


def expected(model: Any, layers: list[int]) -> torch.Tensor:
    own = model.model.layers
    try:
        model.model.layers = torch.nn.ModuleList([own[i] for i in layers])
        model.config.num_hidden_layers = len(layers)
        with torch.no_grad():
            logits: torch.Tensor = model(IDS, use_cache=False).logits
    finally:
        model.model.layers, model.config.num_hidden_layers = own, len(own)
    return logits


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_paths_share_the_data_file(llama: Any, kind: str, tmp_path: Path) -> None:
    model, graphs = llama
    alone = gw.export(graphs[kind], tmp_path / "alone")
    out = gw.export(graphs[kind], tmp_path / "out", paths={"fast": "0,2", "deep": "0-2,2"})
    data = "model.onnx.data"
    assert (out / data).read_bytes() == (alone / data).read_bytes()
    for name, layers in ((None, [0, 1, 2]), ("fast", [0, 2]), ("deep", [0, 1, 2, 2])):
        run = gw.compile(out, path=name)
        logits = run(input_ids=IDS, attention_mask=torch.ones_like(IDS))["logits"]
        torch.testing.assert_close(logits, expected(model, layers), rtol=1e-4, atol=1e-4)
        assert len([n for n in run.input_names if n.endswith(".key")]) == len(layers)
    paths = json.loads((out / "graphwright.json").read_text())["paths"]
    assert {n: (p["blocks"], p["added_bytes"]) for n, p in paths.items()} == {
        "fast": ("0,2", 0), "deep": ("0-2,2", 0)
    }  # fmt: skip
    assert paths["fast"]["weight_bytes"] < paths["deep"]["weight_bytes"]
    weights = gw.load(out, path="fast").weights()
    assert not any(".layers.1." in name for name in weights)
    assert (out / "path-fast.onnx").stat().st_size < 0.5 * (out / data).stat().st_size


def test_bad_input(llama: Any, tmp_path: Path) -> None:
    _, graphs = llama
    for paths, message in (
        ({"a b": "0"}, "the path's name 'a b'"),
        ({"x": "0-9"}, "there is no block 3; there are 0 to 2"),
        ({"x": "0,2,1"}, "comes first after a later one"),
    ):
        with pytest.raises(BadInput, match=message):
            gw.export(graphs["fx"], tmp_path / "out", paths=paths)
    out = gw.export(graphs["fx"], tmp_path / "out", paths={"fast": "0,2"})
    with pytest.raises(BadInput, match="there is no path 'fats'; did you mean fast"):
        gw.load(out, path="fats")
    (out / "path-fast.onnx").write_bytes(b"x" * (out / "path-fast.onnx").stat().st_size)
    with pytest.raises(BadInput, match=r"path-fast\.onnx: not as it was written"):
        gw.compile(out, path="fast")
