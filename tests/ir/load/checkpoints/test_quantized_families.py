"""Experts and joined projections that other tools have quantized: the library's model of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.backends.onnx.lowering import lowered
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.tracing.original import ModuleOriginal
from graphwright.ir.structure.recognize import recognize
from safetensors.torch import load_file, save_file

from . import layouts

Tensors = layouts.Tensors
GROUP = 16
EXPERTS = "model.layers.0.mlp.experts"
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PICKED = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2}
IDS = torch.arange(1, 13).reshape(2, 6)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def model_of(name: str, **sizes: Any) -> Any:
    """A model of the library with random numbers, biases and norms too."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES | sizes)
    torch.manual_seed(0)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) * 0.05
    return model.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**INPUTS).logits
    return logits


def checked(folder: Path, model: Any, count: int, experts: int) -> View:
    """The folder's graph: its weights are the model's, bit for bit, and its logits in ONNX Runtime
    are; ``count`` of its linears are in few bits, and each of the experts runs on its own rows."""
    view = gw.load(folder, cache=False)
    original = view.source.original
    assert isinstance(original, ModuleOriginal)
    parameters = dict(original.make().named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameters[name], parameter, rtol=0, atol=0, msg=name)
    canonicalize(view)
    assert sum(linear.quantized for linear in recognize(view).linears) == count
    written = lowered(view)
    assert sum(node.op_type == "NonZero" for node in written.model.graph) == experts
    torch.testing.assert_close(
        gw.compile(written)(**INPUTS)["logits"], logits_of(model), rtol=2e-4, atol=2e-5
    )
    return view


# --- experts and joined projections ---------------------------------------------------------------

Layout = Callable[[np.ndarray[Any, Any], np.random.Generator], tuple[Tensors, torch.Tensor]]


def _drawn(codes: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """Scales f16 and zero points ``[N, groups]``."""
    shape = (len(codes), codes.shape[1] // GROUP)
    return (rng.random(shape) * 0.02 + 0.01).astype(np.float16), rng.integers(1, 16, shape)


def gptq(codes: Any, rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    """With act-order."""
    scales, zeros = _drawn(codes, rng)
    index = rng.permutation(np.arange(codes.shape[1]) // GROUP)
    parts = layouts.gptq(codes, scales, zeros, index, 4, 1)
    return parts, layouts.expected(codes, scales, zeros, index)


def awq(codes: Any, rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    scales, zeros = _drawn(codes, rng)
    index = np.arange(codes.shape[1]) // GROUP
    return layouts.awq(codes, scales, zeros), layouts.expected(codes, scales, zeros, index)


def packed(codes: Any, rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    scales, zeros = _drawn(codes, rng)
    index = np.arange(codes.shape[1]) // GROUP
    parts = layouts.packed(codes, scales, zeros, 4)
    return parts, layouts.expected(codes, scales, zeros, index)


_ARGS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
CONFIGS: dict[Layout, dict[str, Any]] = {
    gptq: {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    awq: {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm",
          "modules_to_not_convert": ["gate"]},
    packed: {"quant_method": "compressed-tensors", "format": "pack-quantized",
             "ignore": ["lm_head"],
             "config_groups": {"group_0": {"targets": ["Linear"], "weights": _ARGS}}},
}  # fmt: skip


def quantize(model: Any, layout: Layout, out: Path) -> tuple[Path, Any, list[str]]:
    """The model's folder with the linears of its layers in a layout, routers aside; the library's
    model of the same numbers, and the names of those linears."""
    model.save_pretrained(out / "dense")
    dense = load_file(out / "dense" / "model.safetensors")
    stored, names = dict(dense), []
    rng = np.random.default_rng(0)
    for name, tensor in dense.items():
        whole = len(tensor) == 1 and layout is not gptq  # the others pack several rows a word
        if tensor.dim() != 2 or ".0." not in name or name.endswith(".gate.weight") or whole:
            continue
        names.append(name.removesuffix(".weight"))
        del stored[name]
        turned = ".c_" in name  # GPT-2's classes have [in, out]
        shape = tensor.T.shape if turned else tensor.shape
        parts, numbers = layout(rng.integers(0, 16, shape), rng)
        dense[name] = (numbers.T if turned else numbers).contiguous()
        stored |= {f"{names[-1]}.{part}": data.contiguous() for part, data in parts.items()}
    save_file(dense, out / "dense" / "model.safetensors", {"format": "pt"})
    folder = out / "quantized"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "dense" / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": CONFIGS[layout]})
    )
    return folder, type(model).from_pretrained(out / "dense").eval(), names


@pytest.mark.parametrize(
    ("name", "sizes", "layout", "linear", "count"),
    [
        ("Mixtral", PICKED, awq, "block_sparse_moe.experts.2.w3", 4 + 9),
        ("Qwen2Moe", PICKED | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
         gptq, "mlp.shared_expert_gate", 4 + 9 + 3 + 1),
        ("Phi3", {}, packed, "mlp.gate_up_proj", 4),
        ("GPT2", {}, gptq, "attn.c_attn", 4),
    ],
)  # fmt: skip
def test_linears_of_a_kind_are_read_as_they_are_stored(
    name: str, sizes: dict[str, Any], layout: Layout, linear: str, count: int, tmp_path: Path
) -> None:
    folder, model, names = quantize(model_of(name, **sizes), layout, tmp_path)
    path = "transformer.h.0" if name == "GPT2" else "model.layers.0"
    assert f"{path}.{linear}" in names and len(names) == count
    view = checked(folder, model, count, experts=3 * bool(sizes))
    if not sizes:
        return
    note = "an artifact runs each of 3 experts on the tokens"
    assert view.source.notes[-1].startswith(note)
    linears = {each.name for each in recognize(view).linears}
    assert {f"{EXPERTS}.{expert}.{part}_proj" for expert in range(3)
            for part in ("gate", "up", "down")} <= linears  # fmt: skip


# --- gpt-oss's own --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A folder as gpt-oss's, and its tensors."""
    out = tmp_path_factory.mktemp("mxfp4")
    model = model_of("GptOss", **PICKED, head_dim=8, layer_types=["full_attention"])
    model.save_pretrained(out)
    tensors = load_file(out / "model.safetensors")
    rng = torch.Generator().manual_seed(0)
    for kind, (rows, columns) in {"gate_up_proj": (128, 32), "down_proj": (32, 64)}.items():
        shape = (3, rows, columns // 32)
        del tensors[f"{EXPERTS}.{kind}"]
        tensors[f"{EXPERTS}.{kind}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=rng
                                                            ).byte()  # fmt: skip
        tensors[f"{EXPERTS}.{kind}_scales"] = torch.randint(118, 124, shape, generator=rng).byte()
    tensors[f"{EXPERTS}.down_proj_scales"][0, 0, 0] = 0  # the least exponent there is
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4",
                                     "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return out, tensors


def test_blocks_of_gpt_oss_are_what_the_library_makes_of_them(
    mxfp4: tuple[Path, Tensors],
) -> None:
    """The same file, dequantized by the library as it loads it."""
    import transformers

    folder, tensors = mxfp4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = transformers.GptOssForCausalLM.from_pretrained(
        folder, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype="float32"
    )
    model.eval().float()  # transformers 5.17 leaves the experts in bfloat16
    assert model.model.layers[0].mlp.experts.down_proj.any()
    view = checked(folder, model, 3 * 2, experts=3)
    (note,) = [note for note in view.source.notes if "mxfp4" in note]
    assert note.endswith("quantized by mxfp4, taken as it is stored: 6 of 8 bits, groups of 32")
    names = {linear.name for linear in recognize(view).linears if linear.quantized}
    kinds = ("gate_up_proj", "down_proj")
    assert names == {f"{EXPERTS}.{expert}.{kind}" for expert in range(3) for kind in kinds}


def _without(*names: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(f"{EXPERTS}.{name}") for name in names] and None


def _part(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    key = f"{EXPERTS}.{name}"
    return lambda tensors: tensors.update({key: change(tensors[key]).contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("down_proj_scales"), "experts: down_proj_scales is not in the checkpoint, and"),
        (_without("down_proj_blocks"), "experts: down_proj_blocks is not in the checkpoint, and"),
        (_without(*(f"{kind}_proj_{part}" for kind in ("gate_up", "down") for part in (
            "blocks", "scales"))), "says mxfp4, and the checkpoint has no tensor gate_up_proj_bl"),
        (_part("down_proj_scales", torch.Tensor.float), r"experts.down_proj_scales is f32\[3, 32"),
        (_part("down_proj_blocks", lambda t: t.flatten(2)),
         r"experts.down_proj_blocks is u8\[3, 32, 32\], expected uint8 \[experts, rows, blocks"),
        (_part("down_proj_blocks", lambda t: t[:, :, :1]),
         r"down_proj_blocks is \[3, 32, 1, 16\]; down_proj_scales \[3, 32, 2\] make \[3, 32, 2, 1"),
        (lambda t: t.update({f"{EXPERTS}.down_proj": torch.ones(3, 64, 32)}),
         "experts has both down_proj and down_proj_blocks: one of them is stale"),
        (lambda t: [_part(f"down_proj_{part}", lambda x: x[:, :16])(t) for part in (
            "blocks", "scales")],
         r"'model.layers.0.mlp.experts.0.down_proj' is \[64, 16\], the config asks for \[64, 32\]"),
        (lambda t: [_part(f"down_proj_{part}", lambda x: x[:2])(t) for part in (
            "blocks", "scales")],
         "1 of the model's weights are not in the checkpoint: .*experts.2.down_proj"),
    ],
)  # fmt: skip
def test_blocks_that_contradict_each_other(
    change: Callable[[Tensors], Any], message: str, mxfp4: tuple[Path, Tensors], tmp_path: Path
) -> None:
    folder, tensors = tmp_path, {name: tensor.clone() for name, tensor in mxfp4[1].items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(mxfp4[0] / "config.json", folder)
    with pytest.raises(BadInput, match=message):
        gw.load(folder, cache=False)
