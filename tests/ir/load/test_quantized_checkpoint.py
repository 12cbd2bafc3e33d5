"""Checkpoints of other tools: dense weights are the layout's own formula, graphs compute it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.checkpoint import Checkpoint, read_checkpoint
from graphwright.ir.load.packed_bits import pack_rows, unpack_rows
from graphwright.ir.load.quantized_checkpoint import quantization_of, with_dense_names
from graphwright.ir.ops.nbit_weight import NBitWeight
from graphwright.ir.ops.pack import dequantize
from graphwright.ir.structure.recognize import recognize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from . import layouts
from .layouts import Tensors, expected, straight

K, N, GROUP = 64, 96, 32
LINEAR = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in float32; its ``up_proj`` is ``[96, 64]``."""
    import transformers

    folder = tmp_path_factory.mktemp("dense")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=K, intermediate_size=N, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


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


def check(folder: Path, weight: torch.Tensor, bits: int, *, ordered: bool = False) -> None:
    """The weight of the graph, dense and in few bits, and what transformers' forward makes of it in
    ONNX Runtime."""
    view = gw.load(folder, cache=False)
    names = {view.name(v): view.weight(v) for node in view.nodes() for v in _constants(view, node)}
    torch.testing.assert_close(names[f"{LINEAR}.weight"].read().float(), weight, rtol=0, atol=0)
    canonicalize(view)
    site = next(site for site in recognize(view).linears if site.name == LINEAR)
    assert view.op(site.node) == "linear_nbit" and view.attrs(site.node)["bits"] == bits
    gathers = [node for node in view.nodes() if view.op(node) == "index_select"]
    assert bool([g for g in gathers if view.result(g) is site.x]) == ordered
    ids = torch.arange(1, 13).reshape(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = gw.compile(view)(**inputs)["logits"]
    torch.testing.assert_close(logits, _original(folder, weight, inputs), rtol=2e-4, atol=2e-5)


def _constants(view: Any, node: Any) -> list[Any]:
    values = [v for v in view.operands(node) if v is not None and not isinstance(v, int | float)]
    return [v for v in values if view.weight(v) is not None]


def _original(folder: Path, weight: torch.Tensor, inputs: Tensors) -> torch.Tensor:
    import transformers

    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config)).eval()
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LINEAR}.weight"] = weight
    model.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        return model(**inputs).logits


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


@pytest.mark.parametrize(
    ("bits", "version", "symmetric", "group", "shuffled"),
    [(4, "gptq", True, 32, False), (3, "gptq_v2", False, 32, False),
     (8, "gptq", True, 64, False), (2, "gptq_v2", True, 16, True)],
)  # fmt: skip
def test_gptq(
    bits: int, version: str, symmetric: bool, group: int, shuffled: bool, dense: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    config, parts, weight = gptq(bits, version, symmetric=symmetric, group=group, shuffled=shuffled)
    folder = written(dense, tmp_path, config, parts)
    check(folder, weight, bits, ordered=shuffled)
    assert joined(folder).notes[0].startswith("quantized by gptq, taken as it is stored: 1 of")


def test_the_version_of_gptq_counts(dense: Path, tmp_path: Path) -> None:
    """Read as the other version every weight is off by its scale: the check can fail."""
    config, parts, weight = gptq(4, "gptq", symmetric=False)
    folder = written(dense, tmp_path, {**config, "checkpoint_format": "gptq_v2"}, parts)
    with pytest.raises(AssertionError):
        check(folder, weight, 4)


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


@pytest.mark.parametrize(("bits", "options"), [
    (4, {"symmetric": True}), (8, {"symmetric": True, "strategy": "channel"}),
    (3, {"symmetric": True}), (3, {"symmetric": True, "old": True}),
])  # fmt: skip
def test_compressed_tensors(
    bits: int, options: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    config, parts, weight = packed(bits, **options)
    check(written(dense, tmp_path, config, parts), weight, bits)


Case = tuple[dict[str, Any], Tensors, torch.Tensor, int]
"""The config, a linear's tensors, its numbers and the bits that the graph holds it in."""


def int8() -> Case:
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (N, K), generator=rng, dtype=torch.int8)
    scale = torch.rand(N, 1, generator=rng).half() * 0.02
    config = _of_groups("int-quantized", {"num_bits": 8, "strategy": "channel"})
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}
    return config, parts, codes.float() * scale.float(), 8


def bnb8() -> Case:
    _, parts, _, _ = int8()
    codes, scale = parts["weight"], parts["weight_scale"].float().flatten() * 127
    stored = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return config, stored, codes.float() * (scale / 127)[:, None], 8


NF4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105004, 0, 0.0795803,
       0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1]  # fmt: skip


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
    return config, parts, torch.from_numpy(numbers.reshape(N, K)), 0


def float8(block: list[int] | None, key: str = "weight_scale") -> Case:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=rng).to(torch.float8_e4m3fn)
    down, across = block or [1, K]
    scale = torch.rand(-(-N // down), -(-K // across), generator=rng) * 0.1
    each = scale.repeat_interleave(down, 0)[:N].repeat_interleave(across, 1)[:, :K]
    config = {"quant_method": "fp8", "weight_block_size": block}
    if key == "weight_scale":
        config = _of_groups("float-quantized", {"num_bits": 8, "type": "float"})
    return config, {"weight": weight, key: scale}, weight.float() * each, 0


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
    config = _of_groups(f"{kind}-pack-quantized", {"num_bits": 4, "type": "float"})
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


def _of_groups(kind: str, args: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": args}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name) for name, case in {
            "int8": int8, "bnb-int8": bnb8, "nf4": lambda: nf4(nested=False),
            "nf4-nested": lambda: nf4(nested=True), "fp8-rows": lambda: float8(None),
            "fp8-blocks": lambda: float8([40, 24], "weight_scale_inv"),
            "nvfp4": lambda: fp4("nvfp4"), "mxfp4": lambda: fp4("mxfp4"),
            "nvfp4-modelopt": lambda: fp4("modelopt"), "hqq": lambda: hqq(4, 1),
            "hqq-3": lambda: hqq(3, 1), "hqq-columns": lambda: hqq(2, 0),
            "torchao": lambda: torchao(4, symmetric=False),
            "torchao-8": lambda: torchao(8, symmetric=True), "torchao-real": real_zeros,
            "torchao-int4": int4_tensor,
        }.items()
    ],
)  # fmt: skip
def test_other_codes(case: Callable[[], Case], dense: Path, tmp_path: Path) -> None:
    """In our forms where one is equal to them, else in numbers, and the notes say which."""
    config, parts, numbers, bits = case()
    checkpoint = joined(written(dense, tmp_path, config, parts))
    weight = checkpoint.tensors[f"{LINEAR}.weight"]
    torch.testing.assert_close(weight.read(), numbers, rtol=0, atol=0)
    assert isinstance(weight, NBitWeight) == (bits > 0)
    assert not bits or weight.form.bits == bits
    assert ("no form here is equal to" in checkpoint.notes[0]) == (bits == 0)
    names = [name for name in checkpoint.tensors if name.startswith(LINEAR)]
    assert names == [f"{LINEAR}.weight"]


@pytest.mark.parametrize("case", [lambda: nf4(nested=False), lambda: float8(None)])
def test_codes_that_are_rounded_anew_are_told(
    case: Callable[[], Case], dense: Path, tmp_path: Path
) -> None:
    """NF4 and float8 are numbers until a pass rounds them: its report has what that costs."""
    config, parts, numbers, _ = case()
    view = gw.load(written(dense, tmp_path, config, parts), cache=False)
    result = gw.optimize(view, "quantize{bits=4 group=32 include=[*up_proj]}")
    (note,) = [n for n in result.report.source["notes"] if "taken as it is stored" in n]
    assert "which no form here is equal to: read as numbers" in note
    (site,) = result.report.passes[0].result.sites
    (linear,) = [x for x in recognize(result.graph).linears if x.quantized]
    operands = [result.graph.weight(v) for v in result.graph.operands(linear.node)[1:3]]
    codes, scales = (part.read() for part in operands if part is not None)
    rounded = dequantize(codes, scales, None, bits=4, group=32, in_features=K)
    error = float((rounded - numbers).norm() / numbers.norm())
    assert site.rel_l2 == pytest.approx(error, rel=1e-3) and error > 0.03


def test_formats_of_one_checkpoint(dense: Path, tmp_path: Path) -> None:
    """Each group of compressed-tensors has its own; the graph runs with all of them."""
    names = {LINEAR: int8, LINEAR.replace("up", "gate"): lambda: float8(None)}
    groups: dict[str, Any] = {}
    folder, weight = dense, torch.zeros(0)
    for place, (name, case) in enumerate(names.items()):
        config, parts, numbers, _ = case()
        group = config["config_groups"]["group_0"] | {"format": config["format"]}
        groups[f"group_{place}"] = group | {"targets": [f"re:.*{name.rpartition('.')[2]}"]}
        out = tmp_path / str(place)
        out.mkdir()
        config = _of_groups("mixed-precision", {}) | {"config_groups": groups}
        folder = written(folder, out, config, parts, name)
        weight = numbers if name == LINEAR else weight
    notes = " ".join(gw.load(folder, cache=False).source.notes)
    for words in ("1 of 8 bits, rows", "1 of float8_e4m3fn with a scale a row, which no form here",
                  "what it says of activations is left out"):  # fmt: skip
        assert words in notes
    tensors = joined(folder).tensors
    torch.testing.assert_close(tensors[f"{LINEAR}.weight"].read(), weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (int8, lambda p: p.update(weight_scale=torch.ones(3, 1)), r"weight_scale is \[3, 1\]"),
        (int8, lambda p: p.update(weight=p["weight"].float()), "weight is f32.* a matrix of int8"),
        (bnb8, lambda p: p.pop("weight"), "up_proj: weight is not in the checkpoint"),
        (lambda: nf4(nested=True), lambda p: p.pop("weight.nested_absmax"),
         "up_proj: weight.nested_absmax is not in the checkpoint"),
        (lambda: nf4(nested=False), lambda p: p.update({"weight.absmax": torch.ones(5)}),
         "up_proj: 3072 bytes, 5 blocks and a table of 16 do not make 96 x 64"),
        (lambda: float8([40, 24], "weight_scale_inv"),
         lambda p: p.update(weight_scale_inv=torch.ones(2, 2)), r"\[2, 2\] scales of a matrix"),
        (lambda: fp4("nvfp4"), lambda p: p.pop("weight_global_scale"),
         "up_proj: weight_global_scale is not in the checkpoint"),
        (lambda: fp4("mxfp4"), lambda p: p.update(weight_scale=p["weight_scale"][:, :1]),
         r"weight_scale is \[96, 1\]; groups of 32 of 96 x 64 make \[96, 2\]"),
        (lambda: hqq(4, 1), lambda p: p.update(scale=torch.ones(7, 1)),
         r"up_proj.W_q is \[96, 32\], with 7 scales and 192 zeros; 96 x 64 of 4bit_u8"),
        (lambda: hqq(4, 1), lambda p: p.update(packing=torch.tensor(list(b"1bit_u8")).byte()),
         "up_proj.packing is '1bit_u8'; 8bit_u8, 4bit_u8, 3bit_32, 2bit_u8 are read"),
        (lambda: hqq(4, 1), lambda p: p.update(quant_zero=torch.tensor(1)),
         "up_proj.quant_zero is set"),
        (lambda: torchao(4, symmetric=True, kind="Int4TilePackedTo4dTensor"), lambda p: None,
         "up_proj._weight_qdata is of torchao's Int4TilePackedTo4dTensor; Int8Tensor, IntxUnp"),
        (lambda: torchao(8, symmetric=True), lambda p: p.update(_weight_act_pre_scale=torch.ones(
            1)), "up_proj._weight_act_pre_scale scales the linear's input, which is not read"),
        (int4_tensor, lambda p: p.update(_weight_scale=p["_weight_scale"].T),
         r"up_proj._weight_scale is \[96, 2\]; groups of 32 of 96 x 64 make \[2, 96\]"),
        (int4_tensor, lambda p: p.pop("_weight_zero_point"),
         "up_proj: _weight_zero_point is not in the checkpoint"),
        (int4_tensor, lambda p: p.update(_weight_qdata=p["_weight_qdata"].int()),
         "up_proj._weight_qdata is i32.*two codes of 4 bits a byte"),
        (lambda: torchao(4, symmetric=True, group=8), lambda p: None,
         "up_proj: groups of 8 columns; 16, 32, 64, 128, 256, multiples of 256 and one for a"),
        (lambda: ({"quant_method": "torchao"}, *torchao(4, symmetric=True)[1:]), lambda p: None,
         "up_proj._weight_qdata has no state in the file's header; Int8Tensor"),
        (lambda: torchao(4, symmetric=True), lambda p: p.update(_weight_qdata=torch.ones(
            N, K).int()), "up_proj._weight_qdata is i32.*; int8 is read"),
        (lambda: torchao(4, symmetric=True), lambda p: p.update(_weight_scale=torch.ones(96, 1)),
         r"up_proj._weight_scale is \[96, 1\]; groups of 32 of 96 x 64 make \[96, 2\]"),
    ],
)  # fmt: skip
def test_other_codes_that_contradict_themselves(
    case: Callable[[], Case], change: Callable[[Tensors], Any], message: str, dense: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    config, parts, _, _ = case()
    change(parts)
    with pytest.raises(BadInput, match=message):
        joined(written(dense, tmp_path, config, parts))


def _without(part: str) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda _, parts: parts.pop(part)


def _config(**changed: Any) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda config, _: config.update(changed)


Change = Callable[[dict[str, Any], Tensors], Any]


def _part(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda _, parts: parts.update({name: change(parts[name])})


def _weights(**changed: Any) -> Change:
    """In the only group of compressed-tensors."""
    return lambda config, _: config["config_groups"]["group_0"]["weights"].update(changed)


def _state(text: str) -> Change:
    key = "weight.quant_state.bitsandbytes__nf4"
    return lambda _, parts: parts.update({key: torch.tensor(list(text.encode())).byte()})


def _broken(tensor: torch.Tensor) -> torch.Tensor:
    """With one NaN."""
    copy = tensor.clone()
    copy.view(-1)[3] = torch.nan
    return copy


def _gptq() -> tuple[dict[str, Any], Tensors, torch.Tensor]:
    return gptq(4, "gptq", symmetric=False)


def _packed() -> tuple[dict[str, Any], Tensors, torch.Tensor]:
    return packed(4, symmetric=False)


KINDS: list[tuple[Callable[[], Any], Change, str]] = [
    (_gptq, _part("qweight", torch.Tensor.float), r"qweight is f32\[8, 96\], expected a matrix of"),
    (_gptq, _part("qweight", torch.Tensor.long), r"qweight is i64\[8, 96\], expected a matrix of"),
    (_gptq, _part("qzeros", torch.Tensor.half), r"qzeros is f16\[2, 12\], expected a matrix of"),
    (_gptq, _part("scales", torch.Tensor.int), r"scales is i32\[2, 96\], expected floats"),
    (_gptq, _part("scales", _broken), "up_proj: scales or zero points are not all finite"),
    (_gptq, _part("g_idx", torch.Tensor.float), r"g_idx is f32\[64\], expected whole numbers"),
    (_gptq, _config(group_size="many"), "up_proj: group_size of quantization_config is 'many'"),
    (_gptq, _config(bits=True), "up_proj: bits=True of quantization_config"),
    (_gptq, _config(dynamic={"+:(": {}}), r"up_proj: quantization_config has '\('"),
    (_gptq, _config(dynamic={".*": 4}), "up_proj: dynamic of quantization_config is"),
    (_packed, _part("weight_shape", lambda t: torch.tensor([96, 64, 1])),
     r"weight_shape is \[96, 64, 1\]; a linear has rows and columns"),
    (_packed, _part("weight_packed", torch.Tensor.float), r"weight_packed is f32\[96, 8\], expec"),
    (_packed, _part("weight_zero_point", lambda t: t[:3]),
     r"weight_zero_point is i32\[3, 2\]; 2 groups of 96 rows of 4 bits make i32\[12, 2\]"),
    (_packed, _weights(symmetric=True), "weight_zero_point is not 0, and .*says symmetric"),
    (_packed, _weights(group_size="x"), "up_proj: group_size of quantization_config is 'x'"),
    (_packed, lambda c, _: c.update(config_groups=[1]), r"config_groups of .* is \[1\]: tables"),
    (_packed, lambda c, _: c["config_groups"]["group_0"].update(targets=["re:("]),
     r"up_proj: quantization_config has '\('"),
    (_packed, lambda c, _: c["config_groups"]["group_0"].update(weights="x"),
     "up_proj: weights of its config group is 'x'"),
    (bnb8, _part("SCB", _broken), "up_proj: scales or zero points are not all finite"),
    (lambda: nf4(nested=False), _state('{"shape": [-96, -64], "blocksize": 64}'),
     "up_proj.weight.quant_state.bitsandbytes__nf4 is no state"),
    (lambda: nf4(nested=False), _part("weight.absmax", torch.Tensor.byte),
     r"weight.absmax is u8\[96\], expected floats"),
    (lambda: nf4(nested=False), _part("weight.quant_map", _broken), "quant_map are not all finite"),
    (lambda: nf4(nested=True), _part("weight.nested_quant_map", lambda t: t[:3]),
     "up_proj.weight.nested_quant_map has 3 numbers; 96 blocks in blocks of 256 need 256"),
    (lambda: float8([40, 24], "weight_scale_inv"), _config(weight_block_size=["a", "b"]),
     r"up_proj: blocks of \['a', 'b'\] in quantization_config"),
    (lambda: float8(None), _part("weight_scale", _broken), "up_proj: the scales are not all fin"),
    (lambda: float8(None), _part("weight", lambda t: t.view(torch.uint8).fill_(127).view(t.dtype)),
     "up_proj: the float8 numbers are not all finite"),
    (lambda: fp4("mxfp4"), _part("weight_scale", lambda t: t.fill_(255)),
     "up_proj: an exponent of its scales is 255, which stands for NaN"),
    (lambda: fp4("nvfp4"), lambda _, p: p.update(weight_global_scale=torch.ones(2)),
     r"up_proj: its global scale is \[2\]; one number is read"),
    (lambda: fp4("nvfp4"), lambda _, p: p.update(weight_global_scale=torch.zeros(1)),
     "up_proj: scales or zero points are not all finite"),
    (lambda: fp4("nvfp4"), _part("weight_packed", torch.Tensor.flatten), r"weight_packed is u8\["),
    (lambda: hqq(4, 1), _part("W_q", torch.Tensor.float), r"W_q is f32\[96, 32\], expected whole"),
    (lambda: hqq(4, 1), _part("zero", torch.Tensor.int), r"zero is i32\[192, 1\], expected floats"),
    (lambda: torchao(4, symmetric=True), _part("_weight_scale", _broken), "not all finite"),
    (lambda: torchao(4, symmetric=True),
     lambda c, _: c["header"].update({f"{LINEAR}.weight": '{"_type": ["a"], "_data": {}}'}),
     r"up_proj._weight_qdata is of torchao's \['a'\]"),
    (_gptq, _config(quant_method=["gptq"]), r"quantized by \['gptq'\], which is not read"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "change", "message"), KINDS)
def test_tensors_and_settings_of_another_kind(
    case: Callable[[], Any], change: Change, message: str, dense: Path, tmp_path: Path
) -> None:
    """None is read as noise, and none ends in an error of Python's."""
    config, parts = case()[:2]
    change(config, parts)
    folder = written(dense, tmp_path, config, parts)
    with pytest.raises(BadInput, match=message):
        joined(folder).tensors[f"{LINEAR}.weight"].read()


def joined(folder: Path) -> Checkpoint:
    """The folder's checkpoint, without its model."""
    checkpoint = read_checkpoint(folder)
    config = quantization_of(json.loads((folder / "config.json").read_text()), folder)
    assert checkpoint is not None and config is not None
    return with_dense_names(checkpoint, config, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("scales"), "up_proj: scales is not in the checkpoint, and qweight is"),
        (_without("g_idx"), "up_proj: desc_act is true, and g_idx is not in the checkpoint"),
        (_config(bits=8), r"up_proj.scales is \[2, 96\]; 8 bits in groups of 32"),
        (_config(group_size=64), r"up_proj.scales is \[2, 96\]; 4 bits in groups of 64"),
        (_config(bits=5), "up_proj: bits=5 of quantization_config"),
        (_config(checkpoint_format="marlin"), "up_proj: checkpoint_format 'marlin'"),
        (_config(quant_method="vptq"), "quantized by 'vptq', which is not read"),
        (lambda _, parts: parts["g_idx"].fill_(0), "up_proj.g_idx: its groups are not of 32"),
        (lambda _, parts: [parts.pop(p) for p in list(parts)] + [parts.update(weight=torch.ones(
            N, K))], "quantization_config says gptq, and the checkpoint has no tensor qweight"),
        (lambda _, parts: parts.update(weight=torch.ones(N, K)), "both a weight and a qweight"),
    ],
)  # fmt: skip
def test_what_contradicts_itself(
    change: Callable[[dict[str, Any], Tensors], Any], message: str, dense: Path, tmp_path: Path
) -> None:
    config, parts, _ = gptq(4, "gptq", symmetric=True, shuffled=True)
    change(config, parts)
    with pytest.raises(BadInput, match=message):
        joined(written(dense, tmp_path, config, parts))


@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 4), count=st.integers(1, 70))
def test_words_round_trip(bits: int, rows: int, count: int) -> None:
    rng = np.random.default_rng(count)
    codes = rng.integers(0, 1 << bits, (rows, count)).astype(np.uint8)
    words = straight(codes, bits)
    assert torch.equal(pack_rows(torch.from_numpy(codes), bits), words)
    assert torch.equal(unpack_rows(words, bits, count), torch.from_numpy(codes))
