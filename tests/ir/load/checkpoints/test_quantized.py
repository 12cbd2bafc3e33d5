"""Checkpoints of other tools: dense weights are the layout's own formula, graphs compute it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import onnx
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.weights import ComputedWeight, tensor_bytes
from graphwright.ir.load.checkpoints.packed_bits import pack_rows, unpack_rows
from graphwright.ir.ops.coded_weight import CodedWeight
from graphwright.ir.ops.nbit_weight import NBitWeight
from graphwright.ir.ops.pack import dequantize
from graphwright.ir.structure.recognize import recognize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from .layouts import Tensors, straight
from .quantized_cases import (
    LINEAR,
    Case,
    K,
    bnb8,
    float8,
    fp4,
    gptq,
    hqq,
    int4_tensor,
    int8,
    joined,
    nf4,
    of_groups,
    packed,
    real_zeros,
    torchao,
    written,
)


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


@pytest.mark.parametrize(("bits", "options"), [
    (4, {"symmetric": True}), (8, {"symmetric": True, "strategy": "channel"}),
    (3, {"symmetric": True}), (3, {"symmetric": True, "old": True}),
])  # fmt: skip
def test_compressed_tensors(
    bits: int, options: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    config, parts, weight = packed(bits, **options)
    check(written(dense, tmp_path, config, parts), weight, bits)


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
    """In our forms where one is equal to them, as they are stored where ONNX has that, else in
    numbers, and the notes say which."""
    config, parts, numbers, bits = case()
    checkpoint = joined(written(dense, tmp_path, config, parts))
    weight = checkpoint.tensors[f"{LINEAR}.weight"]
    torch.testing.assert_close(weight.read(), numbers, rtol=0, atol=0)
    kind = CodedWeight if bits < 0 else NBitWeight if bits else ComputedWeight
    assert type(weight) is kind
    assert bits <= 0 or weight.form.bits == bits
    assert ("no form here is equal to" in checkpoint.notes[0]) == (bits == 0)
    names = [name for name in checkpoint.tensors if name.startswith(LINEAR)]
    assert names == [f"{LINEAR}.weight"]


@pytest.mark.parametrize("case", [lambda: nf4(nested=False), lambda: float8(None)])
def test_codes_that_are_rounded_anew_are_told(
    case: Callable[[], Case], dense: Path, tmp_path: Path
) -> None:
    """NF4 and float8 are numbers for a pass that rounds them: its report has what that costs."""
    config, parts, numbers, _ = case()
    view = gw.load(written(dense, tmp_path, config, parts), cache=False)
    result = gw.optimize(view, "quantize{bits=4 group=32 include=[*up_proj]}")
    (note,) = [n for n in result.report.source["notes"] if "taken as it is stored" in n]
    assert "no form here" not in note
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
        config = of_groups("mixed-precision", {}) | {"config_groups": groups}
        folder = written(folder, out, config, parts, name)
        weight = numbers if name == LINEAR else weight
    notes = " ".join(gw.load(folder, cache=False).source.notes)
    for words in ("1 of 8 bits, rows", "1 of float8_e4m3fn with a scale a row",
                  "what it says of activations is left out"):  # fmt: skip
        assert words in notes
    tensors = joined(folder).tensors
    torch.testing.assert_close(tensors[f"{LINEAR}.weight"].read(), weight, rtol=0, atol=0)


@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 4), count=st.integers(1, 70))
def test_words_round_trip(bits: int, rows: int, count: int) -> None:
    rng = np.random.default_rng(count)
    codes = rng.integers(0, 1 << bits, (rows, count)).astype(np.uint8)
    words = straight(codes, bits)
    assert torch.equal(pack_rows(torch.from_numpy(codes), bits), words)
    assert torch.equal(unpack_rows(words, bits, count), torch.from_numpy(codes))


@pytest.mark.parametrize(
    "case", [lambda: nf4(nested=True), lambda: float8([40, 24], "weight_scale_inv")],
    ids=["nf4", "float8"],
)  # fmt: skip
def test_codes_that_no_pass_changes_are_written(
    case: Callable[[], Case], dense: Path, tmp_path: Path
) -> None:
    """The artifact holds the checkpoint's own bytes, and computes what its numbers make."""
    config, parts, numbers, _ = case()
    folder = written(dense, tmp_path, config, parts)
    result = gw.optimize(gw.load(folder, cache=False), "clean")
    out = gw.export(result.graph, tmp_path / "out", report=result.report)
    tensors = {t.name: t for t in onnx.load(out / "model.onnx").graph.initializer}
    assert tensors[f"{LINEAR}.codes"].raw_data == tensor_bytes(parts["weight"])
    assert f"{LINEAR}.weight" not in tensors and f"{LINEAR}.weight.T" not in tensors
    ids = torch.arange(1, 13).reshape(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = gw.compile(out)(**inputs)["logits"]
    torch.testing.assert_close(logits, _original(folder, numbers, inputs), rtol=2e-4, atol=2e-5)


def test_a_table_of_its_own_makes_numbers(dense: Path, tmp_path: Path) -> None:
    config, parts, numbers, _ = nf4(nested=False)
    parts["weight.quant_map"] = parts["weight.quant_map"] / 2
    weight = joined(written(dense, tmp_path, config, parts)).tensors[f"{LINEAR}.weight"]
    assert type(weight) is ComputedWeight and torch.equal(weight.read(), numbers / 2)
