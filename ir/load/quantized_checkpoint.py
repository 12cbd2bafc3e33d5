"""Checkpoints that another tool has quantized: which way, and the weights that their tensors make.

A linear's tensors (``qweight``, ``scales``, ...) become one handle by the name of the weight that
they stand for: dense for whoever reads it, and ``linear_nbit`` in a canonical graph
(``ir.canonical.stored_nbit``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..core.errors import BadInput
from ..core.weights import Weight
from . import awq_checkpoint, ct_checkpoint, gptq_checkpoint
from .checkpoint import Checkpoint
from .stored_linear import Parts

KEYS = ("quantization_config", "compression_config")
"""Where a config says how its checkpoint was quantized; the second is an old name."""
Reader = Callable[[str, Mapping[str, Weight], Mapping[str, Any]], Parts]
_READERS: dict[str, tuple[Reader, str, tuple[str, ...]]] = {
    "gptq": (gptq_checkpoint.read_linear, "qweight", gptq_checkpoint.TENSORS),
    "awq": (awq_checkpoint.read_linear, "qweight", awq_checkpoint.TENSORS),
    "compressed-tensors": (ct_checkpoint.read_linear, "weight_packed", ct_checkpoint.TENSORS),
}
"""By ``quant_method``: what reads a linear, the tensor by which it is known, and all of them."""


def quantization_of(raw: Mapping[str, Any], where: object) -> dict[str, Any] | None:
    """The quantization that a config tells of; ``None`` where there is none. Raises ``BadInput``
    for one that is not read."""
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    found = next((part[key] for part in parts for key in KEYS if part.get(key)), None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method not in _READERS:
        raise BadInput(
            f"{where}: the checkpoint is quantized by {method!r}, which is not read "
            f"({', '.join(_READERS)} are); give the original one"
        )
    kind = found.get("format", "pack-quantized")
    if method == "compressed-tensors" and kind != "pack-quantized":
        raise BadInput(f"{where}: compressed-tensors' format {kind!r}; pack-quantized is read")
    return dict(found)


def with_dense_names(
    checkpoint: Checkpoint, config: Mapping[str, Any], where: object
) -> Checkpoint:
    """The checkpoint with each quantized linear's tensors as one weight. Raises ``BadInput`` where
    they contradict the config or each other, naming the tensor."""
    read, mark, parts = _READERS[config["quant_method"]]
    tensors = dict(checkpoint.tensors)
    names = [key.removesuffix(f".{mark}") for key in tensors if key.endswith(f".{mark}")]
    if not names:
        raise BadInput(
            f"{where}: quantization_config says {config['quant_method']}, and the checkpoint has "
            f"no tensor {mark}"
        )
    forms: dict[str, int] = {}
    for name in names:
        own = {part: tensors.pop(f"{name}.{part}") for part in parts if f"{name}.{part}" in tensors}
        if f"{name}.weight" in tensors:
            raise BadInput(f"{where}: {name} has both a weight and a {mark}: one of them is stale")
        try:
            made = read(name, own, _settings(name, config))
            tensors[f"{name}.weight"] = made.weight()
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
        form = f"{made.bits} bits, " + (f"groups of {made.group}" if made.group else "rows")
        form += ", columns in the order of their groups" if made.order else ""
        forms[form] = forms.get(form, 0) + 1
    told = "; ".join(f"{count} of {form}" for form, count in forms.items())
    note = f"quantized by {config['quant_method']}, taken as it is stored: {told}"
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _settings(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of one linear: of GPTQ with what ``dynamic`` overrides, of compressed-tensors the
    ``weights`` of the group that it is in."""
    if config["quant_method"] == "compressed-tensors":
        return _group_of(name, config)
    rules = config.get("dynamic") or {}
    if config["quant_method"] != "gptq" or not isinstance(rules, dict):
        return config
    for pattern, changed in rules.items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return {**config, **changed}
    return config


def _group_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """By name before ``re:`` before class, as compressed-tensors has it."""
    groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, dict)]
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: target == name,
        lambda target: target.startswith("re:") and bool(re.match(target[3:], name)),
        lambda target: target == "Linear",
    )
    for fits in tests:
        for group in groups:
            if any(fits(target) for target in group.get("targets") or ()):
                return group.get("weights") or {}
    raise BadInput(f"{name}: none of config_groups names it, and it is quantized")
