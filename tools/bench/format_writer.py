"""Checkpoints as other tools' own code writes them, for ``formats.py``: run by its path.

``format_writer.py FOLDER OUT FORMAT``: quantizes every linear of the blocks of a Hugging Face
folder by the library of the format, writes the folder ``OUT`` with what it made, and beside it
``OUT.npy``: the logits of transformers' model with the numbers that the same library makes of its
codes. The ids are 1 to 24. What is compared is the reading of a layout, not a method: ranges are
those of the least and the greatest value. Of PEFT, ``OUT`` is an adapter of random factors, and the
logits are those of its own model.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

COUNT = 24
LINEAR = re.compile(r"\.layers\..*\.(\w+_proj|w[123])\.weight$")
ROW = re.compile(r"\.shared_expert_gate\.weight$")
"""A gate of one row, which GPTQ's layout has a place for and those of others have not; GPTQModel
7.7 fails to pack it in 3 bits."""
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, torch.Tensor] | tuple[Tensors, torch.Tensor, str]
"""A linear's tensors, the library's own numbers, and what the file's header says of it."""


def main(folder: str, out: str, kind: str) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if kind in ADAPTERS:
        _adapter(model, out, ADAPTERS[kind])
        return
    pack, config = WRITERS[kind](kind)
    tensors, header = load_file(Path(folder) / "model.safetensors"), {"format": "pt"}
    rows = kind.startswith("gptq-") and not kind.startswith("gptq-3")
    for name in [n for n in tensors if LINEAR.search(n) or (rows and ROW.search(n))]:
        parts, dense, *state = pack(tensors.pop(name).float())
        if state:
            header[name] = state[0]
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        put(model, name, dense.float())
    shutil.copytree(folder, out)
    save_file(tensors, Path(out) / "model.safetensors", header)
    path = Path(out) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    _save_logits(model, out)


def put(model: Any, name: str, dense: torch.Tensor) -> None:
    """Write a matrix into the model; one of an expert into the stack that the model keeps."""
    expert = EXPERT.fullmatch(name)
    if expert is None:
        model.get_parameter(name).data.copy_(dense)
        return
    path, index, part = expert[1].replace("block_sparse_moe", "mlp"), int(expert[2]), expert[3]
    part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(part, part)
    stack = model.get_parameter(f"{path}.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}")
    rows = stack.data[index]
    halves = (rows,) if part == "down_proj" else rows.chunk(2)
    halves[part == "up_proj"].copy_(dense)


def _save_logits(model: Any, out: str) -> None:
    ids = torch.arange(1, COUNT + 1)[None]
    with torch.no_grad():
        np.save(f"{out}.npy", model(input_ids=ids).logits.numpy())


def _adapter(model: Any, out: str, options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    linears = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=8, lora_alpha=12, target_modules=linears, init_lora_weights=False,
                          task_type="CAUSAL_LM", **options)  # fmt: skip
    adapted = get_peft_model(model, settings).eval()
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape)
    adapted.save_pretrained(out)
    _save_logits(adapted, out)


ADAPTERS: dict[str, dict[str, Any]] = {
    "peft-lora": {}, "peft-rslora": {"use_rslora": True}, "peft-dora": {"use_dora": True},
    "peft-patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"0.mlp.up_proj": 7}},
}  # fmt: skip


def _compressed(kind: str) -> tuple[Callable[[torch.Tensor], Made], dict[str, Any]]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    form, options = COMPRESSED[kind]
    args = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)

    def pack(weight: torch.Tensor) -> Made:
        weight = weight.bfloat16()
        group = args.group_size or weight.shape[1]
        parts = weight.float().reshape(len(weight), -1, group)
        extra = {}
        if "nvfp4" in form:
            extra = {"global_scale": generate_gparam(parts.min(), parts.max())}
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args, **extra)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        if extra:
            state["weight_global_scale"] = extra["global_scale"]
        tensors = {k: t for k, t in compressor.compress(state, scheme).items() if t is not None}
        if args.symmetric:
            tensors.pop("weight_zero_point", None)
        dense = compressor.decompress(dict(tensors), scheme)["weight"]
        return tensors, dense

    groups = {"group_0": {"targets": ["Linear"],
                          "weights": json.loads(args.model_dump_json())}}  # fmt: skip
    return pack, {"quant_method": "compressed-tensors", "format": form, "config_groups": groups,
                  "quantization_status": "compressed", "ignore": ["lm_head"]}  # fmt: skip


COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "ct-w4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "ct-w4-zeros": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32,
                                       "symmetric": False}),
    "ct-w3": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
    "ct-int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "ct-fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "ct-nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 16,
                                          "strategy": "tensor_group",
                                          "scale_dtype": torch.float8_e4m3fn}),
    "ct-mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 32,
                                          "strategy": "group", "scale_dtype": torch.uint8}),
}  # fmt: skip


def _bnb4(kind: str) -> tuple[Callable[[torch.Tensor], Made], dict[str, Any]]:
    import bitsandbytes.functional as library

    def pack(weight: torch.Tensor) -> Made:
        codes, state = library.quantize_4bit(
            weight, blocksize=64, quant_type=kind[4:7], compress_statistics=kind.endswith("nested")
        )
        parts = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
        return {"weight": codes} | parts, library.dequantize_4bit(codes, state)

    return pack, {"quant_method": "bitsandbytes", "load_in_4bit": True}


def _bnb8(kind: str) -> tuple[Callable[[torch.Tensor], Made], dict[str, Any]]:
    import bitsandbytes.functional as library

    def pack(weight: torch.Tensor) -> Made:
        codes, scale, _ = library.int8_vectorwise_quant(weight.half())
        return ({"weight": codes, "SCB": scale},
                library.int8_vectorwise_dequant(codes, scale))  # fmt: skip

    return pack, {"quant_method": "bitsandbytes", "load_in_8bit": True}


def _hqq(kind: str) -> tuple[Callable[[torch.Tensor], Made], dict[str, Any]]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    bits, axis = (int(word) for word in kind.removeprefix("hqq-").split("-axis"))
    settings = BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)

    def pack(weight: torch.Tensor) -> Made:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        stored = HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")
        return dict(stored.state_dict()), stored.dequantize()

    return pack, {"quant_method": "hqq", "quant_config": settings, "skip_modules": ["lm_head"]}


def _ranges(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales in float16 and whole zero points ``[N, groups]``, these 1 at least: the first version
    of GPTQ's format stores one less."""
    parts = weight.reshape(len(weight), -1, group)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = ((high - low) / ((1 << bits) - 1)).half().float()
    return scale, (-low / scale).round().clamp(1, (1 << bits) - 1)


def _gptq(kind: str) -> tuple[Callable[[torch.Tensor], Made], dict[str, Any]]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    bits, ordered, first = int(kind.split("-")[1]), "act" in kind, "v2" not in kind
    settings = {"bits": bits, "group_size": 32, "sym": False, "desc_act": ordered}

    def pack(weight: torch.Tensor) -> Made:
        rows, columns = weight.shape
        groups = torch.arange(columns) // 32
        if ordered:
            groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        scale, zero = _ranges(weight[:, groups.argsort(stable=True)], bits, 32)
        stored = TorchLinear(in_features=columns, out_features=rows, format=FORMAT.GPTQ_V2,
                             **settings)  # fmt: skip
        stored.pack_original(linear, scale, zero, groups.int())
        parts = {name: tensor.clone() for name, tensor in stored.state_dict().items()}
        stored.scales = stored.scales.float()  # it dequantizes in the dtype of the scales
        stored.post_init()
        dense = stored.dequantize_weight().T
        if first:
            stored.qzeros = parts["qzeros"]
            convert_gptq_v2_to_v1_format_module(stored, QuantizeConfig(**settings))
            parts["qzeros"] = stored.qzeros
        return parts, dense

    config = {"quant_method": "gptq", "checkpoint_format": "gptq" if first else "gptq_v2"}
    return pack, config | settings


def _awq(kind: str) -> tuple[Callable[[torch.Tensor], Made], dict[str, Any]]:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    def pack(weight: torch.Tensor) -> Made:
        rows, columns = weight.shape
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        stored = AwqTorchLinear(bits=4, group_size=32, sym=False, desc_act=False,
                                in_features=columns, out_features=rows)  # fmt: skip
        stored.pack(linear, *_ranges(weight, 4, 32))
        parts = {name: getattr(stored, name) for name in ("qweight", "qzeros", "scales")}
        wide = parts["scales"].float()
        return parts, dequantize_gemm(parts["qweight"], parts["qzeros"], wide, 4, 32).T

    return pack, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
                  "version": "gemm"}  # fmt: skip


def _int4_tensor(kind: str) -> tuple[Callable[[torch.Tensor], Made], dict[str, Any]]:
    """torchao has no kernel of this class but on GPUs: codes and numbers are by MSLK's formula."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int4Tensor

    def pack(weight: torch.Tensor) -> Made:
        groups = weight.reshape(len(weight), -1, 32)
        low = groups.amin(-1)
        scale = (groups.amax(-1) - low) / 15
        codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).flatten(1) - 8
        signed, start = codes.to(torch.int8), (low + 8 * scale).bfloat16()
        packed = (signed[:, ::2] & 15) | (signed[:, 1::2] << 4)
        tensor = Int4Tensor(packed, scale.bfloat16().T.contiguous(), start.T.contiguous(),
                            [1, 32], weight.shape)  # fmt: skip
        tensors, header = flatten_tensor_state_dict({"linear.weight": tensor})
        parts = {name.removeprefix("linear."): value for name, value in tensors.items()}
        each = [part.float().repeat_interleave(32, 1) for part in (scale.bfloat16(), start)]
        return parts, codes * each[0] + each[1], header["linear.weight"]

    return pack, {"quant_method": "torchao", "modules_to_not_convert": ["lm_head"]}


def _torchao(kind: str) -> tuple[Callable[[torch.Tensor], Made], dict[str, Any]]:
    import torchao.quantization as library
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    groups, int4 = library.PerGroup(32), vars(torch)["int4"]  # which torch's stubs do not have
    config = {
        "torchao-int8": lambda: library.Int8WeightOnlyConfig(version=2),
        "torchao-int4": lambda: library.IntxWeightOnlyConfig(
            weight_dtype=int4, granularity=groups),
        "torchao-int4-zeros": lambda: library.IntxWeightOnlyConfig(
            weight_dtype=int4, granularity=groups,
            mapping_type=library.MappingType.ASYMMETRIC),
        "torchao-fp8": lambda: library.Float8WeightOnlyConfig(),
    }[kind]()  # fmt: skip

    def pack(weight: torch.Tensor) -> Made:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        library.quantize_(linear, config)
        tensors, header = flatten_tensor_state_dict({"linear.weight": linear.weight})
        parts = {name.removeprefix("linear."): tensor for name, tensor in tensors.items()}
        return parts, linear.weight.dequantize().detach(), header["linear.weight"]

    return pack, {"quant_method": "torchao", "modules_to_not_convert": ["lm_head"]}


TORCHAO = ("torchao-int8", "torchao-int4", "torchao-int4-zeros", "torchao-fp8")
GPTQ = ("gptq-2", "gptq-3", "gptq-4", "gptq-8", "gptq-4-v2", "gptq-4-act", "gptq-3-v2-act")
HQQ = ("hqq-4-axis1", "hqq-3-axis1", "hqq-2-axis1", "hqq-8-axis1", "hqq-4-axis0")
WRITERS = {
    **dict.fromkeys(GPTQ, _gptq), "awq": _awq,
    **dict.fromkeys(COMPRESSED, _compressed), "bnb-nf4": _bnb4, "bnb-nf4-nested": _bnb4,
    "bnb-fp4": _bnb4, "bnb-int8": _bnb8, **dict.fromkeys(HQQ, _hqq),
    **dict.fromkeys(TORCHAO, _torchao), "torchao-int4-tensor": _int4_tensor,
}  # fmt: skip

if __name__ == "__main__":
    main(*sys.argv[1:])
