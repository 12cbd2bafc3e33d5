"""Checkpoints of other tools that are damaged or contradict themselves: refused, by the tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import BadInput

from .layouts import Tensors
from .quantized_cases import (
    LINEAR,
    Case,
    K,
    N,
    bnb8,
    float8,
    fp4,
    gptq,
    hqq,
    int4_tensor,
    int8,
    joined,
    nf4,
    packed,
    torchao,
    written,
)


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
