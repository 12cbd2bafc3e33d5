"""A linear as other tools store it, case by case: config, tensors, the numbers that they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from graphwright.ir.load.checkpoints.checkpoint import Checkpoint, read_checkpoint
from graphwright.ir.load.checkpoints.quantized import quantization_of, with_dense_names
from safetensors.torch import load_file, save_file

from . import layouts
from .layouts import Tensors, expected

K, N, GROUP = 64, 96, 32
LINEAR = "model.layers.0.mlp.up_proj"


def written(
    dense: Path, out: Path, quantization: dict[str, Any], parts: Tensors, name: str = LINEAR
) -> Path:
    """The folder with one linear's weight in these parts, and a config that says so."""
    tensors = load_file(dense / "model.safetensors")
    del tensors[f"{name}.weight"]
    tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    header = quantization.pop("header", {})  # torchao says there what its tensors are
    save_file(tensors, out / "model.safetensors", {"format": "pt"} | header)
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config))
    return out


def drawn(bits: int, *, symmetric: bool, group: int = GROUP) -> tuple[np.ndarray, ...]:
    """Codes ``[N, K]``, scales f16 and zero points ``[N, groups]``."""
    rng = np.random.default_rng(bits)
    groups = -(-K // group)
    codes = rng.integers(0, 1 << bits, (N, K))
    scales = (rng.random((N, groups)) * 0.02 + 0.01).astype(np.float16)
    low = 0 if not symmetric else 1 << (bits - 1)
    zeros = rng.integers(low, (1 << bits) if not symmetric else low + 1, (N, groups))
    return codes, scales, zeros


def gptq(
    bits: int, version: str, *, symmetric: bool, group: int = GROUP, shuffled: bool = False
) -> tuple[dict[str, Any], Tensors, torch.Tensor]:
    codes, scales, zeros = drawn(bits, symmetric=symmetric, group=group)
    index = np.arange(K) // group
    if shuffled:
        index = np.random.default_rng(1).permutation(index)
    parts = layouts.gptq(codes, scales, zeros, index, bits, less=int(version == "gptq"))
    config = {"quant_method": "gptq", "bits": bits, "group_size": group if group < K else -1,
              "sym": symmetric, "desc_act": shuffled, "checkpoint_format": version}  # fmt: skip
    return config, parts, expected(codes, scales, zeros, index)


def packed(
    bits: int, *, symmetric: bool, strategy: str = "group", old: bool = False
) -> tuple[dict[str, Any], Tensors, torch.Tensor]:
    group = GROUP if strategy == "group" else K
    codes, scales, zeros = drawn(bits, symmetric=symmetric, group=group)
    each = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -K % each))).reshape(N, -1, each)
    old_words = sum(padded[..., i].astype(np.uint32) << (bits * i) for i in range(each))
    parts = layouts.packed(codes, scales, None if symmetric else zeros, bits)
    if old:
        parts["weight_packed"] = torch.from_numpy(old_words.astype(np.uint32).view(np.int32))
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
            "group_size": group if strategy == "group" else None}  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": args}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized",
              "config_groups": groups, "ignore": ["lm_head"]}  # fmt: skip
    return config, parts, expected(codes, scales, zeros, np.arange(K) // group)


Case = tuple[dict[str, Any], Tensors, torch.Tensor, int]
"""The config, a linear's tensors, its numbers and the bits that the graph holds it in: 0 for
numbers, -1 for those that keep their codes."""


def int8() -> Case:
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (N, K), generator=rng, dtype=torch.int8)
    scale = torch.rand(N, 1, generator=rng).half() * 0.02
    config = of_groups("int-quantized", {"num_bits": 8, "strategy": "channel"})
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}
    return config, parts, codes.float() * scale.float(), 8


def bnb8() -> Case:
    _, parts, _, _ = int8()
    codes, scale = parts["weight"], parts["weight_scale"].float().flatten() * 127
    stored = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return config, stored, codes.float() * (scale / 127)[:, None], 8


NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def nf4(*, nested: bool) -> Case:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, N * K).astype(np.uint8)
    absmax = rng.random(N * K // 64).astype(np.float32) + 0.1
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16",
                             "shape": [N, K]}  # fmt: skip
    table = np.array(NF4, np.float32)
    parts = {
        "weight": torch.from_numpy(codes[::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": torch.from_numpy(absmax), "weight.quant_map": torch.from_numpy(table),
    }  # fmt: skip
    if nested:
        state |= {"nested_blocksize": 256, "nested_offset": 0.25, "nested_dtype": "float32"}
        outer = np.linspace(-1, 1, 256).astype(np.float32)
        small = rng.integers(0, 256, len(absmax)).astype(np.uint8)
        parts |= {"weight.absmax": torch.from_numpy(small),
                  "weight.nested_absmax": torch.tensor([0.5]),
                  "weight.nested_quant_map": torch.from_numpy(outer)}  # fmt: skip
        absmax = outer[small] * np.float32(0.5) + np.float32(0.25)
    text = json.dumps(state).encode()
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    numbers = table[codes] * np.repeat(absmax, 64)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return config, parts, torch.from_numpy(numbers.reshape(N, K)), -1


def float8(block: list[int] | None, key: str = "weight_scale") -> Case:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=rng).to(torch.float8_e4m3fn)
    down, across = block or [1, K]
    scale = torch.rand(-(-N // down), -(-K // across), generator=rng) * 0.1
    each = scale.repeat_interleave(down, 0)[:N].repeat_interleave(across, 1)[:, :K]
    config = {"quant_method": "fp8", "weight_block_size": block}
    if key == "weight_scale":
        config = of_groups("float-quantized", {"num_bits": 8, "type": "float"})
    return config, {"weight": weight, key: scale}, weight.float() * each, -1


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def fp4(kind: str) -> Case:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (N, K)).astype(np.uint8)
    group = 32 if kind == "mxfp4" else 16
    exponents = torch.from_numpy(rng.integers(118, 124, (N, K // group)).astype(np.uint8))
    halves = (torch.rand(N, K // group) * 4).to(torch.float8_e4m3fn)
    parts = {"weight_packed": torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4),
             "weight_scale": exponents if kind == "mxfp4" else halves}  # fmt: skip
    scale = torch.exp2(exponents.float() - 127) if kind == "mxfp4" else halves.float() / 64
    if kind != "mxfp4":
        parts["weight_global_scale"] = torch.tensor([64.0])
    config = of_groups(f"{kind}-pack-quantized", {"num_bits": 4, "type": "float"})
    if kind == "modelopt":
        parts["weight"] = parts.pop("weight_packed")
        parts["weight_scale_2"] = 1 / parts.pop("weight_global_scale")
        config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    wide = torch.tensor(E2M1)[torch.from_numpy(codes).long()]
    return config, parts, wide * scale.repeat_interleave(group, 1), 8


def hqq(bits: int, axis: int) -> Case:
    rng = np.random.default_rng(bits)
    shape = (N * K // GROUP, GROUP) if axis == 1 else (GROUP, N * K // GROUP)
    codes = rng.integers(0, 1 << bits, shape)
    scale = torch.rand((len(codes), 1) if axis == 1 else (1, codes.shape[1])).half() * 0.02
    zero = torch.rand(scale.shape).half() * 7
    slabs = {8: 1, 4: 2, 3: 10, 2: 4}[bits]
    padded = np.zeros((-(-len(codes) // slabs) * slabs, codes.shape[1]), np.int64)
    padded[: len(codes)] = codes
    words = sum(slab << (bits * (slabs - 1 - place))
                for place, slab in enumerate(np.split(padded, slabs)))  # fmt: skip
    packing = "3bit_32" if bits == 3 else f"{bits}bit_u8"
    parts = {
        "W_q": torch.from_numpy(words).to(torch.int32 if bits == 3 else torch.uint8),
        "scale": scale, "zero": zero, "shape": torch.tensor([N, K]), "nbits": torch.tensor(bits),
        "axis": torch.tensor(axis), "packing": torch.tensor(list(packing.encode())).byte(),
        "group_size": torch.tensor(GROUP), "view_as_float": torch.tensor(0).byte(),
    }  # fmt: skip
    numbers = (torch.from_numpy(codes).float() - zero.float()) * scale.float()
    return {"quant_method": "hqq"}, parts, numbers.reshape(N, K), bits if axis == 1 else 0


def torchao(
    bits: int, *, symmetric: bool, kind: str = "IntxUnpackedToInt8Tensor", group: int = GROUP
) -> Case:
    rng = torch.Generator().manual_seed(bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (N, K), generator=rng, dtype=torch.int8)
    zeros = torch.randint(low, high, (N, K // group), generator=rng, dtype=torch.int8)
    zeros = zeros * (not symmetric)
    scale = torch.rand(N, K // group, generator=rng).bfloat16() * 0.02
    state = {"_type": kind, "_data": {
        "target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}, "block_size": [1, group],
        "activation_quantization": None if symmetric else "int8_asym_per_token"}}  # fmt: skip
    parts = {"_weight_qdata": codes, "_weight_scale": scale, "_weight_zero_point": zeros}
    header = {f"{LINEAR}.weight": json.dumps(state), "tensor_names": f'["{LINEAR}.weight"]'}
    whole = (codes - zeros.repeat_interleave(group, 1).to(torch.int16)).float()
    numbers = whole * scale.float().repeat_interleave(group, 1)
    return {"quant_method": "torchao", "header": header}, parts, numbers, max(bits, 2)


def real_zeros() -> Case:
    """What torchao calls a zero point in floats."""
    config, parts, _, bits = torchao(4, symmetric=True)
    zeros = torch.rand(N, K // GROUP, generator=torch.Generator().manual_seed(1))
    parts["_weight_zero_point"] = zeros * 7 - 3
    whole = parts["_weight_qdata"] + 8 - (zeros * 7 - 3 + 8).repeat_interleave(GROUP, 1)
    scale = parts["_weight_scale"].float().repeat_interleave(GROUP, 1)
    return config, parts, whole * scale, bits


def int4_tensor() -> Case:
    """Two codes a byte, scales and constants with a column a row of the matrix; scales are powers
    of two, so that a constant is a whole number of them."""
    config, parts, _, bits = torchao(4, symmetric=True, kind="Int4Tensor")
    codes = parts["_weight_qdata"]
    scale = torch.exp2(torch.randint(-9, -5, (K // GROUP, N)).float()).bfloat16()
    low = torch.randint(-9, 9, (K // GROUP, N)) * scale
    stored = {"_weight_qdata": (codes[:, ::2] & 15) | (codes[:, 1::2] << 4),
              "_weight_scale": scale, "_weight_zero_point": low}  # fmt: skip
    wide, start = (t.float().T.repeat_interleave(GROUP, 1) for t in (scale, low))
    return config, stored, codes * wide + start, bits


def of_groups(kind: str, args: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": args}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


def joined(folder: Path) -> Checkpoint:
    """The folder's checkpoint, without its model."""
    checkpoint = read_checkpoint(folder)
    config = quantization_of(json.loads((folder / "config.json").read_text()), folder)
    assert checkpoint is not None and config is not None
    return with_dense_names(checkpoint, config, folder)
