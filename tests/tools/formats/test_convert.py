"""Artifacts in other tools' formats: read back they are the same codes, and compute the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphwright as gw
import onnx
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.weights import CastWeight, MemoryWeight
from graphwright.ir.ops.coded_weight import CodedWeight
from graphwright.ir.ops.pack import pack
from graphwright.tools.formats import model_state, quantized_folder
from graphwright.tools.formats.convert import convert
from graphwright.tools.formats.model_state import ModelState, PackedLinear
from graphwright.tools.formats.transformers_js import file_form
from safetensors.torch import load_file

IDS = torch.arange(1, 13).reshape(2, 6)
GIVEN = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 in float32: with biases, and a head that is tied to its table."""
    import transformers

    folder = tmp_path_factory.mktemp("source") / "model"
    config = transformers.Qwen2Config(
        vocab_size=1100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.Qwen2ForCausalLM(config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifacts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The artifact of a recipe, made once."""
    by_recipe: dict[str, Path] = {}
    graph = gw.load(model)

    def of(recipe: str) -> Path:
        if recipe not in by_recipe:
            samples = [GIVEN]
            calibration = [GIVEN] if "eora" in recipe or "drop" in recipe else None
            result = gw.optimize(graph, recipe, samples=samples, calibration=calibration)
            out = tmp_path_factory.mktemp("made") / "out"
            by_recipe[recipe] = gw.export(result.graph, out, report=result.report)
        return by_recipe[recipe]

    return of


def logits(folder: Path) -> torch.Tensor:
    run = gw.compile(folder if (folder / "model.onnx").is_file() else gw.load(folder))
    return run(**GIVEN)["logits"]


CASES = [
    ("gptq", "quantize{bits=4 group=32 embeddings=keep}", {"bits": 4, "checkpoint_format": "gptq"}),
    ("gptq", "quantize{bits=3 group=0 symmetric=false embeddings=keep}",
     {"bits": 3, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"}),
    ("compressed-tensors", "quantize{bits=4 group=32 embeddings=keep}",
     {"format": "pack-quantized"}),
    ("compressed-tensors",
     "quantize{bits=8 group=0 symmetric=false accuracy_level=0 embeddings=keep}", {}),
]  # fmt: skip


@pytest.mark.parametrize(("to", "recipe", "settings"), CASES, ids=lambda v: str(v)[:28])
def test_what_is_written_is_read_back(
    to: str, recipe: str, settings: dict[str, Any], artifacts: Any, tmp_path: Path
) -> None:
    artifact = artifacts(recipe)
    assert "14 linears in few bits" in convert(artifact, to, tmp_path / "out")[0]
    entry = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == to and {name: entry[name] for name in settings} == settings
    torch.testing.assert_close(logits(tmp_path / "out"), logits(artifact), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small Gemma 2, whose norms multiply by ``1 + w``, and an artifact of it."""
    import transformers

    folder = tmp_path_factory.mktemp("gemma")
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        query_pre_attn_scalar=32, sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "source")
    result = gw.optimize(gw.load(folder / "source"), "quantize{bits=4 group=32 embeddings=keep}")
    return folder / "source", gw.export(result.graph, folder / "out", report=result.report)


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors", "gguf"])
def test_norms_are_stored_as_their_class_reads_them(
    to: str, gemma: tuple[Path, Path], tmp_path: Path
) -> None:
    """In a folder ``w`` of a graph's ``1 + w``; in GGUF the sum, as llama.cpp multiplies by."""
    source, artifact = gemma
    weights, name = load_file(source / "model.safetensors"), "model.layers.0.input_layernorm.weight"
    out = tmp_path / "out"
    if to == "gguf":
        reader = pytest.importorskip("gguf").GGUFReader
        convert(artifact, to, out)
        tensors = {x.name: x.data for x in reader(out / "model.gguf").tensors}
        norm = torch.tensor(tensors["blk.0.attn_norm.weight"]) - 1
        out = out / "model.gguf"
    else:
        convert(artifact, to, out)
        norm = load_file(out / "model.safetensors")[name]
    torch.testing.assert_close(norm, weights[name], rtol=0, atol=2e-7)
    torch.testing.assert_close(logits(out), logits(artifact), rtol=1e-4, atol=1e-5)


def test_a_gemma_that_llama_cpp_does_not_have(gemma: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    shutil.copytree(gemma[1], tmp_path / "other")
    settings = json.loads((tmp_path / "other/config.json").read_text())
    settings["query_pre_attn_scalar"] = 24
    (tmp_path / "other/config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=r"query_pre_attn_scalar is 24 .* has 32"):
        convert(tmp_path / "other", "gguf", tmp_path / "out")


def test_forms_that_differ(artifacts: Any, tmp_path: Path) -> None:
    """Each linear's own bits and group, and one that is left whole."""
    down, rest = "*.layers.1.mlp.down_proj", "*.layers.0.*"
    recipe = (f"quantize{{bits=8 group=16 include=[{down}] accuracy_level=0}},"
              f"quantize{{bits=4 group=32 include=[{rest}]}}")  # fmt: skip
    artifact = artifacts(recipe)
    for to in ("gptq", "compressed-tensors"):
        convert(artifact, to, tmp_path / to)
        torch.testing.assert_close(logits(tmp_path / to), logits(artifact), rtol=1e-4, atol=1e-5)
        settings = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"]
        if to == "gptq":
            pattern = r"+:^model\.layers\.1\.mlp\.down_proj$"
            assert settings["dynamic"][pattern] == {"bits": 8, "group_size": 16}
            assert r"-:^model\.layers\.1\.mlp\.up_proj$" in settings["dynamic"]
        else:
            assert "model.layers.1.mlp.up_proj" in settings["ignore"]
            assert "model.layers.0.mlp.up_proj" not in settings["ignore"]
            assert len(settings["config_groups"]) == 2


def test_stored_tables_are_whole_numbers_there(artifacts: Any, tmp_path: Path) -> None:
    """A tied head reads its table's bytes in the artifact, and its numbers in the folder."""
    artifact = artifacts("quantize{bits=4 group=32 embeddings=8 accuracy_level=0}")
    notes = convert(artifact, "gptq", tmp_path / "out")
    note = "stored in few bits in the artifact, whole here: model.embed_tokens.weight"
    assert note in notes
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert "lm_head.weight" not in tensors and "lm_head.qweight" not in tensors
    torch.testing.assert_close(logits(tmp_path / "out"), logits(artifact), rtol=0.05, atol=0.02)
    graph = gw.compile(gw.load(artifact), backend="eager")(**GIVEN)
    torch.testing.assert_close(logits(tmp_path / "out"), graph["logits"], rtol=1e-4, atol=1e-4)


def test_scales_that_are_rounded_are_told(
    artifacts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an artifact are float16 numbers, in float32 where its runtime wants that."""
    artifact = artifacts("quantize{bits=8 group=16 include=[*.1.mlp.down_proj]}")
    for to, name in (("compressed-tensors", "weight_scale"), ("gptq", "scales")):
        assert len(convert(artifact, to, tmp_path / to)) == 1
        stored = load_file(tmp_path / to / "model.safetensors")
        assert stored[f"model.layers.1.mlp.down_proj.{name}"].dtype == torch.float16
    monkeypatch.setattr(model_state, "narrowed", lambda weight: CastWeight(weight, torch.float32))
    notes = convert(artifact, "gptq", tmp_path / "rounded")
    assert notes[1] == "scales of 1 linears rounded to float16, 5e-4 of each at most"


def test_codes_of_the_source_are_told(
    artifacts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifacts(CASES[0][1])
    name = "model.layers.0.mlp.down_proj.weight"
    sizes = {"block_rows": 64, "block_columns": 96, "in_features": 96, "out_features": 64}
    codes = MemoryWeight(torch.ones(64, 96).to(torch.float8_e4m3fn))
    parts = {"codes": codes, "scales": MemoryWeight(torch.ones(1, 1))}
    state = model_state.read_state(artifact)
    held = replace(state, whole={**state.whole, name: CodedWeight("linear_float8", parts, sizes)})
    monkeypatch.setattr(quantized_folder, "read_state", lambda _: held)
    assert f"whole here: {name}" in convert(artifact, "gptq", tmp_path / "mixed")[-1]
    held = replace(held, packed={})
    with pytest.raises(BadInput, match="1 linears are kept as their source stores them"):
        convert(artifact, "gptq", tmp_path / "out")


def test_paths_become_an_adapter(artifacts: Any, model: Path, tmp_path: Path) -> None:
    """``W^ + B A`` of every linear, by the adapter's names, is what the artifact computes."""
    artifact = artifacts("quantize{bits=3 group=32 embeddings=keep},eora{rank=4}")
    notes = convert(artifact, "gptq", tmp_path / "out")
    assert "low-rank paths as a PEFT adapter of rank 4" in notes[1]
    convert(artifact, "peft", tmp_path / "alone")
    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    alone = load_file(tmp_path / "alone/adapter_model.safetensors")
    assert adapter.keys() == alone.keys() and len(adapter) == 28
    settings = json.loads((tmp_path / "alone/adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 4 and settings["peft_type"] == "LORA"
    folded = _folded(tmp_path / "out", adapter, model)
    torch.testing.assert_close(folded, logits(artifact), rtol=1e-4, atol=1e-5)


def _folded(folder: Path, adapter: dict[str, torch.Tensor], model: Path) -> torch.Tensor:
    """transformers' forward with the dequantized weights and the factors multiplied in."""
    import transformers

    view = gw.load(folder, cache=False)
    weights = {view.name(v): view.weight(v) for node in view.nodes() for v in view.operands(node)
               if v is not None and not isinstance(v, int | float) and view.weight(v) is not None}
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    parameters = dict(network.named_parameters())
    for key, down in adapter.items():
        if key.endswith("lora_B.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        up = adapter[key.replace("lora_A", "lora_B")]
        whole = weights[f"{name}.weight"].read() + up.float() @ down.float()
        parameters[f"{name}.weight"].data.copy_(whole)
    with torch.no_grad():
        return network(**GIVEN).logits


@pytest.mark.parametrize(("recipe", "name", "dtype"), [
    ("quantize{bits=4 group=32}", "model_q4.onnx", "q4"),
    ("quantize{bits=8 group=0 symmetric=false accuracy_level=0}", "model_quantized.onnx", "q8"),
    ("drop-blocks{count=1},quantize{bits=4 group=32}", "model_q4.onnx", "q4"),
])  # fmt: skip
def test_the_layout_of_transformers_js(
    recipe: str, name: str, dtype: str, artifacts: Any, tmp_path: Path
) -> None:
    artifact, out = artifacts(recipe), tmp_path / "out"
    assert convert(artifact, "transformers.js", out) == [f"onnx/{name}, dtype {dtype}"]
    assert sorted(p.name for p in (out / "onnx").iterdir()) == [name, f"{name}_data"]
    settings = json.loads((out / "config.json").read_text())["transformers.js_config"]
    assert settings == {"dtype": dtype, "use_external_data_format": {name: 1}}
    output = gw.compile(out / "onnx" / name)(**GIVEN)["logits"]
    assert torch.equal(output, logits(artifact))


@pytest.mark.parametrize(("bits", "half", "form"), [
    (0, True, ("_fp16", "fp16")), (4, True, ("_q4f16", "q4f16")), (2, True, ("_q2f16", "q2f16")),
    (8, True, ("_quantized", "q8")), (4, False, ("_q4", "q4")),
])  # fmt: skip
def test_names_of_transformers_js_tell_what_a_graph_computes_in(
    bits: int, half: bool, form: tuple[str, str]
) -> None:
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    out = onnx.helper.make_tensor_value_info("y", kind, [1])
    nodes = [onnx.helper.make_node("MatMulNBits", ["x"], ["y"], bits=bits)] if bits else []
    assert file_form(onnx.helper.make_graph(nodes, "g", [], [out])) == form


def test_what_no_format_holds(artifacts: Any, model: Path, tmp_path: Path) -> None:
    plain = artifacts("quantize{bits=4 group=32}")
    for to, artifact, reason in (
        ("gptq", artifacts("hqq{bits=4 group=32}"), "has real zero points"),
        ("gptq", artifacts("drop-blocks{count=1},quantize{bits=4 group=32}"), "other blocks"),
        ("peft", plain, "has no low-rank path"),
        ("gguff", plain, "there is no format 'gguff'"),
        ("gptq", model, "is not an artifact"),
    ):
        with pytest.raises(BadInput, match=reason):
            convert(artifact, to, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="out exists: give a new folder"):
        convert(plain, "gptq", tmp_path / "out")


def test_a_gate_of_one_row_is_whole_in_gptq(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2-MoE's, of which GPTQModel packs none: the rest of the folder is as ever."""

    def linear(name: str, rows: int) -> PackedLinear:
        codes, scales = torch.full((rows, 64), 9, dtype=torch.uint8), torch.ones(rows, 2) / 2
        stored = MemoryWeight(pack(codes, 4, 32)), MemoryWeight(scales), None
        return PackedLinear(name, rows, 64, 4, 32, stored)

    packed = {name: linear(name, rows) for name, rows in {"up_proj": 32, "gate": 1}.items()}
    state = ModelState(tmp_path, {"model_type": "qwen2_moe"}, packed, {}, {}, {})
    monkeypatch.setattr(quantized_folder, "read_state", lambda _: state)
    (tmp_path / "out").mkdir()
    notes = quantized_folder.write_gptq(tmp_path, tmp_path / "out")
    assert any("whole here: gate.weight" in note for note in notes)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["gate.weight"], torch.full((1, 64), 0.5))
    assert {name for name in tensors if name.startswith("up")} == {
        "up_proj.qweight", "up_proj.qzeros", "up_proj.scales", "up_proj.g_idx"
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {"-:^gate$": {}}
