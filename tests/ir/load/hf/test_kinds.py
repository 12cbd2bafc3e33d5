"""Folders whose inputs, lengths or attention are of a kind of their own: pages, tables, windows,
spectrograms, sounds beside a text."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.hf import layout, model, model_class, sound, windows
from graphwright.ir.load.hf.inputs import left_out_notes
from graphwright.ir.load.sources import load
from graphwright.ir.run.inputs import sample_inputs
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import compare
from graphwright.ir.structure.recognize import recognize
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from graphwright.tools.bench.family_table import Family

transformers: Any = importlib.import_module("transformers")
EXACT = 2e-5


def loaded(name: str, folder: Path, **sizes: Any) -> View:
    """A family's graph, of one layer."""
    family = FAMILIES[name]
    save(replace(family, sizes={**family.sizes, "num_hidden_layers": 1, **sizes}), folder)
    return load(folder)


def agree(view: View, *batches: dict[str, torch.Tensor]) -> None:
    """Whether the graph gives what the library does."""
    assert view.source.original is not None
    library = view.source.original.start()
    for inputs in batches:
        errors = compare(library(inputs), sweep(view, inputs))
        assert all(error.within(EXACT) for error in errors.values()), errors


def made(name: str, **sizes: Any) -> Any:
    """The library's model of a family, of one layer."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(
        **{**family.sizes, "num_hidden_layers": 1, **sizes}
    )
    return getattr(transformers, family.model)(config).eval()


def shaped(view: View) -> dict[str, str]:
    return dict(zip(view.input_names(), map(str, map(view.type, view.inputs())), strict=True))


def module(kind: str, **config: Any) -> Any:
    """What is asked of a model by its config alone."""
    config = {"model_type": kind, **config}
    return SimpleNamespace(
        config=SimpleNamespace(**config), parameters=lambda: iter([torch.zeros(1)])
    )


def test_where_a_token_stands_is_an_input(tmp_path: Path) -> None:
    """It was left out, and each token then stood in the corner of an empty page. A sample's boxes
    are such as a page has, anywhere on it. ONNX took others from the ends of the tables."""
    view = loaded("layoutlm", tmp_path)
    assert shaped(view)["bbox"] == "i64[batch, seq, 4]"
    inputs = sample_inputs(view)
    box = inputs["bbox"]
    assert bool((box[..., :2] <= box[..., 2:]).all()) and box.unique().numel() > 20
    agree(view, inputs)
    run = gw.compile(view, backend="onnxruntime")
    for wrong, told in ((box.flip(-1), "fails on these inputs"), (box - 2000, "bbox: -.* below 0")):
        with pytest.raises(BadInput, match=told):
            run(**inputs | {"bbox": wrong})


@pytest.mark.parametrize(
    ("model", "name", "shape", "dtype"),
    [
        (module("bros"), "bbox", (2, 3, 4), torch.float32),
        (module("lilt"), "bbox", (2, 3, 4), torch.int64),
        (module("markuplm", max_depth=6), "xpath_tags_seq", (2, 3, 6), torch.int64),
        (module("tapas", type_vocab_sizes=[3] * 7), "token_type_ids", (2, 3, 7), torch.int64),
    ],
)
def test_what_stands_beside_tokens(
    model: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    beside = layout.beside_tokens(model, {name: None}, ids)
    assert {n: (tuple(t.shape), t.dtype) for n, t in beside.items()} == {name: (shape, dtype)}


def test_windows_are_masks_and_marked_tokens_see_all() -> None:
    """Of a text of several windows with padding, in which some tokens are marked."""
    library, settled = (made("longformer", attention_window=4) for _ in range(2))
    (note,) = windows.settle_windows(settled)
    assert note.startswith("windows of 4 tokens are a mask")
    ids = torch.randint(3, 97, (2, 21), generator=torch.Generator().manual_seed(0))
    real, marked = torch.ones_like(ids), torch.zeros_like(ids)
    real[1, 17:] = 0
    for marks in ((), (0, 3)):
        marked[range(len(marks)), marks] = 1
        given = {"input_ids": ids, "attention_mask": real, "global_attention_mask": marked.clone()}
        with torch.no_grad():
            expected, actual = library(**given).logits, settled(**given).logits
        torch.testing.assert_close(actual, expected)


def test_a_text_is_no_longer_than_all_of_it_is_attended_to() -> None:
    """BigBird behind 28 tokens looks at blocks; a graph of its other way would be wrong there."""
    blocks = {"block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64}
    sparse = module("big_bird", attention_type="block_sparse", **blocks).config
    assert model.longest_text(sparse) == 28
    assert model.longest_text(module("big_bird", attention_type="full", **blocks).config) == 64


@pytest.mark.parametrize("name", ["bigbird", "bigbird-pegasus"])
def test_a_longer_text_has_no_places(name: str) -> None:
    """So a graph fails on it: it ran, and gave other numbers than the library's blocks."""
    model = made(name)
    (note,) = windows.settle_windows(model)
    assert note.startswith("texts are of 28 tokens at most")
    read = model.get_encoder().embed_positions if name == "bigbird-pegasus" else (
        lambda shape: model.bert.embeddings(torch.zeros(shape, dtype=torch.int64))
    )  # fmt: skip
    assert read(torch.Size([1, 28])).shape[-2:] == (28, 32)
    with pytest.raises((IndexError, RuntimeError), match=r"must match|out of range"):
        read(torch.Size([1, 29]))


@pytest.mark.parametrize(
    ("config", "capped"),
    [
        (lambda: transformers.Gemma2Config(), True),
        (lambda: transformers.PaliGemmaConfig(text_config={"model_type": "gemma2"}), True),
        (lambda: transformers.Gemma2Config(attn_logit_softcapping=None), False),
        (lambda: transformers.MusicgenConfig(), False),  # of two texts
    ],
)
def test_a_cap_is_seen(config: Callable[[], Any], capped: bool) -> None:
    assert model.is_capped(config()) == capped


def test_squeezed_steps_are_as_many_as_came(tmp_path: Path) -> None:
    """SEW looks at every second step. A graph gave one step less of an odd number of them."""
    view = loaded("sew", tmp_path)
    assert not any("of at most" in note for note in view.source.notes)
    sizes = ({"batch": 1, "samples": samples} for samples in (96, 104))
    agree(view, *(sample_inputs(view, sizes=size) for size in sizes))


def test_frames_come_with_a_mask_of_those_that_count(tmp_path: Path) -> None:
    """And a Conformer's layers begin at the half of the feed-forward before their attention."""
    view = loaded("parakeet", tmp_path)
    assert shaped(view) == {
        "input_features": "f32[batch, frames, 16]", "attention_mask": "i64[batch, frames]"
    }  # fmt: skip
    inputs = sample_inputs(view, sizes={"batch": 2, "frames": 83})
    inputs["attention_mask"][1, 60:] = 0
    agree(view, inputs)
    canonicalize(view)
    blocks = recognize(view).blocks
    homes = [{name.split(".")[2] for name in block.linears} for block in blocks]
    assert homes == [{"0"}, {"1"}]
    last = view.producer(blocks[-1].exit)  # the norm of the layer, not of the model
    assert last is not None and view.op(last) == "layer_norm"


def test_samples_are_as_many_as_their_places() -> None:
    sizes = {"conv_kernel": (10, 3), "conv_stride": (5, 2), "max_source_positions": 40}
    turned = module("wav2vec2-conformer", position_embeddings_type="relative", **sizes)
    notes = sound.length_notes(turned, ["input_values"])
    assert notes == ("sounds are of 410 samples at most, as far as places go",)
    assert sound.least_sizes(turned, ["input_values"]) == {"samples": 90}
    assert not sound.length_notes(module("wav2vec2", **sizes), ["input_values"])
    assert sound.least_sizes(module("moonshine"), ["input_values"]) == {"samples": 3583}


def test_sounds_that_enter_a_text_are_refused(tmp_path: Path) -> None:
    """A graph of the text alone was made in silence."""
    words = FAMILIES["qwen2"].sizes
    hears = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 4, "d_model": 32,
             "encoder_ffn_dim": 64, "max_source_positions": 16}  # fmt: skip
    sizes = {"audio_config": hears, "audio_token_id": 96, "text_config": {
        **words, "num_hidden_layers": 1, "model_type": "qwen2"}}  # fmt: skip
    save(Family("Qwen2AudioForConditionalGeneration", "Qwen2AudioConfig", sizes), tmp_path)
    reason = "a graph of its text alone would be deaf.*Qwen2AudioEncoder and Qwen2Model"
    with pytest.raises(BadInput, match=reason):
        load(tmp_path)
    with pytest.raises(BadInput, match="a graph of its text alone would be deaf"):
        model_class._check_taken(
            tmp_path, transformers.MoshiForConditionalGeneration, module("moshi").config
        )


@pytest.mark.parametrize(("hears", "said"), [
    (None, []), (object(), ["the forward takes sounds (input_features) too, and"])])  # fmt: skip
def test_what_a_graph_has_not_is_said(hears: Any, said: list[str]) -> None:
    """Of Gemma 4 with a tower of sounds, and of the larger ones without."""

    class Both:
        config = SimpleNamespace(audio_config=hears, model_type="gemma4")

        def forward(self, input_ids: Any, pixel_values: Any, input_features: Any) -> None: ...

    notes = left_out_notes(Both(), {"input_ids": None, "pixel_values": None})
    assert [note[:50] for note in notes] == said
