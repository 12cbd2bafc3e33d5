"""Phi-4-multimodal for onnxruntime-genai: crops, of which it says sizes and what is filled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from graphwright.backends.artifacts import genai_kinds, genai_sounds
from graphwright.backends.artifacts.genai_kinds import KINDS, check_prompt
from graphwright.backends.artifacts.genai_pictures import write_pictured
from graphwright.backends.onnx.lowering import lowered
from graphwright.backends.onnx.model_files import write_model
from graphwright.ir.core.errors import Refusal
from graphwright.ir.core.view import View
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


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[View, Any, Path]:
    """The graph of a folder whose tower hears as many bands as the runtime makes, the library's
    model, and the parts."""
    folder = tmp_path_factory.mktemp("phi4mm")
    family = FAMILIES["phi4-multimodal"]
    audio = family.sizes["audio_config"] | {"input_size": 80, "nemo_final_size": 10}
    save(replace(family, sizes={**family.sizes, "audio_config": audio}), folder)
    graph = load(folder)
    assert isinstance(graph.source.original, ModuleOriginal)
    out = folder / "out"
    out.mkdir()
    write_model(lowered(graph).model, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genai_kinds, "PHI_TOKEN", 96)
        patch.setattr(genai_sounds, "TOKEN", 95)
        write_pictured(graph, out)
    return graph, graph.source.original.make(), out


def logits(
    out: Path, ids: torch.Tensor, images: torch.Tensor, sounds: torch.Tensor
) -> torch.Tensor:
    rows = {"image_features": images, "audio_features": sounds}
    stream = run(out / "embedding.onnx", {"input_ids": ids, **rows})
    return run(out / "text.onnx", {"inputs_embeds": stream, "attention_mask": torch.ones_like(ids)})


def close(expected: torch.Tensor, given: torch.Tensor) -> bool:
    measured = compare({"x": expected}, {"x": given})["x"]
    return measured.rel_l2 is not None and measured.rel_l2 < 1e-5


def test_parts_give_what_the_library_gives(written: tuple[View, Any, Path]) -> None:
    """Of two images; of another size, and of a crop that is not full, the tower fails."""
    graph, library, out = written
    told = json.loads((out / "genai_config.json").read_text())["model"]
    assert told["type"] == "phi4mm"
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
    assert close(expected, logits(out, ids, rows, torch.zeros(0, 32)))
    for other in (
        {"image_sizes": taken["image_sizes"].flip(1)},
        {"image_attention_mask": given["image_attention_mask"].tril()},
    ):
        (name,) = other
        with pytest.raises(Exception, match=f"pictures of 8 x 16 pixels, and {name} says another"):
            run(out / "vision.onnx", given | other)


@pytest.mark.parametrize("seen", [False, True])
def test_sounds_of_two_lengths_beside_an_image_and_alone(
    seen: bool, written: tuple[View, Any, Path]
) -> None:
    """What leads a sound into the text is another matrix where the prompt has an image, too."""
    graph, library, out = written
    rng = torch.Generator().manual_seed(0)
    frames = torch.randn(2, 40, 80, generator=rng)
    mask = torch.arange(40) < torch.tensor([[17], [40]])
    image = [96] * len(graph.source.prompt) if seen else []
    ids = torch.tensor([[5, *[95] * 3, 8, *image, *[95] * 5, 9, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = torch.zeros(0, 32)
    if seen:
        pixels = torch.randn(1, 3, 3, 8, 8, generator=rng)
        inputs = as_the_library_takes(library, inputs | {"pixel_values": pixels})
        rows = run(out / "vision.onnx", {
            "pixel_values": pixels, "image_sizes": inputs["image_sizes"],
            "image_attention_mask": inputs["image_attention_mask"].float()})  # fmt: skip
    with torch.no_grad():
        expected = library(
            **inputs, audio_input_features=frames, audio_attention_mask=mask,
            audio_embed_sizes=[3, 5],
        ).logits  # fmt: skip
    heard = {
        "audio_embeds": frames, "audio_attention_mask": mask,
        "audio_sizes": torch.tensor([3, 5]), "audio_projection_mode": torch.tensor([2 + seen]),
    }  # fmt: skip
    told = json.loads((out / "genai_config.json").read_text())["model"]
    assert {*told["speech"]["inputs"].values()} == {*heard}
    assert "audio_features" in told["embedding"]["inputs"]
    sounds = run(out / "speech.onnx", heard)
    assert sounds.shape == (8, 32)
    assert close(expected, logits(out, ids, rows, sounds))


def test_a_sound_that_is_too_long(written: tuple[View, Any, Path]) -> None:
    """The library cuts it, and its pieces do not see each other."""
    with pytest.raises(Exception, match="hears sounds of at most 500 steps"):
        run(written[2] / "speech.onnx", {
            "audio_embeds": torch.zeros(1, 4001, 80),
            "audio_attention_mask": torch.ones(1, 4001, dtype=torch.bool),
            "audio_sizes": torch.tensor([501]), "audio_projection_mode": torch.tensor([2])},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("audio", "words", "reason"),
    [
        ({"audio_token_id": 95}, {}, "95 stands for a sound in config.json, and onnxruntime-genai"),
        ({"input_size": 16}, {}, "its tower hears 16 bands, and onnxruntime-genai makes 80"),
        ({}, {"<|endoftext11|>": 7}, r"<\|endoftext11\|> is not token 200011 of tokenizer.json"),
    ],
)
def test_a_tower_that_the_runtime_does_not_feed(
    audio: dict[str, int], words: dict[str, int], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    with pytest.raises(Refusal, match=reason):
        genai_sounds._check(tmp_path, {"audio_config": audio})


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
