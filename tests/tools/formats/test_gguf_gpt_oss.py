"""gpt-oss as GGUF: the very numbers, in MXFP4 where they are MXFP4, and what a file cannot say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.ops.pack import pack
from graphwright.tools.bench.gpt_oss import save_gpt_oss
from graphwright.tools.formats import gguf_gpt_oss, gguf_mxfp4
from graphwright.tools.formats.convert import convert
from graphwright.tools.formats.gguf_file import _mxfp4
from graphwright.tools.formats.model_state import ModelState, PackedLinear

gguf: Any = pytest.importorskip("gguf")
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> View:
    """A checkpoint as the library writes and reads it: blocks and exponents."""
    folder = tmp_path_factory.mktemp("oss")
    return gw.load(save_gpt_oss(folder, size=32, blocks=1, words=48), cache=False)


@pytest.fixture(scope="module")
def result(source: View) -> gw.Result:
    return gw.optimize(source, "clean{optional=true}")


@pytest.fixture(scope="module")
def artifact(result: gw.Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gw.export(result.graph, tmp_path_factory.mktemp("of") / "oss", report=result.report)


def test_a_file_holds_the_numbers_of_the_checkpoint(
    source: View, artifact: Path, tmp_path: Path
) -> None:
    notes = convert(artifact, "gguf", tmp_path / "out")
    assert notes[0] == "model.gguf: 19 tensors F32, 3 tensors MXFP4"
    assert "truncate: false, by which logits differ a little there" in notes[1]
    path = tmp_path / "out/model.gguf"
    again = gw.load(path, cache=False).weights()
    first = source.weights()
    kept = {name for name in first if name in again}
    assert kept >= {f"{EXPERTS}.3.{kind}" for kind in ("gate_up_proj", "down_proj_bias")}
    assert "model.layers.0.self_attn.sinks" in kept and len(kept) >= 30
    assert all(torch.equal(again[name].read(), first[name].read()) for name in kept)
    fields = gguf.GGUFReader(path).fields
    known = {key: fields[f"gpt-oss.{key}"].contents() for key in (
        "expert_count", "expert_used_count", "expert_feed_forward_length",
        "attention.sliding_window", "rope.scaling.type", "rope.scaling.original_context_length",
    )}  # fmt: skip
    assert [*known.values()] == [4, 2, 32, 8, "yarn", 4096]


def test_folders_of_linears_have_no_place_for_such_experts(artifact: Path, tmp_path: Path) -> None:
    for to in ("compressed-tensors", "gptq"):
        with pytest.raises(BadInput, match=r"experts.0.down_proj is a part of a stack of exp"):
            convert(artifact, to, tmp_path / to)


def test_experts_behind_dequantize_linear_have_no_names(
    result: gw.Result, tmp_path: Path
) -> None:
    artifact = gw.export(result.graph, tmp_path / "oss", report=result.report, target="portable")
    with pytest.raises(BadInput, match="lose their names: write the artifact with --target cpu"):
        convert(artifact, "gguf", tmp_path / "out")


def linear(signed: torch.Tensor, exponents: torch.Tensor, name: str = "a") -> PackedLinear:
    rows, columns = signed.shape
    codes = pack((signed + 128).to(torch.uint8), 8, 32)
    scales = torch.exp2(exponents.float())
    return PackedLinear(name, rows, columns, 8, 32, (MemoryWeight(codes), MemoryWeight(scales),
                                                     None))  # fmt: skip


def test_blocks_are_the_same_numbers_by_the_librarys_own_reader() -> None:
    """The least exponent there is among them, which float32 holds below its normal numbers."""
    numbers = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, -1, -2, -3, -4, -6, -8, -12, 0]).repeat(3, 4)
    powers = torch.tensor([[-128, -127], [-6, 0], [5, 123]])
    stored = linear(numbers, powers)
    assert gguf_mxfp4.fits(stored)
    blocks = gguf_mxfp4.blocks(stored).numpy()
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    expected = numbers.double() * torch.exp2(powers.double()).repeat_interleave(32, 1)
    assert np.array_equal(found.astype(np.float64), expected.numpy())


def test_what_is_no_mxfp4_is_none() -> None:
    """And an expert whose layer has others is stored as they are."""
    ones = torch.ones(2, 32, dtype=torch.int64)
    powers = torch.zeros(2, 1)
    assert not gguf_mxfp4.fits(linear(ones * 5, powers))
    assert not gguf_mxfp4.fits(linear(ones, powers + 0.5))
    assert not gguf_mxfp4.fits(replace(linear(ones, powers), group=16))
    stored = {name: linear(ones * number, powers, name) for name, number in {
        "m.experts.0.up_proj": 1, "m.experts.1.up_proj": 5, "m.o_proj": 1}.items()}  # fmt: skip
    assert _mxfp4(ModelState(Path(), {}, stored, {}, {}, {})) == {"m.o_proj"}


@pytest.mark.parametrize(
    ("config", "rope", "message"),
    [
        ({"layer_types": ["full_attention"]}, {}, r"layer_types is \['full_attention'\] in config"),
        ({"attention_bias": False}, {}, "attention_bias is False in config.json; a GGUF file of g"),
        ({}, {"beta_fast": 16.0}, "beta_fast of YaRN is 16.0 in config.json; a GGUF .* has 32.0"),
        ({}, {"mscale": 0.7}, "mscale of YaRN in config.json: a GGUF file of gpt-oss has none"),
    ],
)
def test_what_llama_cpp_takes_for_granted(
    config: dict[str, Any], rope: dict[str, Any], message: str
) -> None:
    known = {"num_hidden_layers": 1, "sliding_window": 8, "intermediate_size": 32}
    writer = gguf.GGUFWriter(None, "gpt-oss")
    with pytest.raises(BadInput, match=message):
        gguf_gpt_oss.add_settings(writer, known | config, {"rope_type": "yarn"} | rope)


def test_a_path_goes_beside_what_a_pass_quantized_and_no_codes_of_the_checkpoint(
    source: View,
) -> None:
    ids = torch.arange(1, 9)[None]
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    recipe = "quantize{bits=4 group=32 include=*self_attn.q_proj},eora{rank=2}"
    (_, quantized), (_, eora) = gw.plan(source, recipe).passes
    assert [site.name for site in eora.sites] == [site.name for site in quantized.sites]
    report = gw.optimize(source, recipe, samples=samples, calibration=samples).report
    assert report.passes[1].result.sites[0].name.endswith("q_proj")
