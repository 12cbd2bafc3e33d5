"""Folders of many families: the graph is the library's own model on other shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.generation.decode import Decoder
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.hf.pictures import as_the_library_takes
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.original import ModuleOriginal
from graphwright.ir.run.inputs import sample_inputs
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.truth import Truth, ask_source
from graphwright.ir.run.verify import compare
from graphwright.ir.structure.cache_slots import is_kept
from graphwright.ir.structure.costs import graph_costs, sample_sizes
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES

EXACT = 2e-5
COUNTS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers")
SHALLOW = {
    "deepseek-v3": {"first_k_dense_replace": 0}, "clipseg": {"extract_layers": [0, 1]},
    "llama4": {"moe_layers": [0]},
    "minimax": {"num_hidden_layers": 1, "layer_types": ["linear_attention"]},
}
"""What makes the only layer that is left one with experts, or one that is there."""
ALTERNATING = ("gpt-oss", "lfm2", "bamba", "gemma3-vl", "lfm2-vl")
"""Families whose layers are of two kinds by turns."""


def shallow(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with a layer less in each stack: how a family is written, one shows as well as
    two."""
    smaller = {n: shallow(v) if isinstance(v, Mapping) else v for n, v in sizes.items()}
    return smaller | {n: v - 1 for n, v in smaller.items() if n in COUNTS}


def save_shallow(name: str, folder: Path) -> None:
    family = FAMILIES[name]
    sizes = family.sizes if name in ALTERNATING else shallow(family.sizes)
    save(replace(family, sizes={**sizes, **SHALLOW.get(name, {})}), folder)


def checked(name: str, folder: Path) -> tuple[View, Truth]:
    """Load a family's folder; its graph, and what its library gives, which the graph gives too."""
    save_shallow(name, folder)
    view = load(folder)
    return view, held(view)


def held(view: View) -> Truth:
    """What a graph's library gives, which the graph gives too."""
    truth = ask_source(view, [sample_inputs(view)])
    assert truth.samples and truth.probes
    for sample in (*truth.samples, *truth.probes):
        errors = compare(sample.outputs, sweep(view, sample.inputs))
        assert all(error.within(EXACT) for error in errors.values()), (sample.what, errors)
    return truth


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("bert", ("input_ids", "attention_mask", "token_type_ids")),
        ("fnet", ("input_ids", "token_type_ids")),
        ("clip", ("input_ids", "attention_mask", "pixel_values")),
        ("marian", ("input_ids", "attention_mask", "decoder_input_ids")),
        ("whisper", ("input_features", "decoder_input_ids")),
        ("hubert", ("input_values",)),
        ("detr", ("pixel_values",)),
    ],
)
def test_inputs_are_those_that_the_model_takes(
    name: str, inputs: tuple[str, ...], tmp_path: Path
) -> None:
    assert checked(name, tmp_path)[0].input_names() == inputs


@pytest.mark.parametrize(
    "name", ["falcon", "falcon-40b", "phi3-longrope", "deepseek-v3", "gpt-oss", "llama4"]
)
def test_decoders_whose_cache_or_positions_are_their_own(name: str, tmp_path: Path) -> None:
    """A cache of one head or of latents, frequencies by the length of a text, experts in stacks,
    positions by complex numbers."""
    view, truth = checked(name, tmp_path)
    assert [probe.what for probe in truth.probes[1:]] == ["a chunk after it", "a step after that"]
    if name == "deepseek-v3":  # what is kept are latents, of which a layer makes keys and values
        row = {name: tensor[:1] for name, tensor in sample_inputs(view).items()}
        kept = sum(t.nbytes for n, t in sweep(view, row).items() if is_kept(n))
        assert graph_costs(view, sample_sizes(view, row)).kv_bytes == kept


def check_written(view: View) -> None:
    """What the decode loop writes about an image is what the library's ``generate`` does."""
    types = dict(zip(view.input_names(), map(view.type, view.inputs()), strict=True))
    sides = (types["pixel_values"].shape or ())[1:]
    pixels = torch.randn(2, *map(int, sides), generator=torch.Generator().manual_seed(3))
    texts = [[5, *view.source.prompt, *words] for words in ([7, 8], [11, 12])]
    decoder = Decoder(gw.compile(view, backend="eager"))
    steps = list(decoder.decode(texts, max_new_tokens=5, images=list(pixels)))
    assert isinstance(view.source.original, ModuleOriginal)
    model: Any = view.source.original.make()
    ids = torch.tensor(texts)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    expected = model.generate(
        **as_the_library_takes(model, inputs), max_new_tokens=5, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert [list(row) for row in zip(*steps, strict=True)] == expected[:, ids.shape[1] :].tolist()


BESIDE = {
    "paligemma": ("token_type_ids",),
    **dict.fromkeys(("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "glm-4.1v"), ("past_key_values.shift",)),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["llava-onevision", "smolvlm", "blip-2", "paligemma", "qwen2-vl", "qwen3-vl"],
)
def test_images_enter_the_text_as_the_library_has_them(name: str, tmp_path: Path) -> None:
    """Shuffled patches, queries, a prompt that sees all of itself, places in three directions,
    steps without an image. Others have tests of their own (``test_hf_llava`` and more)."""
    view, truth = checked(name, tmp_path)
    beside = BESIDE.get(name, ())
    assert view.input_names()[-1 - len(beside) :] == ("pixel_values", *beside)
    assert [probe.what for probe in truth.probes[1:]] == ["a chunk after it", "a step after that"]
    if beside:
        check_written(view)
    if name == "qwen2-vl":
        reason = "each of an image's 6 tokens is 4 patches of the vision tower's"
        with pytest.raises(BadInput, match=reason):
            gw.plan(view, "tome{r=2}")
        assert view.source.notes[0].startswith("images are of 16 x 24, which are 6 tokens")


def test_what_is_fixed_or_bounded_is_said(tmp_path: Path) -> None:
    save_shallow("xglm", tmp_path / "xglm")
    notes = load(tmp_path / "xglm").source.notes
    assert "the graph is for sizes of seq of at most 62" in notes


@pytest.mark.parametrize("name", ["mamba", "minimax"])
def test_a_scan_takes_texts_of_any_length(name: str, tmp_path: Path) -> None:
    """And not the one of the example, of which the library's loop would be unrolled."""
    view, _ = checked(name, tmp_path)
    assert not any("seq" in note for note in view.source.notes)
    assert str(view.type(view.inputs()[0])) == "i64[batch, seq]"
