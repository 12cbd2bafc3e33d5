"""Phi-4-multimodal for onnxruntime-genai: crops, of which it says sizes and what is filled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from graphwright.backends.artifacts import genai_kinds
from graphwright.backends.artifacts.genai_kinds import KINDS, check_prompt
from graphwright.backends.artifacts.genai_pictures import write_pictured
from graphwright.backends.onnx.lowering import lowered
from graphwright.backends.onnx.model_files import write_model
from graphwright.ir.core.errors import Refusal
from graphwright.ir.load.hf.pictures import as_the_library_takes
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.original import ModuleOriginal
from graphwright.ir.run.verify import compare
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES


def run(path: Path, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first result of a part, of an empty cache."""
    session = onnxruntime.InferenceSession(str(path))
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    for put in session.get_inputs():
        if put.name.startswith("past"):
            arrays[put.name] = torch.zeros(1, put.shape[1], 0, put.shape[3]).numpy()
    return torch.from_numpy(session.run(None, arrays)[0])


def test_parts_give_what_the_library_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two images; of another size, and of a crop that is not full, the tower fails."""
    monkeypatch.setattr(genai_kinds, "PHI_TOKEN", 96)
    save(FAMILIES["phi4-multimodal"], tmp_path)
    graph = load(tmp_path)
    assert isinstance(graph.source.original, ModuleOriginal)
    library: Any = graph.source.original.make()
    out = tmp_path / "out"
    out.mkdir()
    write_model(lowered(graph).model, out)
    write_pictured(graph, out)
    told = json.loads((out / "genai_config.json").read_text())["model"]
    assert (told["type"], told["speech"]) == ("phi4mm", {"config_filename": ""})
    image = [96] * len(graph.source.prompt)
    ids = torch.tensor([[5, *image, 8, *image, 9, 7]])
    pixels = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    taken = as_the_library_takes(library, inputs | {"pixel_values": pixels})
    with torch.no_grad():
        expected = library(**taken).logits
    given = {
        "pixel_values": pixels, "image_sizes": taken["image_sizes"],
        "image_attention_mask": taken["image_attention_mask"].float(),
    }  # fmt: skip
    assert {*told["vision"]["inputs"].values()} == {*given}
    rows = run(out / "vision.onnx", given)
    stream = run(out / "embedding.onnx", {"input_ids": ids, "image_features": rows})
    mask = {"attention_mask": inputs["attention_mask"]}
    logits = run(out / "text.onnx", {"inputs_embeds": stream} | mask)
    measured = compare({"x": expected}, {"x": logits})["x"]
    assert measured.rel_l2 is not None and measured.rel_l2 < 1e-5
    for other in (
        {"image_sizes": taken["image_sizes"].flip(1)},
        {"image_attention_mask": given["image_attention_mask"].tril()},
    ):
        (name,) = other
        with pytest.raises(Exception, match=f"pictures of 8 x 16 pixels, and {name} says another"):
            run(out / "vision.onnx", given | other)


def test_steps_take_pixels_by_the_mask_that_comes_between() -> None:
    pictures = genai_kinds.Pictures(4, 8, 2, 2, 0, crop=8)
    made = genai_kinds.processor(KINDS["phi4_multimodal"], pictures, {})["processor"]
    steps = {step["operation"]["type"]: step["operation"] for step in made["transforms"]}
    dynamic = steps["Phi4VisionDynamicPreprocess"]
    assert dynamic["attrs"] == {"dynamic_hd": 2, "dyhd_base_resolution": 8}
    assert steps["Rescale"]["inputs"] == [":0"] and "inputs" not in steps["Normalize"]
    assert steps["Phi4VisionProcessor"]["inputs"] == [":0", f"{dynamic['name']}:1"]
    assert made["output_aligner"] == "phi4-vision-aligner"


def test_the_runtime_looks_for_one_token() -> None:
    check_prompt(KINDS["phi4_multimodal"], None, (200010,))
    with pytest.raises(Refusal, match="96 stands for an image in"):
        check_prompt(KINDS["phi4_multimodal"], None, (96,))
