"""What of a checkpoint its model does not read: unsaid, noted or refused.

* Unsaid: what the model computes by itself (masks, positions, rotary frequencies), and what its
  class says that it ignores.
* Noted, with their share of the bytes: parts that the class has not, as a head of another task or
  the other tower. transformers warns of them, and a config may well name the class of a part.
* Refused, though transformers warns of it alone: what the model as it was stored computed with in
  the places where this one computes too. That is a weight or bias of a module that has parameters
  here, blocks behind the last one, and a head beside a tied one that is not its copy. The config is
  then another model's, and its outputs would be silently wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...core.errors import BadInput
from ...core.weights import Weight

COMPUTED = (
    r"(^|\.)position_ids$", r"(^|\.)inv_freq$", r"(^|\.)masked_bias$",
    r"(^|\.)relative_position_index$", r"(^|\.)num_batches_tracked$",
)  # fmt: skip
"""Names of buffers that models make by themselves, and old checkpoints hold."""
_NUMBER = re.compile(r"\.(\d+)\.")


def is_computed(name: str, weight: Weight) -> bool:
    """Whether a tensor is what models compute, a causal mask for one."""
    mask = len(weight.shape) == 4 and weight.shape[:2] == (1, 1) and name.endswith(".bias")
    return mask or any(re.search(pattern, name) for pattern in COMPUTED)


def refuse_parts(
    model: Any, unread: Mapping[str, Weight], read: Mapping[str, Weight], folder: Path
) -> None:
    """Raise ``BadInput`` where one of ``unread``, by the names that transformers has today, is of
    the model itself; ``read`` are its weights."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    modules = dict(model.named_modules())
    for key, weight in unread.items():
        if not weight.dtype.is_floating_point:
            continue
        for name in dict.fromkeys((key, prefix + key, key.removeprefix(prefix))):
            why = _beside(modules, name) or _behind(modules, name, read)
            if why:
                raise BadInput(f"{folder}: the checkpoint has {key!r}, and {why}")
        if _is_head(model, weight, read):
            raise BadInput(
                f"{folder}: the checkpoint has {key!r}, of the shape of the model's head, which "
                "by config.json is tied to the words (tie_word_embeddings): rename it as "
                "transformers does, or leave it out"
            )


def _beside(modules: Mapping[str, Any], name: str) -> str:
    owner, _, kind = name.rpartition(".")
    module = modules.get(owner)
    if kind not in ("weight", "bias") or module is None:
        return ""
    if not any(parameter is not None for parameter in module._parameters.values()):
        return ""
    return (
        f"the model's {type(module).__name__} of that name has no {kind}: config.json asks for "
        "another model than was stored (attention_bias, mlp_bias and the like)"
    )


def _behind(modules: Mapping[str, Any], name: str, read: Mapping[str, Weight]) -> str:
    for number in _NUMBER.finditer(name):
        path, rest = name[: number.start()], name[number.end() :]
        blocks = modules.get(path)
        if not isinstance(blocks, torch.nn.ModuleList) or int(number[1]) < len(blocks):
            continue
        if any(f"{path}.{index}.{rest}" in read for index in range(len(blocks))):
            return (
                f"by config.json {path} has {len(blocks)} blocks: give their number in the "
                "checkpoint (num_hidden_layers); the pass drop-blocks or path leaves some out"
            )
    return ""


def _is_head(model: Any, weight: Weight, read: Mapping[str, Weight]) -> bool:
    """Whether a tensor is as large as a head that the model ties to its words, and no copy."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        return False
    if head.weight is not getattr(model.get_input_embeddings(), "weight", None):
        return False
    table: Any = head.weight
    if tuple(weight.shape) != tuple(table.shape):
        return False
    name = next(n for n, p in model.named_parameters() if p is table)
    return not torch.equal(read[name].read(), weight.read().to(table.dtype))
