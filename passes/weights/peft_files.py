"""Adapters as PEFT stores them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Factors ``<module>.lora_A.weight [r, in]`` and ``.lora_B.weight [out, r]``; ``s = alpha / r``, or
``alpha / sqrt(r)`` of rsLoRA (arXiv 2312.03732). ``rank_pattern`` and ``alpha_pattern`` say another
r or alpha for the modules whose name ends in what their keys, regular expressions, match. DoRA
(arXiv 2402.09353) adds ``.lora_magnitude_vector [out]``, the length of each row of the sum. Read
from peft 0.21 (``tuners/lora``, ``utils/other.py``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.core.errors import BadInput
from ...ir.core.weights import Weight, read_safetensors_header

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, LENGTHS = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_UNREAD = {
    "modules_to_save": "whole modules beside the adapter", "lora_bias": "biases",
    "fan_in_fan_out": "weights stored [in, out]", "trainable_token_indices": "tokens of its own",
    "layer_replication": "layers that it repeats", "target_parameters": "parameters of its own",
    "alora_invocation_tokens": "tokens that turn it on",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """``down [r, in]`` and ``up [out, r]`` of one linear."""

    down: Weight
    up: Weight
    strength: float
    """``s``."""
    lengths: Weight | None = None
    """``[out]``, of DoRA."""


def opened(folder: Path) -> tuple[str, dict[str, Pair]]:
    """The name of its base, and the factors by the names of the modules that they change. Raises
    ``BadInput`` for what is no such adapter, contradicts itself or is not read."""
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise BadInput(
            f"adapter: path={folder} is not a folder with {CONFIG} and {TENSORS}; of a pickled "
            "adapter (.bin) save safetensors first"
        )
    config = _config(folder / CONFIG)
    tensors = dict(read_safetensors_header(folder / TENSORS))
    base = config.get("base_model_name_or_path") or "one that it does not name"
    return str(base), _pairs(tensors, config, folder / TENSORS)


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise BadInput(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise BadInput(f"{file}: peft_type is {kind!r}; only LORA is read")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise BadInput(f"{file}: r={rank!r} and lora_alpha={alpha!r} are no rank and no number")
    for name in ("rank_pattern", "alpha_pattern"):
        table = config.get(name) or {}
        if not isinstance(table, dict) or not all(_is_above_0(n) for n in table.values()):
            raise BadInput(f"{file}: {name} is {table!r}, no table of numbers")
    unread = [what for name, what in _UNREAD.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        unread.append("biases")
    if unread:
        raise BadInput(f"{file}: it has {', '.join(unread)}, which is not read")
    return config


def _is_above_0(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and number > 0


def _pairs(tensors: Mapping[str, Weight], config: Mapping[str, Any], file: Path) -> dict[str, Pair]:
    stems = {name.removesuffix(A).removesuffix(B).removesuffix(LENGTHS) for name in tensors}
    pairs = {}
    for stem in sorted(stems):
        if stem + A not in tensors or stem + B not in tensors:
            raise BadInput(f"{file}: {stem} has no pair of matrices ending in {A} and {B}")
        down, up, lengths = tensors[stem + A], tensors[stem + B], tensors.get(stem + LENGTHS)
        if len(down.shape) != 2 or len(up.shape) != 2:
            raise BadInput(f"{file}: the factors of {stem} are not matrices")
        if (lengths is not None) != bool(config.get("use_dora")):
            raise BadInput(
                f"{file}: use_dora is {bool(config.get('use_dora'))}, and {stem}{LENGTHS} is "
                f"{'there' if lengths is not None else 'not there'}"
            )
        name = stem.removeprefix(PREFIX)
        rank, alpha = (_setting(config, *names, name) for names in (
            ("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))  # fmt: skip
        if down.shape[0] != rank:
            raise BadInput(f"{file}: by {CONFIG} {stem}{A} has rank {rank:g}, and it has "
                           f"{down.shape[0]}")  # fmt: skip
        strength = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[name] = Pair(down, up, strength, lengths)
    if not pairs:
        raise BadInput(f"{file}: it holds no tensor")
    return pairs


def _setting(config: Mapping[str, Any], table: str, default: str, module: str) -> float:
    """A module's own, or that of all. Raises ``BadInput`` for a key that is no expression."""
    for pattern, own in (config.get(table) or {}).items():
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise BadInput(f"{CONFIG}: {table} has the key {pattern!r}: {error}") from None
        if fits:
            return float(own)
    return float(config[default])
