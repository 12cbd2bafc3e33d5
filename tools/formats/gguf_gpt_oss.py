"""gpt-oss in a GGUF file: gate and up of its experts apart, and what llama.cpp takes for granted.

``ffn_gate_exps`` are the even rows of ``gate_up_proj``, ``ffn_up_exps`` the odd ones, and its bias
likewise (``convert_hf_to_gguf.py``, ``llama-model.cpp``); ``ir/load/gguf/gpt_oss.py`` reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...ir.core.errors import BadInput
from ...ir.core.weights import ComputedWeight, Weight
from .model_state import ModelState, PackedLinear

GPT_OSS = "gpt_oss"
_BOTH = re.compile(r"(.*\.experts\.\d+)\.gate_up_proj(_bias|)")
_DOWN = re.compile(r"(.*\.experts\.\d+\.down_proj)(_bias|)")
_ENDS = {"_bias": ".bias", "": ".weight"}
_PLACES = {"gate_proj": 0, "up_proj": 1}
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
"""What llama.cpp takes where a file does not say it."""


def by_the_files_names(state: ModelState) -> ModelState:
    """The state with an expert's gate and up by themselves, and ends of names that a file has."""
    packed: dict[str, PackedLinear] = {}
    for name, linear in state.packed.items():
        both = _BOTH.fullmatch(name)
        if both is None:
            packed[name] = linear
            continue
        for part, place in _PLACES.items():
            packed[f"{both[1]}.{part}"] = _half(linear, f"{both[1]}.{part}", place)
    whole: dict[str, Weight] = {}
    for name, weight in state.whole.items():
        both, down = _BOTH.fullmatch(name), _DOWN.fullmatch(name)
        if both is not None:
            for part, place in _PLACES.items():
                whole[f"{both[1]}.{part}{_ENDS[both[2]]}"] = _rows(weight, place)
        elif down is not None:
            whole[f"{down[1]}{_ENDS[down[2]]}"] = weight
        else:
            whole[f"{name}.weight" if name.endswith(".sinks") else name] = weight
    return replace(state, packed=packed, whole=whole)


def _half(linear: PackedLinear, name: str, place: int) -> PackedLinear:
    codes, scales, zeros = linear.stored
    stored = _rows(codes, place), _rows(scales, place), zeros and _rows(zeros, place)
    return replace(linear, name=name, rows=linear.rows // 2, stored=stored)


def _rows(weight: Weight, place: int) -> Weight:
    """Every other row, from that ``place`` on."""
    return ComputedWeight(
        lambda: weight.read()[place::2].contiguous(), (weight.shape[0] // 2, *weight.shape[1:]),
        weight.dtype, (weight.key, "every other row", place),
    )  # fmt: skip


def add_settings(writer: Any, config: Mapping[str, Any], rope: Mapping[str, Any]) -> list[str]:
    """The keys that it has beside those of every model; what a person should know. Raises
    ``BadInput`` for what llama.cpp does otherwise."""
    import gguf

    kinds = ["sliding_attention", "full_attention"] * config["num_hidden_layers"]
    expected = {"layer_types": kinds[: config["num_hidden_layers"]], "attention_bias": True}
    for name, right in expected.items():
        if config.get(name, right) != right:
            raise BadInput(f"{name} is {config[name]!r} in config.json; a GGUF file of gpt-oss has "
                           f"{right!r}")  # fmt: skip
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    if rope.get("rope_type", "default") != "yarn":
        return []
    for name, number in _YARN.items():
        if rope.get(name, number) not in (None, number):
            raise BadInput(f"{name} of YaRN is {rope[name]!r} in config.json; a GGUF file of "
                           f"gpt-oss has {number!r}")  # fmt: skip
    given = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name)]
    if given:
        raise BadInput(f"{given[0]} of YaRN in config.json: a GGUF file of gpt-oss has none")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    cut = rope.get("truncate", True)
    return [
        "llama.cpp cuts the range of turns that YaRN blends to whole numbers, which a file does "
        f"not say; config.json says truncate: {json.dumps(bool(cut))}"
        + ("" if cut else ", by which logits differ a little there")
    ]
