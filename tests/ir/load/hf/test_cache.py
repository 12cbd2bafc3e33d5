"""Decoders with their cache: prompts and steps by one graph are the library's one-shot forward."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.generation.decode import Decoder
from graphwright.backends.generation.speculate import Speculator
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.hf.llava import merge_rows
from graphwright.ir.load.sources import load
from graphwright.ir.run.inputs import sample_inputs
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from graphwright.ir.structure.cache_slots import (
    PARTS,
    answers,
    empty_past,
    has_cache,
    is_recurrent,
    next_step,
    past_name,
    past_slot,
    present_name,
    present_of,
)
from graphwright.ir.structure.recognize import recognize

from .... import models as small_models
from .test_families import checked, save_shallow
from .test_llava import IMAGE, save_llava

transformers: Any = importlib.import_module("transformers")

KINDS = ("fx", "onnx")
HEADS = {"llama": 2, "gemma2": 2, "gpt2": 4, "llava": 2}
TOKENS = 9
"""Features of an image of the small LLaVA."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name: the library's model, and the graphs with the cache by kind."""
    by_name: dict[str, Any] = {}
    for name in HEADS:
        folder = tmp_path_factory.mktemp(name)
        if name == "llava":
            model = save_llava(folder, image_seq_length=TOKENS)
        else:
            model = getattr(small_models, name)(layers=2).module.model
            model.save_pretrained(folder)
        fx = load(folder)
        by_name[name] = model.eval(), {"fx": fx, "onnx": translated(fx)}
    return by_name


def padded(lengths: list[int], words: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and a mask, padded on the left."""
    rng, longest = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(1, words, (len(lengths), longest), generator=rng)
    mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
    return ids * mask, mask


def in_steps(
    view: View, ids: torch.Tensor, mask: torch.Tensor, prompt: int, **first: torch.Tensor
) -> torch.Tensor:
    """Logits of all positions: the prompt at once, the rest token by token by the cache."""
    state = sweep(view, {"input_ids": ids[:, :prompt], "attention_mask": mask[:, :prompt], **first})
    logits = [state["logits"]]
    rest = {name: tensor[:0] for name, tensor in first.items()}
    for end in range(prompt + 1, ids.shape[1] + 1):
        past = {n.replace("present", "past_key_values"): t for n, t in state.items()}
        del past["logits"]
        step = {"input_ids": ids[:, end - 1 : end], "attention_mask": mask[:, :end]}
        state = sweep(view, {**step, **past, **rest})
        logits.append(state["logits"])
    return torch.cat(logits, 1)


def one_shot(model: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, **more
        ).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HEADS)
def test_names_and_types(name: str, kind: str, models: Any) -> None:
    view = models[name][1][kind]
    types = dict(zip(view.input_names(), map(view.type, view.inputs()), strict=True))
    assert str(types["input_ids"]) == "i64[batch, seq]"
    assert str(types["attention_mask"]) == "i64[batch, past + seq]"
    past = f"f32[batch, {HEADS[name]}, past, {32 // 4 if name != 'llava' else 6}]"
    slots = [past_name(slot, part) for slot in range(2) for part in ("key", "value")]
    assert [n for n in types if past_slot(n) is not None] == slots
    assert {str(types[n]) for n in slots} == {past}
    presents = [present_name(slot, part) for slot in range(2) for part in ("key", "value")]
    assert view.output_names() == ("logits", *presents)
    returned = {str(view.type(v)) for v in view.outputs()[1:]}
    assert returned == {past.replace("past", "past + seq")}
    if name == "llava":
        assert str(types["pixel_values"]) == "f32[images, 3, 24, 24]"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("lengths", [[5], [7, 3, 1]], ids=str)
def test_steps_are_the_one_shot_forward(
    lengths: list[int], name: str, kind: str, models: Any
) -> None:
    model, views = models[name]
    prompt = max(lengths)
    ids, mask = padded([n + 4 for n in lengths], 97)
    actual, expected = in_steps(views[kind], ids, mask, prompt), one_shot(model, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_llava_reads_its_images_once(kind: str, models: Any) -> None:
    """Rows with an image, with none and with two; in steps the tower runs on no image."""
    model, views = models["llava"]
    ids, mask = padded([TOKENS + 5, 9, 2 * TOKENS + 4], IMAGE)
    for row, start in ((0, TOKENS), (2, 1), (2, TOKENS + 2)):
        ids[row, start : start + TOKENS] = IMAGE
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    actual = in_steps(views[kind], ids, mask, ids.shape[1] - 2, pixel_values=pixels)
    expected = one_shot(model, ids, mask, pixel_values=pixels)
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HEADS)
def test_every_text_layer_has_its_slot(name: str, kind: str, models: Any) -> None:
    view = models[name][1][kind].copy()
    canonicalize(view)
    check_structure(view)
    structure = recognize(view)
    slots = [site.cache for site in structure.attentions if site.cache is not None]
    assert len(slots) == 2
    for index, slot in enumerate(slots):
        names = dict(zip(view.inputs(), view.input_names(), strict=True))
        outputs = dict(zip(view.outputs(), view.output_names(), strict=True))
        assert [names[v] for v in slot.past] == [past_name(index, p) for p in ("key", "value")]
        presents = [outputs[v] for v in slot.present]
        assert presents == [present_name(index, p) for p in ("key", "value")]
    text = [b for b in structure.blocks if any(structure.attentions[a].cache for a in b.attentions)]
    assert len(text) == 2 and len({b.tower for b in text}) == 1
    assert all(len(b.linears) >= 4 for b in text)


def test_a_cache_left_out_is_empty(models: Any) -> None:
    _, views = models["llama"]
    ids, mask = padded([5, 2], 97)
    inputs = {"input_ids": ids, "attention_mask": mask}
    types = dict(zip(views["fx"].input_names(), map(views["fx"].type, views["fx"].inputs()),
                     strict=True))  # fmt: skip
    past = empty_past(types, inputs)
    assert {tuple(t.shape) for t in past.values()} == {(2, 2, 0, 8)} and len(past) == 4
    short, whole = sweep(views["fx"], inputs), sweep(views["fx"], inputs | past)
    assert all(torch.equal(short[n], whole[n]) for n in whole)
    assert set(answers(whole)) == {"logits"}
    with pytest.raises(BadInput, match="missing attention_mask"):
        sweep(views["fx"], {"input_ids": ids})


@pytest.mark.parametrize("kind", KINDS)
def test_random_inputs_fit_together(kind: str, models: Any) -> None:
    view = models["llama"][1][kind]
    inputs = sample_inputs(view, sizes={"batch": 3, "seq": 5, "past": 1})
    assert inputs["attention_mask"].shape == (3, 6)
    assert inputs[past_name(0, "key")].shape == (3, 2, 1, 8)
    assert sweep(view, inputs)["present.1.value"].shape == (3, 2, 6, 8)
    start = sample_inputs(view, sizes={"batch": 2, "seq": 5})
    assert {n: tuple(t.shape) for n, t in start.items()} == {
        "input_ids": (2, 5), "attention_mask": (2, 5)
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_after_a_prompt(kind: str, models: Any) -> None:
    view = models["llava"][1][kind]
    prompt = sample_inputs(view, sizes={"batch": 3, "seq": 9, "images": 3})
    outputs = sweep(view, prompt)
    step = next_step(prompt, outputs)
    assert step is not None and step["pixel_values"].shape == (0, 3, 24, 24)
    assert step["attention_mask"].shape == (3, 10)
    assert torch.equal(step[past_name(1, "value")], outputs[present_name(1, "value")])
    assert sweep(view, step)["logits"].shape == (3, 1, 30)
    assert next_step(prompt, answers(outputs)) is None


# --- refusals and parts ---------------------------------------------------------------------------


def test_models_without_a_cache(tmp_path: Path) -> None:
    small_models.bert(layers=1).module.model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="BertModel does not generate text, so it has no cache"):
        load(tmp_path, cache=True)
    with pytest.raises(BadInput, match="zoo:minilm does not generate text"):
        load("zoo:minilm", cache=True)
    for name in ("model.onnx", "model.pt2"):
        (tmp_path / name).write_bytes(b"")
    for name in (tmp_path / "model.onnx", tmp_path / "model.pt2", "package.module:factory"):
        with pytest.raises(BadInput, match="only zoo and Hugging Face models are given a cache"):
            load(name, cache=True)


def test_a_cache_where_there_is_one(models: Any, tmp_path: Path) -> None:
    assert all(has_cache(graphs["fx"]) for _, graphs in models.values())
    small_models.bert(layers=1).module.model.save_pretrained(tmp_path / "bert")
    assert not has_cache(load(tmp_path / "bert"))
    models["llama"][0].save_pretrained(tmp_path / "llama")
    assert not has_cache(load(tmp_path / "llama", cache=False))


def test_a_scan_that_begins_at_every_call_anew_has_no_cache(tmp_path: Path) -> None:
    save_shallow("mamba", tmp_path)
    assert not has_cache(load(tmp_path))
    # In transformers 5.17 its cache has a name of its own.
    why = r"at every call anew \(mamba_selective_scan\)|has no past_key_values"
    with pytest.raises(BadInput, match=why):
        load(tmp_path, cache=True)


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("lfm2", {"past.0.conv": "f32[batch, 32, 2]"}),
        ("bamba", {"past.0.conv": "f32[batch, 80, 3]",
                   "past.0.recurrent": "f32[batch, 4, 16, 8]"}),
    ],
)  # fmt: skip
def test_layers_with_a_state(name: str, held: dict[str, str], tmp_path: Path) -> None:
    """Beside the keys and values of layer 1; a prompt with padding, a chunk and a step are the
    library's, and what cannot be done with a state is refused."""
    view, truth = checked(name, tmp_path)
    types = dict(zip(view.input_names(), map(view.type, view.inputs()), strict=True))
    assert {n: str(t) for n, t in types.items() if is_recurrent(n)} == held
    assert [n for n in types if past_slot(n) is not None] == [past_name(1, p) for p in PARTS]
    assert view.output_names() == ("logits", *map(present_of, list(types)[2:]))
    assert [probe.what for probe in truth.probes[1:]] == ["a chunk after it", "a step after that"]
    with pytest.raises(BadInput, match="candidates that are wrong are taken back"):
        gw.plan(view, "tree-mask")
    with pytest.raises(BadInput, match="a draft that is wrong is taken back"):
        Speculator(gw.compile(view, backend="eager"), {}, always=False)


def test_a_decoder_without_keys_writes_the_librarys_text(tmp_path: Path) -> None:
    """Mamba 2: two prompts of unequal length, and steps whose mask is of the new token alone."""
    save_shallow("mamba2", tmp_path)
    view = load(tmp_path)
    types = dict(zip(view.input_names(), map(view.type, view.inputs()), strict=True))
    assert str(types["attention_mask"]) == "i64[batch, seq]"
    texts = [[5, 7, 8, 9], [11, 12]]
    steps = Decoder(gw.compile(view, backend="eager")).decode(texts, max_new_tokens=4)
    written = [list(row) for row in zip(*steps, strict=True)]
    model: Any = view.source.original.make()  # type: ignore[union-attr]
    ids, mask = torch.tensor([[5, 7, 8, 9], [0, 0, 11, 12]]), torch.tensor([[1] * 4, [0, 0, 1, 1]])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False,
                              eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert written == expected[:, 4:].tolist()


@pytest.mark.parametrize("images", [0, 1, 3])
def test_features_take_their_places_in_the_whole_batch(images: int) -> None:
    generator = torch.Generator().manual_seed(images)
    words = torch.randn(3, 9, 4, generator=generator)
    features = torch.randn(images, 5, 4, generator=generator)
    placeholders = torch.zeros(27, dtype=torch.bool)
    placeholders[torch.randperm(27, generator=generator)[: 5 * images]] = True
    placeholders = placeholders.reshape(3, 9)
    merged = merge_rows(words, placeholders, features)
    expected = words.masked_scatter(placeholders.unsqueeze(-1).expand_as(words), features)
    assert torch.equal(merged, expected)
    written = placeholders.clone()
    written[2, 8] = True
    if not placeholders[2, 8]:
        assert torch.equal(merge_rows(words, written, features), expected), "no feature is left"
