"""Phi-4-multimodal: its raster of crops is the library's, for images of the size that is bound."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.hf.phi4 import settle, token_count
from graphwright.ir.load.hf.phi4_sound import own_part, sounds_part
from graphwright.ir.load.hf.pictures import as_the_library_takes, image_features
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.original import ModuleOriginal
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import difference
from graphwright.ir.structure.cache_slots import empty_past, next_step
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from graphwright.tools.data.images import Preprocessing
from PIL import Image
from safetensors.torch import load_file, save_file

from .test_families import EXACT
from .test_towers import by_library, prompts

FAMILY = FAMILIES["phi4-multimodal"]
ADAPTED = "model.layers.1.self_attn.qkv_proj"
TOKENS = 2 * (4 + 1) + 1 + 2 * (2 + 1)
"""Two crops of 2 x 2 tokens side by side, the whole image, a token behind each row and between."""


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    """With an adapter in its folder, as the model's own lie there."""
    folder = tmp_path_factory.mktemp("phi4")
    save(FAMILY, folder)
    stem, rng = f"base_model.model.{ADAPTED}", torch.Generator().manual_seed(0)
    width, rows = FAMILY.sizes["hidden_size"], 64
    adapter = folder / "vision-lora"
    adapter.mkdir()
    save_file({f"{stem}.lora_A.weight": torch.randn(3, width, generator=rng),
               f"{stem}.lora_B.weight": torch.randn(rows, 3, generator=rng)},
              adapter / "adapter_model.safetensors")  # fmt: skip
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["qkv_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return load(folder)


def with_past(view: View, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    types = dict(zip(view.input_names(), map(view.type, view.inputs()), strict=True))
    return inputs | empty_past(types, inputs)


def test_rows_of_two_images_of_one_and_of_none(view: View) -> None:
    """And a step behind them, with the cache."""
    image = [*view.source.prompt]
    assert (len(image), view.source.task) == (TOKENS, "image-text-to-text")
    assert view.source.notes[-3].startswith(f"images are of 8 x 16, which are {TOKENS} tokens")
    inputs = prompts(view, [[5, *image, 7, *image, 8], [6, *image, 9, 10], [3, 4, 5]])
    real = inputs["attention_mask"].bool()
    outputs = sweep(view, with_past(view, inputs))
    expected = by_library(view, inputs)["logits"]
    assert difference(expected[real], outputs["logits"][real]).within(EXACT)
    step = next_step(inputs, outputs)
    assert step is not None
    assert difference(by_library(view, step)["logits"], sweep(view, step)["logits"]).within(EXACT)


def test_a_crop_of_an_odd_number_of_patches_looks_into_a_mirror() -> None:
    transformers: Any = pytest.importorskip("transformers")
    vision = FAMILY.sizes["vision_config"] | {"image_size": 10, "crop_size": 10}
    sizes = {**FAMILY.sizes, "vision_config": vision, "image_grid_pinpoints": [[20, 10]]}
    model = transformers.Phi4MultimodalForCausalLM(transformers.Phi4MultimodalConfig(**sizes))
    embed = model.eval().model.embed_tokens_extend.image_embed
    settle(model)
    pixels = torch.randn(1, 3, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    ids = torch.full((1, token_count(model.config)), 96)
    taken = as_the_library_takes(model, {"input_ids": ids, "pixel_values": pixels})
    with torch.no_grad():
        embed.sub_img_feature_extensor.normal_()
        # The library's grid of such a crop has a side more than its mask.
        mask = torch.ones(1, 3, 6, 6)
        pooled = embed.get_img_features(pixels.flatten(0, 1), torch.ones(3, 5, 5).bool())
        embed.get_img_features = lambda *_, **__: pooled
        expected = embed(ids, torch.zeros(1, ids.shape[1], 32), pixels,
                         taken["image_sizes"], mask)  # fmt: skip
        del embed.get_img_features
        torch.testing.assert_close(image_features(model, pixels)[0], expected)


def test_pictures_of_files_are_cut_into_crops(view: View, tmp_path: Path) -> None:
    """Pixels between -1 and 1, of a processor whose file says nothing of it."""
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    pixels = Preprocessing.of(view).read(tmp_path / "red.png")
    assert pixels.shape == (3, 3, 8, 8)
    assert pixels[:, 0].eq(1).all() and pixels[:, 1:].eq(-1).all()


def test_tokens_leave_by_their_number_in_the_text(view: View) -> None:
    (site,) = gw.plan(view, "uniform-tokens{keep=50%}").passes[0][1].sites
    assert site.shape == (TOKENS, round(TOKENS / 2))


def test_sounds_are_the_library_s_padded_or_not(view: View) -> None:
    """With a mask of frames in every row, and the tower's own choice of what leads on."""
    heard = load(str(view.source.folder), part="sounds")
    assert heard.source.notes[-1].startswith("sounds are of 4000 frames at most")
    assert isinstance(heard.source.original, ModuleOriginal)
    library = heard.source.original.start()
    rng = torch.Generator().manual_seed(0)
    for frames, mode in ((9, 2), (32, 3), (41, 2), (41, 3)):
        lengths = torch.tensor([[frames], [frames // 2], [8]])
        inputs = {
            "audio_embeds": torch.randn(3, frames, 16, generator=rng),
            "audio_attention_mask": torch.arange(frames) < lengths,
            "audio_projection_mode": torch.tensor([mode]),
        }  # fmt: skip
        (expected,), (given,) = library(inputs).values(), sweep(heard, inputs).values()
        assert given.shape == (3, -(-frames // 8), 32)
        assert difference(expected, given).within(EXACT)


def test_parts_of_other_names_and_other_models() -> None:
    for kind, part, says in (
        ("phi4_multimodal", "encoder", "has no part 'encoder': it has sounds"),
        ("llama", "sounds", "has no part 'sounds': Phi-4-multimodal has one"),
    ):
        model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
        with pytest.raises(BadInput, match=says):
            own_part(model, part)
    assert own_part(SimpleNamespace(config=SimpleNamespace(model_type="t5")), "encoder") is None


def test_an_adapter_in_the_folder_is_told_and_folds(view: View) -> None:
    """The library loads it by PEFT alone."""
    adapter = Path(str(view.source.folder)) / "vision-lora"
    (note,) = [note for note in view.source.notes if "adapters in its folder" in note]
    recipe = f"adapter{{path={adapter}}}"
    assert note == f"adapters in its folder are not applied: vision-lora. -p '{recipe}' folds one"
    assert isinstance(view.source.original, ModuleOriginal)
    library: Any = view.source.original.make()
    factors = load_file(adapter / "adapter_model.safetensors")
    down, up = (factors[f"base_model.model.{ADAPTED}.lora_{x}.weight"] for x in "AB")
    inputs = prompts(view, [[5, *view.source.prompt, 7, 8]])
    folded = gw.optimize(view, recipe).graph
    with torch.no_grad():
        library.get_submodule(ADAPTED).weight += 2 * up @ down
        expected = library(**as_the_library_takes(library, inputs)).logits
    given = sweep(folded, with_past(folded, inputs))["logits"]
    assert difference(expected, given).within(EXACT)
    assert not difference(by_library(view, inputs)["logits"], given).within(1e-2)


def test_steps_that_see_chunks_before_them() -> None:
    transformers: Any = pytest.importorskip("transformers")
    audio = FAMILY.sizes["audio_config"] | {"chunk_size": 2, "left_chunk": 1}
    sizes = {**FAMILY.sizes, "audio_config": audio}
    model = transformers.Phi4MultimodalForCausalLM(transformers.Phi4MultimodalConfig(**sizes))
    part = sounds_part(model.eval())
    assert part.by_library is not None
    inputs = part.inputs | {"audio_embeds": torch.randn(2, 69, 16)}
    with torch.no_grad():
        (given,), (expected,) = part.call(model, inputs).values(), part.by_library(
            model, inputs).values()  # fmt: skip
    torch.testing.assert_close(given, expected)


def test_images_of_no_whole_number_of_crops(view: View, tmp_path: Path) -> None:
    config = json.loads((Path(str(view.source.folder)) / "config.json").read_text())
    config["image_grid_pinpoints"] = [[8, 12]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="one size there, of whole crops of 8 x 8"):
        load(tmp_path, allow_missing_weights=True)
