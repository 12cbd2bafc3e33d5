"""Hugging Face folders: the graph is the eager model's, the weights stay on disk."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.weights import AbsentWeight, CastWeight, FileWeight, MemoryWeight
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from safetensors.torch import load_file, save_file

transformers: Any = importlib.import_module("transformers")

TEXT = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
IMAGE = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
T5 = {"num_layers": 1, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": 50}
GPT2 = {"n_layer": 1, "n_embd": 32, "n_head": 4, "vocab_size": 50, "n_positions": 64}
CASES = {
    "LlamaForCausalLM": ("LlamaConfig", TEXT | {"num_key_value_heads": 2}, {"logits"}),
    "BertModel": ("BertConfig", TEXT, {"last_hidden_state", "pooler_output"}),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, {"logits"}),
    "ViTForImageClassification": ("ViTConfig", IMAGE, {"logits"}),
    "CLIPVisionModel": ("CLIPVisionConfig", IMAGE, {"last_hidden_state", "pooler_output"}),
    "T5EncoderModel": ("T5Config", T5, {"last_hidden_state"}),
}
BERT = transformers.BertConfig(**TEXT | {"num_hidden_layers": 1})


def save(model: Any, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    model.init_weights()
    model.eval().save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(transformers.BertForMaskedLM(BERT), tmp_path_factory.mktemp("bert"))


def inputs_for(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if names == ("pixel_values",):
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator)}
    assert names[:2] == ("input_ids", "attention_mask")
    ids = torch.randint(2, 50, (3, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    text = {"input_ids": ids, "attention_mask": mask}
    return text | ({"token_type_ids": (ids % 3) // 2} if "token_type_ids" in names else {})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def copy(source: Path, target: Path, **changes: Any) -> Path:
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())
    edit_config(target, **changes)
    return target


@pytest.mark.parametrize("name", CASES)
def test_the_graph_computes_what_the_eager_model_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, sizes, outputs = CASES[name]
    cls = getattr(transformers, name)
    save(cls(getattr(transformers, config)(**sizes)), tmp_path)
    capfd.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(FileWeight, "read", lambda self: pytest.fail("a weight was read"))
        view = load(tmp_path, cache=False)
    assert capfd.readouterr() == ("", ""), "the libraries' chatter stays off the terminal"
    assert set(view.output_names()) == outputs
    assert str(view.type(view.inputs()[0])) in ("i64[batch, seq]", "f32[batch, 3, 32, 32]")
    assert {type(w) for n, w in view.weights().items() if n.endswith("weight")} == {FileWeight}
    inputs = inputs_for(view.input_names())
    with torch.no_grad():
        expected = cls.from_pretrained(tmp_path, attn_implementation="sdpa").eval()(**inputs)
    actual = sweep(view, inputs)
    for output in outputs:
        torch.testing.assert_close(actual[output], expected[output], rtol=1e-5, atol=1e-5)


def test_tied_weights_share_a_handle_and_computed_buffers_hold_numbers(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        **TEXT | {"num_hidden_layers": 1, "tie_word_embeddings": True}
    )
    save(transformers.LlamaForCausalLM(config), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    view = load(tmp_path)
    tied = ("embed_tokens.weight", "lm_head.weight")
    assert len({w.key for n, w in view.weights().items() if n.endswith(tied)}) == 1
    on_disk = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert view.source.source_bytes == on_disk
    frequencies = view.weights()["model.rotary_emb.inv_freq"]
    assert isinstance(frequencies, MemoryWeight)
    torch.testing.assert_close(frequencies.read(), 1 / 10000 ** (torch.arange(0, 8, 2) / 8))


def test_a_heads_checkpoint_fits_the_base_model_and_the_reverse(bert: Path, tmp_path: Path) -> None:
    inputs = inputs_for(("input_ids", "attention_mask"))
    base = load(copy(bert, tmp_path, architectures=["BertModel"]))
    assert base.output_names() == ("last_hidden_state",), "the checkpoint has no pooler"
    hidden = sweep(base, inputs)["last_hidden_state"]
    with torch.no_grad():
        eager = transformers.BertForMaskedLM.from_pretrained(bert).eval()
        torch.testing.assert_close(hidden, eager.bert(**inputs)[0], rtol=1e-5, atol=1e-5)
    tensors = load_file(bert / "model.safetensors")
    renamed = {k.removeprefix("bert."): v for k, v in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    edit_config(tmp_path, architectures=["BertForMaskedLM"])
    logits = sweep(load(tmp_path), inputs)["logits"]
    torch.testing.assert_close(logits, sweep(load(bert), inputs)["logits"])


def test_old_names_and_no_architectures(bert: Path, tmp_path: Path) -> None:
    folder = copy(bert, tmp_path, architectures=None)
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in load_file(folder / "model.safetensors").items()
    }
    save_file(old, folder / "model.safetensors")
    assert any("gamma" in name for name in old)
    view = load(folder)
    assert isinstance(view.weights()["bert.embeddings.LayerNorm.weight"], FileWeight)


def test_dtypes(bert: Path, tmp_path: Path) -> None:
    half = {k: v.bfloat16() for k, v in load_file(bert / "model.safetensors").items()}
    folder = copy(bert, tmp_path, dtype="bfloat16")
    save_file(half, folder / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    view = load(folder)
    assert type(view.weights()[name]) is FileWeight
    assert str(view.type(view.outputs()[0])) == "bf16[batch, seq, 50]"
    wide = load(folder, dtype=torch.float32).weights()[name]
    assert isinstance(wide, CastWeight) and torch.equal(wide.read(), half[name].float())
    edit_config(folder, dtype=None)
    assert load(folder).weights()[name].dtype == torch.bfloat16, "the checkpoint's, for want of one"


# --- shards and absent weights ------------------------------------------------------------------


def test_shards(bert: Path, tmp_path: Path) -> None:
    model = transformers.BertForMaskedLM.from_pretrained(bert)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(shards) >= 2
    inputs = inputs_for(("input_ids", "attention_mask"))
    view = load(tmp_path)
    assert torch.equal(sweep(view, inputs)["logits"], sweep(load(bert), inputs)["logits"])
    (tmp_path / shards[1]).unlink()
    with pytest.raises(Missing, match=f"1 of {len(shards)} shards are missing: {shards[1]}"):
        load(tmp_path)
    assert isinstance(
        next(iter(load(tmp_path, allow_missing_weights=True).weights().values())), AbsentWeight
    )
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../away.safetensors", "/etc/hostname"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(BadInput, match="does not lie in the model's folder"):
            load(tmp_path)
    index.write_text("{")
    with pytest.raises(BadInput, match="no valid index"):
        load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"nowhere": shards[0]}}))
    with pytest.raises(BadInput, match="no tensor 'nowhere'"):
        load(tmp_path)


def test_a_tensor_in_two_shards_or_in_none_that_the_index_names(bert: Path, tmp_path: Path) -> None:
    """transformers reads all that the shards hold: one that the index does not list counts too."""
    folder, tensors = copy(bert, tmp_path), load_file(bert / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:9]}, folder / "a.safetensors")
    save_file({n: tensors[n] for n in names[9:]}, folder / "b.safetensors")
    index = {names[0]: "a.safetensors", names[9]: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    view = load(folder)
    assert [p.name for p in view.source.files] == [
        "a.safetensors", "b.safetensors", "config.json", "model.safetensors.index.json"
    ]  # fmt: skip
    save_file({n: tensors[n] for n in names[8:]}, folder / "b.safetensors")
    with pytest.raises(BadInput, match=f"b.safetensors: the tensor '{names[8]}' is in another"):
        load(folder)


def test_an_index_that_was_left_behind(bert: Path, tmp_path: Path) -> None:
    folder, tensors = copy(bert, tmp_path), load_file(bert / "model.safetensors")
    save_file({name: t * 0 for name, t in tensors.items()}, folder / "old.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "old.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    view = load(folder)
    theirs = transformers.BertForMaskedLM.from_pretrained(folder).state_dict()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(view.weights()[name].read(), theirs[name])
    assert [p.name for p in view.source.files] == ["config.json", "model.safetensors"]
    assert view.source.notes[0].startswith("model.safetensors was read, as transformers does")


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float8_e4m3fn, "weight_scale"), (torch.int8, "SCB"), (torch.uint8, "absmax")],
)
def test_weights_in_few_bits_without_their_scales(
    bert: Path, tmp_path: Path, dtype: torch.dtype, scale: str
) -> None:
    folder, tensors = copy(bert, tmp_path), load_file(bert / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    tensors[name] = (tensors[name] * 100).to(dtype)
    tensors[f"bert.encoder.layer.0.output.dense.{scale}"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match=rf"'{name}' is stored as .*nothing would apply.*{scale}'"):
        load(folder)


def test_what_is_cast_or_left_out_is_named_and_as_the_library_has_it(
    bert: Path, tmp_path: Path
) -> None:
    folder, tensors = copy(bert, tmp_path), load_file(bert / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors |= {"extra.weight": torch.ones(2), "bert.embeddings.position_ids": torch.ones(1, 64)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    view = load(folder)
    assert view.source.notes == (
        f"weights of f8e4m3 in the checkpoint and f32 in the model were converted (1): {name}",
        "tensors of the checkpoint that the model has not were left out (1): extra.weight",
    )
    inputs = inputs_for(("input_ids", "attention_mask"))
    with torch.no_grad():
        expected = transformers.BertForMaskedLM.from_pretrained(folder).eval()(**inputs).logits
    torch.testing.assert_close(sweep(view, inputs)["logits"], expected, rtol=1e-5, atol=1e-5)


def test_tied_weights_that_the_checkpoint_has_twice(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        **TEXT | {"num_hidden_layers": 1, "tie_word_embeddings": True}
    )
    save(transformers.LlamaForCausalLM(config), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    words = tensors["model.embed_tokens.weight"]
    inputs = inputs_for(("input_ids", "attention_mask"))
    for head, parts in ((words.clone(), 1), (words + 1, 2)):
        save_file(
            tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )  # fmt: skip
        view = load(tmp_path, cache=False)
        tied = ("embed_tokens.weight", "lm_head.weight")
        assert len({w.key for n, w in view.weights().items() if n.endswith(tied)}) == parts
        with torch.no_grad():
            model = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
            expected = model(**inputs).logits
        torch.testing.assert_close(sweep(view, inputs)["logits"], expected, rtol=1e-5, atol=1e-5)


def test_links_of_the_hubs_cache_and_out_of_the_folder(bert: Path, tmp_path: Path) -> None:
    """``snapshots/REVISION`` links into the model's ``blobs``, those on into the whole cache's."""
    cache, model = tmp_path / "hub", tmp_path / "hub" / "models--me--bert"
    snapshot = model / "snapshots" / "1234"
    for folder in (snapshot, model / "blobs", cache / "blobs" / "ab"):
        folder.mkdir(parents=True)
    (cache / "blobs" / "ab" / "abcd").write_bytes((bert / "model.safetensors").read_bytes())
    (model / "blobs" / "11").symlink_to("../../blobs/ab/abcd")
    (model / "blobs" / "22").write_bytes((bert / "config.json").read_bytes())
    for name, blob in (("model.safetensors", "11"), ("config.json", "22")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    inputs = inputs_for(("input_ids", "attention_mask"))
    assert torch.equal(sweep(load(snapshot), inputs)["logits"], sweep(load(bert), inputs)["logits"])
    for name in ("model.safetensors", "config.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        copy(bert, folder)
        (folder / name).unlink()
        (folder / name).symlink_to(bert / name)
        with pytest.raises(BadInput, match=rf"{name}: a link to .*, out of the model's folder"):
            load(folder)


def test_a_pipe_is_no_checkpoint(bert: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        copy(bert, tmp_path)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(BadInput, match=f"{name}: a pipe or a device, not a regular file"):
            load(tmp_path)
        (tmp_path / name).unlink()


def test_a_config_alone_is_good_for_a_dry_run(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1, dtype="float16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(Missing, match=r"no weights .*--dry-run"):
        load(tmp_path)
    view = load(tmp_path, allow_missing_weights=True)
    matrix = view.weights()["model.layers.0.mlp.gate_proj.weight"]
    assert (matrix.shape, matrix.dtype) == ((11008, 4096), torch.float16)
    assert view.source.source_bytes == 2 * (
        2 * 32000 * 4096 + 4 * 4096**2 + 3 * 11008 * 4096 + 3 * 4096
    )
    with pytest.raises(Missing, match="holds no weights"):
        matrix.read()


def test_pickles_are_never_opened(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(BadInput, match=r"pickled \(pytorch_model.bin\).*save_pretrained"):
        load(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = copy(bert, tmp_path, num_hidden_layers=2)
    with pytest.raises(BadInput, match=r"16 of the model's weights.*layer\.1.*, \.\.\.\. Check"):
        load(folder)
    edit_config(folder, num_hidden_layers=1, intermediate_size=65)
    with pytest.raises(
        BadInput, match=r"dense\.weight' is \[64, 32\], the config asks for \[65, 32\]"
    ):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"garbage" * 9)
    with pytest.raises(BadInput, match="not a safetensors file"):
        load(folder)


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "new", "auto_map": {"AutoModel": "m.New"}}, "--trust-remote-code"),
        ({"architectures": ["BertModell"]}, "has no class 'BertModell'"),
        ({"quantization_config": {"quant_method": "quark"}}, "quantized by .quark., which is not"),
        ({"model_type": "no-such-type"}, "transformers does not take this config"),
        ({"num_attention_heads": 5}, "cannot be built|does not take this config"),
        (
            {"architectures": ["Kimi_K25ForConditionalGeneration"], "model_type": "kimi_k25"},
            "puts images into a text, .* gw.trace.* its parts alone are .*DeepseekV3Model",
        ),
        (
            {"architectures": ["Kosmos2ForConditionalGeneration"], "model_type": "kosmos-2"},
            "Kosmos2ForConditionalGeneration puts images into a text, which is read for llava",
        ),
        ({"text_config": {"compression_config": {"format": "float"}}}, "quantized by None, which"),
        ({"transformers_weights": "other.safetensors"}, "other.safetensors', and model"),
        ({"architectures": 5}, "architectures must be a list of names, not 5|not take this config"),
        ({"architectures": ["pipeline"]}, "'pipeline' under architectures is not a model's class"),
        ({"hidden_size": "32"}, "not take this config: Validation error for field 'hidden_size'"),
        ({"hidden_size": 10**30}, "cannot be built from its config.json"),
        ({"hidden_act": "evil"}, "BertForMaskedLM cannot be built .*evil"),
        ({"dtype": "evil"}, "does not take this config: .*evil"),
        ({"dtype": "float8_e4m3fn"}, "none that models compute in"),
        ({"num_hidden_layers": 10**5}, "100000 layers, where at most 26 can be"),
        ({"max_position_embeddings": 10**12}, "model makes by its config would take 8000.0 GB"),
        ({"max_position_embeddings": 0}, r"config\.json: max_position_embeddings is 0, and a text"),
    ],
)
def test_configs_that_are_refused(
    bert: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadInput, match=reason):
        load(copy(bert, tmp_path, **changes))


def test_configs_that_are_no_configs(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"no config\.json"):
        load(tmp_path)
    for text, reason in (
        ("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[1]", "not a JSON object"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BadInput, match=reason):
            load(tmp_path)


def test_a_hub_id_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Missing, match=r"no-such-organisation/no-such-model.*hf download"):
        load("no-such-organisation/no-such-model")
