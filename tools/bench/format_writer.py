"""Checkpoints as other tools' own code writes them, for ``formats.py``: run by its path.

``format_writer.py FOLDER OUT FORMAT``: quantizes every linear of the blocks of a Hugging Face
folder by the library of the format, writes the folder ``OUT`` with what it made, and beside it
``OUT.npy``: the logits of transformers' model with the numbers that the same library makes of its
codes. The ids are 1 to 24. What is compared is the reading of a layout, not a method: ranges are
those of the least and the greatest value.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

COUNT = 24
Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, torch.Tensor]
"""A linear's tensors, and the library's own numbers."""


def main(folder: str, out: str, kind: str) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pack, config = WRITERS[kind](kind)
    tensors = load_file(Path(folder) / "model.safetensors")
    for name in [n for n in tensors if ".layers." in n and n.endswith("_proj.weight")]:
        parts, dense = pack(tensors.pop(name))
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        model.get_parameter(name).data.copy_(dense.float())
    shutil.copytree(folder, out)
    save_file(tensors, Path(out) / "model.safetensors", {"format": "pt"})
    path = Path(out) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    ids = torch.arange(1, COUNT + 1)[None]
    with torch.no_grad():
        np.save(f"{out}.npy", model(input_ids=ids).logits.numpy())


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


WRITERS = {
    **dict.fromkeys(COMPRESSED, _compressed), "bnb-nf4": _bnb4, "bnb-nf4-nested": _bnb4,
    "bnb-fp4": _bnb4, "bnb-int8": _bnb8,
}  # fmt: skip

if __name__ == "__main__":
    main(*sys.argv[1:])
