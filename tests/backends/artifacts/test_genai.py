"""``genai_config.json``: written for decoders of text with a cache, with the graph's own sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import graphwright as gw
import onnx_ir
import pytest
import torch
from graphwright.backends.artifacts.genai import genai_config
from graphwright.backends.artifacts.genai_pictures import write_genai
from graphwright.backends.onnx.lowering import lowered
from graphwright.ir.structure.cache_slots import POSITIONS, past_name, present_name, state_name
from graphwright.ir.vocab.targets import CPU, GENAI

SMALLEST = {"type", "context_length", "vocab_size", "eos_token_id", "pad_token_id", "decoder"}
"""The runtime refuses keys that it does not know; these and ``bos_token_id`` it has long known."""


def folder(path: Path, kind: str = "Llama", **settings: Any) -> Path:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(path)
    return path


def test_the_file_says_what_the_graph_is(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", bos_token_id=3, eos_token_id=[5, 6], pad_token_id=None)
    view = gw.optimize(gw.load(source), "path{blocks=0,0,1}").graph
    out = gw.export(view, tmp_path / "out")
    config = json.loads((out / "genai_config.json").read_text())
    assert set(config) == {"model", "search"}
    assert set(config["model"]) == SMALLEST | {"bos_token_id"}
    assert config["model"] | {"decoder": None} == {
        "type": "llama", "context_length": 64, "vocab_size": 160, "bos_token_id": 3,
        "eos_token_id": [5, 6], "pad_token_id": 5, "decoder": None,
    }  # fmt: skip
    assert config["model"]["decoder"] == {
        "filename": "model.onnx", "head_size": 8, "num_key_value_heads": 2,
        "num_hidden_layers": 3,  # a cache for each time that a block runs
    }  # fmt: skip
    assert config["search"] == {"max_length": 64, "past_present_share_buffer": False}
    axes = {name: str(graph_input.shape) for name, graph_input in written(out).items()}
    assert axes["attention_mask"] == "[batch_size,total_sequence_length]"
    assert axes["past_key_values.2.key"] == "[batch_size,2,past_sequence_length,8]"
    again = gw.export(gw.load(out), tmp_path / "again")
    assert {name: str(graph_input.shape) for name, graph_input in written(again).items()} == axes
    gw.export(view, out)  # a folder with the file is still ours


def written(folder: Path) -> dict[str, onnx_ir.Value]:
    """The inputs of an artifact's graph as its file has them."""
    return {str(value.name): value for value in onnx_ir.load(folder / "model.onnx").graph.inputs}


def test_names_that_the_runtime_lacks_are_its_neutral_one(tmp_path: Path) -> None:
    view = gw.load(folder(tmp_path / "source", "StableLm"))
    config = genai_config(view, view.source.folder)
    assert config is not None and config["model"]["type"] == "decoder"


class Pictured(torch.nn.Module):
    """What a decoder has, with a cache, and an image among its inputs."""

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, past: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        keys = torch.cat([past, pixel_values[:, None]], 2)
        logits = (input_ids[..., None] + pixel_values.sum((1, 2))[:, None, None]).expand(-1, -1, 9)
        return {"logits": logits, present_name(0, "key"): keys}


@pytest.mark.parametrize("image", [True, False])
def test_models_that_read_images_have_none(image: bool, tmp_path: Path) -> None:
    """The same graph has one where the input is a position, which the runtime gives it."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    args = (torch.ones(1, 3), torch.ones(1, 2, 4), torch.ones(1, 1, 5, 4))
    view = gw.trace(Pictured(), args, dynamic_shapes={})
    graph = lowered(view)
    names = ["input_ids", "pixel_values" if image else POSITIONS, past_name(0, "key")]
    for value, name in zip(graph.inputs(), names, strict=True):
        value.name = name
    assert (genai_config(graph, str(tmp_path)) is None) == image


class Kept(torch.nn.Module):
    """What a decoder has, with two parts of what it keeps."""

    def forward(
        self, input_ids: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        logits = input_ids[..., None].expand(-1, -1, 9) + first.mean() + second.mean()
        return {"logits": logits, "first": first + 1, "second": second + 1}


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        (past_name(0, "value"), 4, ""), (state_name(1, "conv"), 4, "past.1.conv is a state, and"),
        (past_name(0, "value"), 2, "0.key is .*1, 5, 4. and its values are .*1, 5, 2., which it"),
    ],
)  # fmt: skip
def test_what_it_makes_no_cache_for_is_said(
    name: str, width: int, message: str, tmp_path: Path
) -> None:
    """A latent of DeepSeek or MiniCPM3 has another width than what is rotated beside it."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    args = (torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 1, 5, 4), torch.ones(1, 1, 5, width))
    view = gw.trace(Kept(), args, dynamic_shapes={})
    for side, names in (("in", (past_name(0, "key"), name)), ("out", ("present.a", "present.b"))):
        values = view.inputs() if side == "in" else view.outputs()
        set_names = view.set_inputs if side == "in" else view.set_outputs
        first = "input_ids" if side == "in" else "logits"
        set_names(dict(zip((first, *names), values, strict=True)))
    view.source.folder = str(tmp_path)
    for target in (CPU, GENAI):
        notes = write_genai(view, lowered(view), tmp_path, target)
        assert (tmp_path / "genai_config.json").exists() == (not message)
        if message and target is GENAI:
            assert re.search(f"no genai_config.json, .* does not run it: .*{message}", notes[0])


def test_without_a_cache_there_is_none(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    out = gw.export(gw.load(source, cache=False), tmp_path / "out")
    assert not (out / "genai_config.json").exists()
