"""Other models of images and text for onnxruntime-genai than Qwen's line, whose parts are in
``test_pictured``: what each is told, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from graphwright.backends.artifacts import genai_kinds
from graphwright.backends.artifacts.genai import settings_of
from graphwright.backends.artifacts.genai_kinds import (
    KINDS,
    check_prompt,
    kind_of,
    processing,
    processor,
)
from graphwright.backends.artifacts.genai_pictures import (
    _named_outputs,
    _placed,
    _state_names,
    write_pictured,
)  # fmt: skip
from graphwright.backends.artifacts.pictured_tower import tower_part
from graphwright.backends.artifacts.pictures import Pictures, pictures_of
from graphwright.backends.onnx.lowering import lowered
from graphwright.backends.onnx.model_files import write_model
from graphwright.ir.core.errors import Refusal
from graphwright.ir.load.hf.pictures import as_the_library_takes
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.original import ModuleOriginal
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.verify import compare
from graphwright.ir.vocab.targets import GENAI
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES


@pytest.mark.parametrize("name", ["gemma3-vl", "mistral3", "qwen3-vl"])
def test_parts_give_what_the_library_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two images in one prompt, as the runtime hands features on, and of none."""
    monkeypatch.setattr(genai_kinds, "GEMMA_TOKENS", 4)
    save(FAMILIES[name], tmp_path)
    graph = load(tmp_path)
    original = graph.source.original
    assert isinstance(original, ModuleOriginal)
    library: Any = original.make()
    out = tmp_path / "out"
    out.mkdir()
    write_model(lowered(graph).model, out)
    write_pictured(graph, out)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "internvl"}))
    (said,) = write_pictured(graph, out, GENAI)
    assert not write_pictured(graph, out)
    assert "does not run it: it has no type for pictures in a prompt of internvl; of mod" in said
    model = json.loads((out / "genai_config.json").read_text())["model"]
    assert model["type"] == {"gemma3-vl": "gemma3", "qwen3-vl": "qwen3_vl"}.get(name, name)
    tokens, sides = {"gemma3-vl": (4, (16, 16))}.get(name, (6, (16, 24)))
    image = [94, *[96] * tokens, 95] if name != "qwen3-vl" else [94, *[96] * tokens, 93]
    ids = torch.tensor([[5, *image, 8, *image, 9, 7]])
    pixels = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0))
    for images in (pixels, pixels[:0]):
        asked = ids if len(images) else ids[:, [0, -2, -1]]
        inputs = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
        taken = as_the_library_takes(library, inputs | ({"pixel_values": images}
                                                        if len(images) else {}))  # fmt: skip
        with torch.no_grad():
            expected = library(**taken).logits
        given = {**inputs, **taken, "position_ids": places(library, taken)}
        rows = torch.zeros(0, model["decoder"]["hidden_size"])
        if len(images):
            rows = run(out, "vision", model["vision"], given)["image_features"]
            assert rows.shape[:-1] == ((2, tokens) if name == "gemma3-vl" else (2 * tokens,))
        stream = run(out, "embedding", model["embedding"], given | {"image_features": rows})
        outputs = run(out, "text", model["decoder"], {**given, **stream})
        measured = compare({"x": expected}, {"x": outputs["logits"]})["x"]
        assert measured.rel_l2 is not None and measured.rel_l2 < 1e-5


def places(library: Any, taken: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the runtime counts them, of Qwen's line."""
    if "mm_token_type_ids" not in taken:
        return torch.arange(taken["input_ids"].shape[1]).expand(3, 1, -1)
    counted: torch.Tensor = library.model.get_rope_index(
        taken["input_ids"], mm_token_type_ids=taken["mm_token_type_ids"],
        image_grid_thw=taken["image_grid_thw"], attention_mask=taken["attention_mask"],
    )[0]  # fmt: skip
    return counted


def run(folder: Path, part: str, told: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What a part gives, of the inputs that the runtime is told of and of an empty cache."""
    session = onnxruntime.InferenceSession(str(folder / f"{part}.onnx"))
    named = {put.name: put for put in session.get_inputs()}
    caches = {name: torch.zeros(1, put.shape[1], 0, put.shape[3]).numpy()
              for name, put in named.items() if name.startswith("past")}  # fmt: skip
    assert {*told["inputs"]} == {*named} - {*caches}
    feeds = {name: given[name].contiguous().numpy() for name in told["inputs"]}
    results = session.run(None, feeds | caches)
    names = [put.name for put in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, results), strict=True))


def test_the_runtime_writes_as_many_tokens_for_every_image_of_gemma() -> None:
    check_prompt(KINDS["gemma3"], None, (9,) * 256)
    with pytest.raises(Refusal, match=r"4 tokens \(mm_tokens_per_image\), and it writes 256"):
        check_prompt(KINDS["gemma3"], None, (9,) * 4)


@pytest.mark.parametrize(("tokens", "said"), [
    ({"[IMG]": 9, "[IMG_BREAK]": 2, "[IMG_END]": 3}, None),
    ({"[IMG]": 9, "[IMG_END]": 3}, r"its prompts have \[IMG_BREAK\], which tokenizer.json lacks"),
    ({"[IMG]": 8, "[IMG_BREAK]": 2, "[IMG_END]": 3},
     r"\[IMG\] is token 8 of tokenizer.json, and 9 stands for an image"),
])  # fmt: skip
def test_words_of_prompts_are_tokens(
    tokens: dict[str, int], said: str | None, tmp_path: Path
) -> None:
    kind = kind_of({"model_type": "llava", "vision_config": {"model_type": "pixtral"}})
    check_prompt(kind, tmp_path, (9,))  # nothing is known where there is no tokenizer
    added = [{"content": word, "id": token} for word, token in tokens.items()]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {}}))
    if said is None:
        check_prompt(kind, tmp_path, (9,))
        return
    with pytest.raises(Refusal, match=said):
        check_prompt(kind, tmp_path, (9,))


def test_channels_are_in_the_library_s_order(tmp_path: Path) -> None:
    """A step of the runtime that is called ConvertRGB turns them round."""
    settings = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "resample": 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    made = processor(KINDS["gemma3"], Pictures(4, 6, 4, 1, 0), processing(tmp_path))["processor"]
    steps = {s["operation"]["type"]: s["operation"]["attrs"] for s in made["transforms"]}
    assert [*steps] == ["DecodeImage", "Resize", "Rescale", "Normalize", "Permute3D"]
    assert steps["Normalize"] == {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    assert (steps["Resize"]["width"], steps["Resize"]["interpolation"]) == (24, "CUBIC")


def test_states_are_named_since_the_runtime_names_them_otherwise() -> None:
    held = ["past.0.conv", "past.0.recurrent", "past_key_values.1.key", "past_key_values.1.value"]
    conv, recurrent = ("past_conv_names", "past.%d.conv"), ("past_recurrent_names",
                                                            "past.%d.recurrent")  # fmt: skip
    assert _state_names(dict.fromkeys(held), "past") == dict([conv, recurrent])
    assert _named_outputs(dict.fromkeys(held[2:])) == {}
    assert _named_outputs(dict.fromkeys(["past.0.conv"])) == {
        "outputs": {"present_conv_names": "present.%d.conv"}
    }


class Tower(torch.nn.Module):
    """One feature a square of two by two patches of two pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.merge = torch.nn.Conv2d(3, 5, 4, 4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.merge(pixel_values).flatten(2).transpose(1, 2).flatten(0, 1)


def test_patches_come_with_their_places(tmp_path: Path) -> None:
    """Gemma 4's: rows of patches, channels last. Of another size than the graph's it fails."""
    tower, config = Tower(), {"model_type": "gemma4", "vision_config": {
        "patch_size": 2, "pooling_kernel_size": 2}}  # fmt: skip
    pixels = torch.rand(2, 3, 8, 12)
    shapes = {"pixel_values": {0: torch.export.Dim("images")}}
    view = trace(tower, kwargs={"pixel_values": pixels}, dynamic_shapes=shapes)
    pictures = pictures_of(view, config)
    assert pictures == Pictures(4, 6, 2, 2, 0, placed=True)
    part = tower_part(view, view.outputs()[0], pictures)
    write_model(lowered(part).model, tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    given = {name: tensor.numpy() for name, tensor in _placed(pixels, pictures).items()}
    assert given["pixel_position_ids"][1, 7].tolist() == [1, 1]
    row = given["pixel_values"][1, 7].reshape(2, 2, 3)
    assert (row == pixels[1, :, 2:4, 2:4].permute(1, 2, 0).numpy()).all()
    (features,) = session.run(None, given)
    torch.testing.assert_close(torch.from_numpy(features), tower(pixels))
    given["pixel_position_ids"] = given["pixel_position_ids"][..., ::-1].copy()
    with pytest.raises(Exception, match=r"out of (data )?bounds"):
        session.run(None, given)
    made = processor(KINDS["gemma4"], pictures, {})["processor"]["transforms"]
    assert made[-1]["operation"]["attrs"] == {
        "patch_size": 2, "pooling_kernel_size": 2, "max_soft_tokens": 6}  # fmt: skip
    assert [s["operation"]["type"] for s in made] == [
        "DecodeImage", "Resize", "Gemma4ImageTransform"]  # fmt: skip


def test_ends_of_the_whole_config_go_before_its_text_s(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "eos_token_id": [1, 106],
              "text_config": {"model_type": "gemma3_text", "eos_token_id": 1}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = settings_of(str(tmp_path))
    assert (found["eos_token_id"], found["model_type"]) == ([1, 106], "gemma3_text")
