"""Checkpoints that another tool has quantized: which way, and the weights that their tensors make.

A linear's tensors (``qweight``, ``scales``, ...) become one handle by the name of the weight that
they stand for: dense for whoever reads it, and ``linear_nbit`` in a canonical graph
(``ir.canonical.stored_nbit``), or numbers that an artifact holds in the same codes where no pass
changes them (``ir.ops.coded_weight``). Codes that no form of ours is equal to are dense numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...core.errors import BadInput
from ...core.weights import Weight
from ...ops.coded_weight import CodedWeight
from . import awq, compressed_tensors, dense, gptq, hqq, int8, mxfp4, torchao
from .checkpoint import Checkpoint
from .dense import Dense
from .stored_linear import Parts
from .tensor_kinds import Kind, check_kinds

KEYS = ("quantization_config", "compression_config")
"""Where a config says how its checkpoint was quantized; the second is an old name."""
Reader = Callable[[str, Mapping[str, Weight], Mapping[str, Any]], Parts | Dense]


@dataclass(frozen=True, eq=False)
class Scheme:
    """One way to store a linear."""

    read: Reader
    mark: str
    """The tensor by which such a linear is known."""
    tensors: Mapping[str, Kind | None]
    """All that it may have, and what they are where the reader does not say it."""
    note: str = ""
    """What of it is not read."""


_ACTIVATIONS = "what it says of activations is left out: they stay floats"
_PACKED = Scheme(compressed_tensors.read_linear, "weight_packed", compressed_tensors.TENSORS)
_INT8 = Scheme(int8.read_int8, "weight_scale", int8.INT8_TENSORS,
               _ACTIVATIONS)  # fmt: skip
_FLOAT8 = Scheme(dense.read_float8, "weight_scale", dense.FLOAT8_TENSORS,
                 _ACTIVATIONS)  # fmt: skip
_FP4 = Scheme(int8.read_fp4, "weight_packed", int8.FP4_TENSORS,
              _ACTIVATIONS)  # fmt: skip
_TORCHAO = Scheme(torchao.read_linear, torchao.MARK, torchao.TENSORS)
_METHODS: dict[str, tuple[Scheme, ...]] = {
    "gptq": (Scheme(gptq.read_linear, "qweight", gptq.TENSORS),),
    "awq": (Scheme(awq.read_linear, "qweight", awq.TENSORS),),
    "compressed-tensors": (),
    "fp8": (replace(_FLOAT8, mark="weight_scale_inv"), _FLOAT8),
    "fbgemm_fp8": (_FLOAT8,),
    "bitsandbytes": (
        Scheme(dense.read_bnb4, "weight.absmax", dense.BNB4_TENSORS),
        Scheme(int8.read_bnb8, "SCB", int8.BNB8_TENSORS),
    ),
    "hqq": (Scheme(hqq.read_linear, "W_q", hqq.TENSORS),),
    "torchao": (_TORCHAO,),
    "mxfp4": (replace(_FP4, note=""),),
    "modelopt": (
        replace(_FP4, mark="weight_scale_2"),
        replace(_FLOAT8, mark="weight_scale"),
    ),
}
"""By ``quant_method``."""
_FORMATS: dict[str, Scheme] = {
    "pack-quantized": _PACKED, "int-quantized": _INT8, "naive-quantized": _INT8,
    "float-quantized": _FLOAT8, "mxfp8-quantized": _FLOAT8, "nvfp4-pack-quantized": _FP4,
    "mxfp4-pack-quantized": _FP4,
}  # fmt: skip
"""By ``format`` of compressed-tensors."""
STATES = "graphwright.states"
"""Where a config of torchao gets what the files' headers say of each linear."""
MIXED = "mixed-precision"
"""A format that leaves the choice to each group."""


def quantization_of(raw: Mapping[str, Any], where: object) -> dict[str, Any] | None:
    """The quantization that a config tells of; ``None`` where there is none. Raises ``BadInput``
    for one that is not read."""
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    quantization = next((part[key] for part in parts for key in KEYS if part.get(key)), None)
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(method, str) or method not in _METHODS:
        raise BadInput(
            f"{where}: the checkpoint is quantized by {method!r}, which is not read "
            f"({', '.join(_METHODS)} are); give the original one"
        )
    if method == "compressed-tensors":
        _check_formats(quantization, where)
    return dict(quantization)


def _check_formats(config: Mapping[str, Any], where: object) -> None:
    for kind in _formats(config):
        if kind not in _FORMATS:
            raise BadInput(
                f"{where}: compressed-tensors' format {kind!r}; {', '.join(_FORMATS)} are read"
            )


def _formats(config: Mapping[str, Any]) -> list[str]:
    """The formats of a compressed-tensors config, each once."""
    outer = str(config.get("format") or "pack-quantized")
    groups = _groups(config)
    inner = [str(group.get("format") or outer) for group in groups]
    return list(dict.fromkeys(kind for kind in (inner or [outer]) if kind != MIXED))


def with_dense_names(
    checkpoint: Checkpoint, config: Mapping[str, Any], where: object
) -> Checkpoint:
    """The checkpoint with each quantized linear's tensors as one weight. Raises ``BadInput`` where
    they contradict the config or each other, naming the tensor."""
    method = config["quant_method"]
    if method == "torchao":
        config = {**config, STATES: torchao.states(checkpoint.files)}
    tensors = _by_linear(checkpoint.tensors, method, where)
    schemes = _METHODS[method] or tuple(_FORMATS[kind] for kind in _formats(config))
    forms: dict[str, int] = {}
    notes: dict[str, None] = {}
    for scheme in dict.fromkeys(schemes):
        end = f".{scheme.mark}"
        for name in [key.removesuffix(end) for key in tensors if key.endswith(end)]:
            if f"{name}{end}" not in tensors:
                continue
            try:
                chosen = _scheme_of(name, config) or scheme
                form = _join(tensors, name, chosen, _settings(name, config))
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from None
            forms[form] = forms.get(form, 0) + 1
            notes[chosen.note] = None
    if not forms:
        marks = ", ".join(dict.fromkeys(scheme.mark for scheme in schemes))
        raise BadInput(
            f"{where}: quantization_config says {method}, and the checkpoint has no tensor {marks}"
        )
    summary = "; ".join(f"{count} of {form}" for form, count in forms.items())
    summary = "; ".join((summary, *filter(None, notes)))
    note = f"quantized by {method}, taken as it is stored: {summary}"
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _by_linear(stored: Mapping[str, Weight], method: str, where: object) -> dict[str, Weight]:
    """The tensors with those of each linear by themselves: gpt-oss's experts lie in stacks."""
    try:
        return mxfp4.by_expert(stored) if method == "mxfp4" else dict(stored)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def _join(
    tensors: dict[str, Weight], name: str, scheme: Scheme, settings: Mapping[str, Any]
) -> str:
    """Put a linear's weight in the place of its tensors; its form in words."""
    own = {part: tensors.pop(f"{name}.{part}") for part in scheme.tensors
           if f"{name}.{part}" in tensors}  # fmt: skip
    if f"{name}.weight" in tensors:
        raise BadInput(f"{name} has both a weight and a {scheme.mark}: one of them is stale")
    check_kinds(name, own, scheme.tensors)
    stored = scheme.read(name, own, settings)
    if isinstance(stored, Dense):
        tensors[f"{name}.weight"] = stored.weight
        if isinstance(stored.weight, CodedWeight):
            return stored.form
        return f"{stored.form}, which no form here is equal to: read as numbers"
    tensors[f"{name}.weight"] = stored.weight()
    form = f"{stored.bits} bits, " + (f"groups of {stored.group}" if stored.group else "rows")
    return form + (", columns in the order of their groups" if stored.order else "")


def _scheme_of(name: str, config: Mapping[str, Any]) -> Scheme | None:
    """That of the linear's group, where compressed-tensors names groups; of torchao with what is
    not read of this linear."""
    if STATES in config:
        rounds = torchao.rounds_activations(config[STATES].get(name, {}))
        return replace(_TORCHAO, note=_ACTIVATIONS) if rounds else None
    if config["quant_method"] != "compressed-tensors":
        return None
    outer = config.get("format") or "pack-quantized"
    return _FORMATS.get(str(_group_of(name, config).get("format") or outer))


def _settings(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of one linear: of GPTQ with what ``dynamic`` overrides, of compressed-tensors the
    ``weights`` of the group that it is in, of torchao its state in the file's header."""
    if config["quant_method"] == "compressed-tensors":
        weights = _group_of(name, config).get("weights") or {}
        if not isinstance(weights, dict):
            raise BadInput(f"{name}: weights of its config group is {weights!r}, no table")
        return weights
    if STATES in config:
        state: Mapping[str, Any] = config[STATES].get(name, {})
        return state
    if config["quant_method"] != "gptq":
        return config
    rules = config.get("dynamic") or {}
    if not isinstance(rules, dict) or not all(isinstance(each, dict) for each in rules.values()):
        raise BadInput(f"{name}: dynamic of quantization_config is {rules!r}, no table of tables")
    for pattern, changed in rules.items():
        if not pattern.startswith("-:") and _matches(pattern.removeprefix("+:"), name):
            return {**config, **changed}
    return config


def _matches(pattern: str, name: str) -> bool:
    try:
        return bool(re.match(pattern, name))
    except re.error as error:
        raise BadInput(f"{name}: quantization_config has {pattern!r}: {error}") from None


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """compressed-tensors' groups, each with the names to which it goes."""
    table = config.get("config_groups") or {}
    groups = list(table.values()) if isinstance(table, dict) else []
    if not isinstance(table, dict) or not all(map(_is_group, groups)):
        raise BadInput(
            f"config_groups of quantization_config is {table!r}: tables with targets are read"
        )
    return groups


def _is_group(group: object) -> bool:
    targets = group.get("targets") or [] if isinstance(group, dict) else None
    return isinstance(targets, list) and all(isinstance(each, str) for each in targets)


def _group_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """By name before ``re:`` before class, as compressed-tensors has it."""
    groups = _groups(config)
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: target == name,
        lambda target: target.startswith("re:") and _matches(target[3:], name),
        lambda target: target == "Linear",
    )
    for fits in tests:
        for group in groups:
            if any(fits(target) for target in group.get("targets") or ()):
                return group
    raise BadInput(f"{name}: none of config_groups names it, and it is quantized")
