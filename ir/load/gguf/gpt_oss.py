"""gpt-oss in GGUF: what its tensors are in transformers, whose experts have gate and up by turns.

llama.cpp keeps them apart (``convert_hf_to_gguf.py``): ``ffn_gate_exps`` are the even columns of
``gate_up_proj``, ``ffn_up_exps`` the odd ones. A matrix is put together of their rows as they are
stored, codes and scales alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ...core.errors import BadInput
from ...core.weights import ComputedWeight, Weight
from ...ops.nbit_weight import NBitForm, NBitWeight

YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
"""Of the library's config, and of the model's own code; a file does not say it. llama.cpp cuts the
range of turns that it blends to whole numbers (``ggml_rope_yarn_corr_dims``)."""
_EXPERT = re.compile(r"(.*\.experts\.\d+)\.(gate|up|down)_proj\.(weight|bias)")
_SINKS = ".self_attn.sinks.weight"


def by_its_names(tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """Tensors by their paths as transformers has them. Raises ``BadInput`` for a gate that is
    stored in another way than what goes through it, and where one of the two is absent."""
    named: dict[str, Weight] = {}
    for name, weight in tensors.items():
        expert = _EXPERT.fullmatch(name)
        if name.endswith(_SINKS):
            named[name.removesuffix(".weight")] = weight
        elif expert is None:
            named[name] = weight
        elif expert[2] == "down":
            named[f"{expert[1]}.down_proj{_end(expert[3])}"] = weight
        else:
            gate, up = (_needed(tensors, expert, part) for part in ("gate", "up"))
            named[f"{expert[1]}.gate_up_proj{_end(expert[3])}"] = by_turns(name, gate, up)
    return named


def _needed(tensors: Mapping[str, Weight], expert: re.Match[str], part: str) -> Weight:
    """Of an expert that has a gate or an up. Raises ``BadInput`` by the file's name of it."""
    weight = tensors.get(f"{expert[1]}.{part}_proj.{expert[3]}")
    if weight is not None:
        return weight
    block = re.sub(r".*\.layers\.(\d+)\..*", r"blk.\1", expert[1])
    raise BadInput(f"no tensor '{block}.ffn_{part}_exps.{expert[3]}', and there is "
                   f"'{block}.ffn_{expert[2]}_exps.{expert[3]}'")  # fmt: skip


def _end(kind: str) -> str:
    return ".weight" if kind == "weight" else "_bias"


def by_turns(name: str, first: Weight, second: Weight) -> Weight:
    """The rows of two, one of each by turns. Raises ``BadInput`` where they are not of one form."""
    shape = (2 * first.shape[0], *first.shape[1:])
    if not isinstance(first, NBitWeight):
        if isinstance(second, NBitWeight) or first.dtype != second.dtype:
            raise BadInput(f"{name} and what goes through it are not of one type")
        return _rows(first, second)
    if not isinstance(second, NBitWeight) or _kind(first.form) != _kind(second.form):
        raise BadInput(f"{name} and what goes through it are not of one type")
    pairs = zip(first.form.parts, second.form.parts, strict=True)
    parts = [None if one is None or other is None else _rows(one, other) for one, other in pairs]
    codes, scales, zeros, _ = parts
    assert codes is not None and scales is not None
    form = NBitForm(first.form.bits, first.form.group, codes, scales, zeros)
    return NBitWeight(form, (shape[0], shape[1]))


def _kind(form: NBitForm) -> tuple[int, int, torch.dtype, bool]:
    return form.bits, form.group, form.scales.dtype, form.zeros is None


def _rows(first: Weight, second: Weight) -> Weight:
    shape = (2 * first.shape[0], *first.shape[1:])
    return ComputedWeight(
        lambda: torch.stack([first.read(), second.read()], 1).reshape(shape), shape, first.dtype,
        ("by turns", first.key, second.key),
    )  # fmt: skip


def settings(keys: Any, inner: int) -> dict[str, Any]:
    """What its config has beside the usual, by the keys of a file."""
    count = keys.whole("expert_count")
    return {
        "num_local_experts": count,
        "num_experts_per_tok": keys.whole("expert_used_count", most=count),
        "intermediate_size": keys.whole("expert_feed_forward_length", inner),
        "sliding_window": keys.whole("attention.sliding_window", 128), "attention_bias": True,
    }  # fmt: skip
