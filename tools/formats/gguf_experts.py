"""Experts in a GGUF file: those of a layer lie in one tensor, gate, up and down apart.

As llama.cpp writes and runs them (``convert_hf_to_gguf.py``, ``llama-model.cpp``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...ir.core.errors import BadInput

_EXPERT = re.compile(r"(.*\.experts)\.\d+(\..*)")
_ROW = ".shared_expert_gate.weight"
"""The end of the name of a matrix of one row, which a file has as a vector."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file that is written."""

    name: str
    kind: str
    """A name of ``GGMLQuantizationType``."""
    shape: tuple[int, ...]
    """Of the array that is written: bytes for blocks."""
    make: Callable[[], np.ndarray[Any, Any]]


def stack_name(name: str) -> str:
    """What the experts of a layer are called together; a name that is no expert's as it is."""
    expert = _EXPERT.fullmatch(name)
    return name if expert is None else f"{expert[1]}{expert[2]}"


def stacked(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors, with the experts of a layer as one of each kind. Raises ``BadInput`` where these
    are not stored alike."""
    stacks: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        if stack_name(tensor.name) != tensor.name:
            stacks.setdefault(stack_name(tensor.name), []).append(tensor)
        elif tensor.name.endswith(_ROW):
            yield replace(tensor, shape=tensor.shape[1:])
        else:
            yield tensor
    for name, experts in stacks.items():
        yield _stack(name, experts)


def _stack(name: str, experts: Sequence[Tensor]) -> Tensor:
    first = experts[0]
    for other in experts:
        if (other.kind, other.shape) != (first.kind, first.shape):
            raise BadInput(f"{first.name} is stored as {first.kind} and {other.name} as "
                           f"{other.kind}: the experts of a layer are one tensor")  # fmt: skip

    def make() -> np.ndarray[Any, Any]:
        parts = (expert.make() for expert in experts)
        head = next(parts)
        whole = np.empty((len(experts), *head.shape), head.dtype)
        whole[0] = head
        for place, part in enumerate(parts, 1):
            whole[place] = part
        return whole

    return Tensor(name, first.kind, (len(experts), *first.shape), make)


def add_settings(writer: Any, config: Mapping[str, Any]) -> None:
    """The keys of a layer of experts, where the model has one."""
    count = config.get("num_experts") or config.get("num_local_experts")
    if not count:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    for key, add in (
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if config.get(key):
            add(config[key])


def check_experts(config: Mapping[str, Any]) -> None:
    """What llama.cpp takes for granted of experts. Raises ``BadInput`` for another."""
    kind = config["model_type"]
    if not kind.endswith("_moe"):
        return
    for name, expected in (
        ("norm_topk_prob", kind == "qwen3_moe"), ("decoder_sparse_step", 1),
        ("mlp_only_layers", []),
    ):  # fmt: skip
        setting = config.get(name)
        if setting not in (None, expected):
            raise BadInput(
                f"{name} is {setting!r} in config.json; a GGUF file of {kind} has {expected!r}"
            )
