"""What a folder's config leaves open is decided by its checkpoint, and what is not read is told."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.checkpoints.checkpoint import read_checkpoint
from graphwright.ir.load.hf.folder import bind_weights
from graphwright.ir.load.hf.model import build, read_config
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from safetensors.torch import load_file, save_file

transformers: Any = importlib.import_module("transformers")
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
    "vocab_size": 50, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"n_layer": 1, "n_embd": 32, "n_head": 4, "vocab_size": 50, "n_positions": 64,
        "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
T5 = {"num_layers": 1, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": 50}
IDS = {
    "input_ids": torch.tensor([[3, 7, 11, 2], [5, 9, 1, 4]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
}
Tensors = dict[str, torch.Tensor]


def saved(folder: Path, name: str, config: str, **sizes: Any) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return saved(folder, "LlamaForCausalLM", "LlamaConfig", **SIZES)


def edited(
    source: Path, target: Path, change: Callable[[Tensors], Tensors] = dict, **config: Any
) -> Path:
    target.mkdir(exist_ok=True)
    known = json.loads((source / "config.json").read_text()) | config
    text = json.dumps({key: value for key, value in known.items() if value is not None})
    (target / "config.json").write_text(text)
    tensors = change(load_file(source / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def read(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """The model that a folder is built as, and the notes on its weights; nothing is traced."""
    checkpoint = read_checkpoint(folder)
    model = build(folder, read_config(folder, trust_remote_code=False), checkpoint)
    return model, bind_weights(model, checkpoint, folder)[1]


# --- a config without a class -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config", "sizes"), [
    ("BertModel", "BertConfig", SIZES),
    ("BertForSequenceClassification", "BertConfig", SIZES | {"num_labels": 3}),
    ("BertForTokenClassification", "BertConfig", SIZES),
    ("BertForMaskedLM", "BertConfig", SIZES),
    ("LlamaModel", "LlamaConfig", SIZES),
    ("LlamaForCausalLM", "LlamaConfig", SIZES | {"tie_word_embeddings": True}),
    ("GPT2Model", "GPT2Config", GPT2),
    ("GPT2LMHeadModel", "GPT2Config", GPT2),
    ("T5EncoderModel", "T5Config", T5),
])  # fmt: skip
def test_the_class_is_the_one_that_reads_the_checkpoint(
    name: str, config: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    folder = saved(tmp_path, name, config, **sizes)
    model, notes = read(edited(folder, folder, architectures=None))
    assert (type(model).__name__, notes) == (name, ())


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    sizes = SIZES | {"num_hidden_layers": 1}
    saved(tmp_path, "BertForSequenceClassification", "BertConfig", **sizes, num_labels=3)
    view = load(edited(tmp_path, tmp_path, architectures=None))
    assert view.source.notes == (
        (
            "config.json names no class: taken as BertForSequenceClassification, which reads all "
            "of the checkpoint"
        ),
    )
    with torch.no_grad():
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
        expected = model(**IDS).logits
    torch.testing.assert_close(sweep(view, IDS)["logits"], expected, rtol=1e-5, atol=1e-5)
    # Of another number of classes than the config has, no class reads it.
    edited(tmp_path, tmp_path, id2label=None)
    with pytest.raises(BadInput, match=r"BertModel leaves 2 .*classifier\.bias.*num_labels"):
        read(tmp_path)


def test_classes_that_read_a_checkpoint_alike(tmp_path: Path) -> None:
    folder = saved(tmp_path, "T5ForConditionalGeneration", "T5Config", **T5)
    with pytest.raises(BadInput, match=r"T5Model and T5ForConditionalGeneration .* alike: write"):
        read(edited(folder, folder, architectures=None))


# --- tensors that the model has not -------------------------------------------------------------


def test_what_is_not_read_is_noted_unless_models_compute_it(llama: Path, tmp_path: Path) -> None:
    computed = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8),
        "model.position_ids": torch.arange(8),
    }
    assert read(edited(llama, tmp_path, lambda known: known | computed))[1] == ()
    more = {"foo.bar": torch.ones(3), "score.weight": torch.ones(700, 1000)}
    assert read(edited(llama, tmp_path, lambda known: known | more))[1] == (
        (
            "tensors of the checkpoint that the model has not were left out (2, 97% of its bytes): "
            "foo.bar, score.weight"
        ),
    )


def _renamed_head(known: Tensors) -> Tensors:
    return known | {"output.weight": known["lm_head.weight"]}


@pytest.mark.parametrize(("change", "config", "reason"), [
    (lambda known: known | {"model.layers.1.mlp.up_proj.bias": torch.ones(64)}, {},
     "the model's Linear of that name has no bias: config.json asks for another .*mlp_bias"),
    (lambda known: known | {"layers.1.mlp.up_proj.bias": torch.ones(64)}, {}, "Linear of that"),
    (dict, {"num_hidden_layers": 1}, "layers has 1 blocks: give their number.*num_hidden_layers"),
    (lambda known: {("output.weight" if "lm_head" in key else key): value
                    for key, value in known.items()}, {"tie_word_embeddings": True},
     r"'output\.weight', of the shape of the model's head, which .* tied to the words"),
])  # fmt: skip
def test_what_the_stored_model_computed_with_is_not_left_out(
    llama: Path, tmp_path: Path, change: Any, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadInput, match=reason):
        read(edited(llama, tmp_path, change, **config))


def test_a_copy_of_the_tied_words_is_no_other_head(llama: Path, tmp_path: Path) -> None:
    def copied(known: Tensors) -> Tensors:
        del known["lm_head.weight"]
        return known | {"output.weight": known["model.embed_tokens.weight"].clone()}

    _, notes = read(edited(llama, tmp_path, copied, tie_word_embeddings=True))
    assert notes[0].endswith("were left out (1): output.weight")


# --- names and dtypes ---------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [
    lambda name: f"module._orig_mod.{name}",
    lambda name: name.replace("model.", "model._orig_mod."),
])  # fmt: skip
def test_names_that_the_library_does_not_take(llama: Path, tmp_path: Path, wrapped: Any) -> None:
    def change(known: Tensors) -> Tensors:
        return {wrapped(name): tensor for name, tensor in known.items()}

    view = load(edited(llama, tmp_path, change), cache=False)
    assert "which transformers does not take off" in view.source.notes[0]
    expected = load(llama, cache=False).source.original.start()(IDS)["logits"]
    torch.testing.assert_close(sweep(view, IDS)["logits"], expected, rtol=1e-5, atol=1e-5)
    # The source is held against what was read: the library itself would make up random numbers.
    torch.testing.assert_close(view.source.original.start()(IDS)["logits"], expected)


def test_a_name_too_much_is_named(tmp_path: Path) -> None:
    def change(known: Tensors) -> Tensors:
        return {f"student.{name}": tensor for name, tensor in known.items()}

    folder = saved(tmp_path, "BertForMaskedLM", "BertConfig", **SIZES)
    with pytest.raises(BadInput, match=r"begin with 'student\.', and without it they are the"):
        read(edited(folder, folder, change))


def test_a_dtype_as_torch_prints_it(llama: Path, tmp_path: Path) -> None:
    folder = edited(llama, tmp_path, dtype=None, torch_dtype="torch.bfloat16")
    assert {p.dtype for p in read(folder)[0].parameters()} == {torch.bfloat16}
