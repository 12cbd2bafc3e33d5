"""Families of images and text that are a row of a table, and models that see without writing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.original import ModuleOriginal
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import compare, difference
from graphwright.ir.structure.recognize import recognize
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES

from .test_families import EXACT, checked, held, save_shallow


def prompts(view: View, texts: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts padded on the left, and the images that they name."""
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
    token, *_ = prompt = view.source.prompt
    pixels = dict(zip(view.input_names(), view.inputs(), strict=True))["pixel_values"]
    sides = [int(size) for size in (view.type(pixels).shape or ())[1:]]
    images = int((ids == token).sum()) // len(prompt)
    drawn = torch.randn(images, *sides, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": drawn}


def by_library(view: View, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    original = view.source.original
    assert isinstance(original, ModuleOriginal)
    with torch.no_grad():
        return dict(original.call(original.make().eval(), inputs))


@pytest.mark.parametrize("name", ["gemma3-vl", "mistral3", "ovis2"])
def test_rows_of_two_images_of_one_and_of_none(name: str, tmp_path: Path) -> None:
    """Padded on the left, through the cache's graph; 94 and 95 are Ovis2's visual words."""
    save_shallow(name, tmp_path)
    view = load(tmp_path)
    image = [*view.source.prompt]
    texts = [[94, *image, 95, 7, *image, 8], [6, *image, 9, 10, 11, 12], [3, 4, 5]]
    inputs = prompts(view, texts)
    expected = by_library(view, inputs)
    real = inputs["attention_mask"].bool()
    actual = sweep(view, inputs)
    assert difference(expected["logits"][real], actual["logits"][real]).within(EXACT)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("pixtral", "images are of 8 x 12, which are 6 tokens, and the processor writes a word"),
        ("lfm2-vl", "images are of 24 x 16, which are 6 tokens: image_size under vision_config"),
        ("siglip2-vision", "images are of 12 x 20, which are 15 patches: image_size in config"),
    ],
)
def test_images_of_a_size_that_is_bound(name: str, note: str, tmp_path: Path) -> None:
    """Turns of two directions; a table of places that is stretched."""
    view, _ = checked(name, tmp_path)
    assert view.source.notes[0].startswith(note)
    if name == "lfm2-vl":
        check_a_cut_before_layers_with_a_state(view)


def check_a_cut_before_layers_with_a_state(view: View) -> None:
    """The text reads what is left as the library's text does, whose convolutions look at the tokens
    before."""
    graph = gw.optimize(view, "uniform-tokens{keep=3}").graph
    inputs, read = prompts(view, [[5, 9, *view.source.prompt, 7, 8]]), {}
    original = view.source.original
    assert isinstance(original, ModuleOriginal)
    model = original.make().eval()
    text = model.model.language_model
    hook = text.register_forward_pre_hook(lambda _, args, named: read.update(named),
                                          with_kwargs=True)  # fmt: skip
    with torch.no_grad():
        original.call(model, inputs)
        hook.remove()
        left = read["inputs_embeds"][:, [0, 1, 3, 5, 7, 8, 9]]
        states = text(inputs_embeds=left, use_cache=False).last_hidden_state
        expected = model.lm_head(states)
    assert difference(expected, sweep(graph, inputs)["logits"]).within(EXACT)


def test_an_encoder_that_reads_images_among_its_words(tmp_path: Path) -> None:
    """Florence-2: as a whole, and not in parts, whose encoder would not see the image."""
    view, _ = checked("florence2", tmp_path)
    assert view.input_names()[-2:] == ("pixel_values", "decoder_input_ids")
    with pytest.raises(BadInput, match="reads images among its words"):
        load(tmp_path, part="encoder")
    with pytest.raises(BadInput, match="by an encoder, which no cache holds"):
        load(tmp_path, cache=True)
    with pytest.raises(BadInput, match="images enter the text of an encoder, at which"):
        gw.plan(view, "uniform-tokens{keep=50%}")


def test_squares_that_do_not_fit(tmp_path: Path) -> None:
    sizes = {**FAMILIES["mistral3"].sizes}
    sizes["vision_config"] = sizes["vision_config"] | {"image_size": [12, 16]}
    save(replace(FAMILIES["mistral3"], sizes=sizes), tmp_path)
    with pytest.raises(BadInput, match=r"image_size of \[12, 16\], of which whole squares of 2"):
        load(tmp_path)


def test_layers_whose_results_meet_are_blocks_of_their_tower(tmp_path: Path) -> None:
    """VipLLaVA's features are those of several layers side by side."""
    save(FAMILIES["vipllava"], tmp_path)
    view = load(tmp_path, cache=False)
    canonicalize(view)
    assert [block.tower for block in recognize(view).blocks] == [0, 0, 1, 1]


def test_texts_that_look_at_images_come_with_one_each(tmp_path: Path) -> None:
    view, _ = checked("blip-itm", tmp_path)
    types = [str(view.type(value)) for value in view.inputs()]
    assert types == ["i64[batch, seq]", "i64[batch, seq]", "f32[batch, 3, 16, 16]"]


def test_texts_are_not_counted(tmp_path: Path) -> None:
    """CLIPSeg's forward compares their number with the images', which would bind both."""
    view, _ = checked("clipseg", tmp_path)
    assert view.source.notes == ()


def test_texts_that_are_looked_for_in_one_image(tmp_path: Path) -> None:
    save_shallow("owlv2", tmp_path)
    view = load(tmp_path)
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 90, (3, 5), generator=generator),
              "attention_mask": torch.ones(3, 5, dtype=torch.int64),
              "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}  # fmt: skip
    expected, actual = by_library(view, inputs), sweep(view, inputs)
    assert expected["logits"].shape[-1] == 3
    assert all(error.within(EXACT) for error in compare(expected, actual).values())


def test_encoders_and_decoders_put_together(tmp_path: Path) -> None:
    """The decoder's own counts and widths, where the config as a whole has none."""
    save_shallow("trocr", tmp_path)
    for part in ("encoder", "decoder", "decoder_with_past"):
        held(load(tmp_path, part=part))


def test_frames_of_a_video(tmp_path: Path) -> None:
    view, _ = checked("videomae", tmp_path)
    assert str(view.type(view.inputs()[0])) == "f32[batch, 4, 3, 16, 16]"
