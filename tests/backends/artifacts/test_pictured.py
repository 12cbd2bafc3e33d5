"""The parts of a model of images and text for onnxruntime-genai, held to the library's own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.backends.artifacts.artifact import PARTS, PICTURED_FILES
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.hf.pictures import as_the_library_takes
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.original import ModuleOriginal
from graphwright.ir.run.verify import compare
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from graphwright.tools.report import manifest

TOKENS, SIDES = 6, (16, 24)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> View:
    folder = tmp_path_factory.mktemp("qwen2.5-vl")
    save(FAMILIES["qwen2.5-vl"], folder)
    return load(folder)


@pytest.fixture(scope="module")
def whole(graph: View, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gw.export(graph, tmp_path_factory.mktemp("out") / "whole")


def settings(folder: Path) -> Any:
    return json.loads((folder / "genai_config.json").read_text())


def test_parts_give_what_the_library_gives(graph: View, whole: Path) -> None:
    """Of pictures as its processor makes them, and of the places that it counts."""
    original = graph.source.original
    assert isinstance(original, ModuleOriginal)
    library: Any = original.make()
    image = [96] * TOKENS
    ids = torch.tensor([[5, 94, *image, 93, 8], [94, *image, 93, 9, 7]])
    mask = torch.ones_like(ids)
    pixels = torch.randn(2, 3, *SIDES, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    taken = as_the_library_takes(library, inputs)
    rows, grid = taken["pixel_values"], taken["image_grid_thw"]
    places, _ = library.model.get_rope_index(
        ids, mm_token_type_ids=taken["mm_token_type_ids"], image_grid_thw=grid,
        attention_mask=mask,
    )  # fmt: skip
    vision, embedding, text = (gw.compile(whole / PICTURED_FILES[part])
                               for part in ("vision", "embedding", "text"))  # fmt: skip
    features = vision(pixel_values=rows, image_grid_thw=grid)["image_features"]
    stream = embedding(input_ids=ids, image_features=features)["inputs_embeds"]
    outputs = text(inputs_embeds=stream, attention_mask=mask, position_ids=places)
    with torch.no_grad():
        expected = library(**taken).logits
    assert compare({"logits": expected}, {"logits": outputs["logits"]})["logits"].rel_l2 < 1e-5
    # A step: no image, and the places that the runtime counts on.
    word, none = torch.tensor([[3], [4]]), torch.zeros(0, features.shape[1])
    stream = embedding(input_ids=word, image_features=none)["inputs_embeds"]
    caches = {n.replace("present", "past_key_values"): t
              for n, t in outputs.items() if n.startswith("present")}  # fmt: skip
    step = text(
        inputs_embeds=stream, attention_mask=torch.ones(2, ids.shape[1] + 1, dtype=torch.int64),
        position_ids=places.amax((0, 2))[None, :, None].expand(3, -1, -1) + 1, **caches,
    )  # fmt: skip
    longer = inputs | {
        "input_ids": torch.cat([ids, word], 1),
        "attention_mask": torch.ones(2, ids.shape[1] + 1, dtype=torch.int64),
    }
    with torch.no_grad():
        expected = library(**as_the_library_takes(library, longer)).logits[:, -1]
    assert compare({"x": expected}, {"x": step["logits"][:, -1]})["x"].rel_l2 < 1e-5


def test_the_runtime_is_told_of_the_parts(whole: Path) -> None:
    config = settings(whole)
    model = config["model"]
    assert (model["type"], model["image_token_id"], model["vision_start_token_id"]) == (
        "qwen2_5_vl", 96, 94,
    )  # fmt: skip
    assert [model[part]["filename"] for part in ("vision", "embedding", "decoder")] == [*PARTS]
    assert (model["decoder"]["hidden_size"], model["decoder"]["head_size"]) == (32, 8)
    assert (model["vision"]["patch_size"], model["vision"]["spatial_merge_size"]) == (4, 2)
    assert not config["search"]["past_present_share_buffer"]
    steps = json.loads((whole / model["vision"]["config_filename"]).read_text())["processor"]
    resize = next(s["operation"]["attrs"] for s in steps["transforms"]
                  if s["operation"]["type"] == "Resize")  # fmt: skip
    assert (resize["height"], resize["width"], resize["keep_aspect_ratio"]) == (*SIDES, 0)
    sizes = {path.name: path.stat().st_size for path in whole.iterdir()}
    assert not any(name.endswith(".data") for name in sizes if name != "model.onnx.data")
    assert {*PARTS, "model.onnx"} < set(manifest.load(whole).files)


def test_a_picture_of_another_size_is_an_error_that_says_the_size(whole: Path) -> None:
    """Also where it has as many patches."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(whole / "vision.onnx"))
    rows = np.zeros((24, 96), np.float32)
    for grid, wrong in (([1, 4, 6], False), ([1, 6, 4], True)):
        feeds = {"pixel_values": rows, "image_grid_thw": np.array([grid])}
        if not wrong:
            assert session.run(None, feeds)[0].shape == (TOKENS, 32)
            continue
        with pytest.raises(Exception, match="this model reads pictures of 16 x 24 pixels"):
            session.run(None, feeds)


def test_rows_by_their_length_share_their_buffers(graph: View, tmp_path: Path) -> None:
    """As ``target=genai`` writes attention; and again from what was written."""
    out = gw.export(graph, tmp_path / "genai", target="genai")
    assert settings(out)["search"]["past_present_share_buffer"]
    again = gw.export(load(out), tmp_path / "again")
    assert settings(again)["model"]["vision"] == settings(out)["model"]["vision"]


def test_a_pruned_text_is_not_for_the_runtime(graph: View, tmp_path: Path) -> None:
    done = gw.optimize(graph, "uniform-tokens{keep=50%}")
    out = gw.export(done.graph, tmp_path / "out", report=done.report)
    assert not (out / "genai_config.json").exists() and not (out / PARTS[0]).exists()
    known = json.loads((out / "graphwright.json").read_text())
    said = "onnxruntime-genai does not run it: image tokens leave its text"
    assert any(said in note for note in known["notes"])
    assert not any("writing ONNX" in note for step in known["passes"] for note in step["notes"])


def test_a_part_that_was_changed_is_noticed(whole: Path) -> None:
    with (whole / "text.onnx").open("ab") as file:
        file.write(b" ")
    with pytest.raises(BadInput, match=r"text\.onnx"):
        load(whole)
