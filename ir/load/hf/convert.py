"""Weights that transformers makes of a checkpoint's when it loads one: joined, cut or turned.

Kimi Linear's three convolutions are one in the library, a few families store gate and up in one
matrix that it takes apart. The library's own operations are run, each time such a weight is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ...core.weights import ComputedWeight, Weight


def converted(
    model: Any, handles: Mapping[str, Weight], lacking: Collection[str]
) -> dict[str, tuple[Weight, tuple[str, ...]]]:
    """Those of ``lacking``, names of the model's parameters, that can be made of ``handles``, with
    the names of what they are made of. Nothing is read."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    if not converters or not lacking:
        return {}
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for key in sorted(handles, key=dot_natural_key):
        renamed = key
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for converter in converters:
            target, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                groups.setdefault(target, (converter, []))[1].append((pattern, key))
                break
    prefix = f"{model.base_model_prefix}."
    made: dict[str, tuple[Weight, tuple[str, ...]]] = {}
    for target, (converter, sources) in groups.items():
        first, *rest = converter.target_patterns
        for result in (target, *(target.replace(first, other, 1) for other in rest)):
            forms = (result, prefix + result, result.removeprefix(prefix))
            name = next((form for form in forms if form in lacking), None)
            if name is None:
                continue
            keys = tuple(key for _, key in sources)
            weight = ComputedWeight(
                partial(_run, model, converter, target, sources, handles, result),
                tuple(model.get_parameter(name).shape), handles[keys[0]].dtype,
                ("converted", result, *(handles[key].key for key in keys)),
            )  # fmt: skip
            made[name] = weight, keys
    return made


def _run(
    model: Any, converter: Any, target: str, sources: Sequence[tuple[str, str]],
    handles: Mapping[str, Weight], result: str,
) -> torch.Tensor:  # fmt: skip
    """One of what the converter makes of these tensors."""
    fresh = type(converter)(
        list(converter._original_source_patterns), list(converter._original_target_patterns),
        operations=converter.operations,
    )  # fmt: skip
    for pattern, key in sources:
        fresh.add_tensor(target, key, pattern, handles[key].read)
    made: Any = fresh.convert(target, model=model, config=model.config)[result]
    tensor: torch.Tensor = made[0] if isinstance(made, list) else made
    return tensor
