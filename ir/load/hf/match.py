"""A checkpoint's tensors under a model's own names, and what of it the model does not use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.errors import BadInput
from ...core.types import DTYPE_NAMES
from ...core.weights import CastWeight, MemoryWeight, Weight, distinct_bytes
from ...ops.coded_weight import CodedWeight, coded
from ...ops.nbit_weight import NBitWeight
from .convert import converted
from .experts import by_expert, is_stack
from .unread import is_computed

NAMED = 5
"""Tensors that a sentence names, at most."""
_SCALE = re.compile(r"scale|zero|absmax|quant|scb", re.IGNORECASE)
"""In names of tensors that turn stored numbers into weights."""


@dataclass(frozen=True)
class Match:
    """What ``match`` found."""

    weights: Mapping[str, Weight]
    """By the model's names of parameters and buffers."""
    keys: Mapping[str, str]
    """The checkpoint's own names of them."""
    absent: Sequence[str]
    """The model's parameters that the checkpoint has not."""
    unused: Sequence[str]
    """The checkpoint's tensors that the model has not, but for those that its class ignores."""
    unread: Mapping[str, Weight]
    """The same by the names that transformers has today."""

    def notes(self) -> Iterator[str]:
        """What of the checkpoint is not as it was stored, in words."""
        casts: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
        for name, weight in self.weights.items():
            if isinstance(weight, CastWeight) and coded(weight) is None:
                casts.setdefault((weight.base.dtype, weight.dtype), []).append(name)
        for (stored, used), names in casts.items():
            what = f"{_dtype(stored)} in the checkpoint and {_dtype(used)} in the model"
            yield f"weights of {what} were converted ({len(names)}): {listed(names)}"
        if self.unused:
            what = "tensors of the checkpoint that the model has not were left out"
            yield f"{what} ({len(self.unused)}{self._share()}): {listed(self.unused)}"

    def _share(self) -> str:
        """What is unread of all numbers, where that is not little."""
        lost = distinct_bytes(self.unread.values())
        share = lost / max(lost + distinct_bytes(self.weights.values()), 1)
        return f", {share:.0%} of its bytes" if share >= 0.01 and lost > 1 << 20 else ""

    def by_parameter(self, model: torch.nn.Module) -> dict[str, Weight]:
        """The weights, with one handle for all names of a parameter."""
        first: dict[int, str] = {}
        names = {
            name: first.setdefault(id(parameter), name)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        return {name: self.weights[names.get(name, name)] for name in self.weights}

    def unequal_twins(self, model: torch.nn.Module) -> Iterator[str]:
        """Names of parameters that the model ties to another, where the checkpoint has numbers of
        its own for both and they differ. Only such weights are read."""
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            twin = first.setdefault(id(parameter), name)
            if name not in self.keys or self.keys.get(twin, self.keys[name]) == self.keys[name]:
                continue
            if not torch.equal(self.weights[twin].read(), self.weights[name].read()):
                yield name

    def scale_left_out(self) -> tuple[str, str] | None:
        """A weight that is stored in few bits, and a tensor that was to scale it and is not used:
        the model would compute with numbers that mean something else."""
        for name, weight in self.weights.items():
            if not isinstance(weight, CastWeight) or not _narrow(weight.base.dtype):
                continue
            module = self.keys[name].rpartition(".")[0]
            beside = [u for u in self.unused if module and u.startswith(f"{module}.")]
            scale = next((u for u in (*beside, *filter(_SCALE.search, self.unused))), None)
            if scale is not None:
                return self.keys[name], scale
        return None


def match(model: Any, handles: Mapping[str, Weight]) -> Match:
    """Handles for the model's parameters and buffers.

    Names may differ by the base model's prefix (the checkpoint of ``BertForMaskedLM`` in
    ``BertModel`` and the reverse) and by the renamings that transformers knows for the model. Tied
    parameters share the handle of whichever name the checkpoint has. Raises ``BadInput`` where a
    shape differs.
    """
    # Buffers that are no state, such as rotary frequencies, are the model's own to compute.
    state = model.state_dict(keep_vars=True)
    stacks = {k: n for n, k in _renamed(model, handles).items() if is_stack(n) > is_stack(k)}
    stored = {stacks.get(key, key): handle for key, handle in handles.items()}
    handles = by_expert(state, stored)
    table = _renamed(model, handles)
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    weights: dict[str, Weight] = {}
    keys: dict[str, str] = {}
    turned = {name for name, part in model.named_modules() if type(part).__name__ == "Conv1D"}
    for name, tensor in state.items():
        forms = (name, prefix + name, name.removeprefix(prefix))
        key = next((table[s] for s in forms if s in table), None)
        if key is not None:
            handle = handles[key]
            in_codes = isinstance(handle, NBitWeight | CodedWeight)
            if in_codes and name.removesuffix(".weight") in turned:
                handle = handle.transposed()  # GPT-2's: [in, out], and codes are of [out, in]
            weights[name], keys[name] = _fit(name, handle, tensor), key
    shared = {id(state[name]): name for name in weights}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        twin = shared.get(id(parameter))
        if name not in weights and twin is not None:
            weights[name], keys[name] = weights[twin], keys[twin]
    for name in (name for name in parameters if name not in weights):
        # Sinusoids of positions are made by the module, though they are parameters.
        create = getattr(model.get_submodule(name.rpartition(".")[0]), "create_weight", None)
        if create is not None and name.endswith(".weight"):
            weights[name] = MemoryWeight(create().to(parameters[name].dtype))
    absent = [name for name in parameters if name not in weights]
    used = set(keys.values())
    for name, (weight, sources) in converted(model, stored, absent).items():
        weights[name], keys[name] = _fit(name, weight, state[name]), sources[0]
        used.update(sources)
    absent = [name for name in absent if name not in weights]
    unread = {
        name: handles[key]
        for name, key in table.items()
        if key not in used and not _is_ignored(model, name, handles[key])
    }
    return Match(weights, keys, absent, [table[name] for name in unread], unread)


def _fit(name: str, weight: Weight, tensor: torch.Tensor) -> Weight:
    if weight.shape != tuple(tensor.shape):
        raise BadInput(
            f"the checkpoint's {name!r} is {list(weight.shape)}, the config asks for "
            f"{list(tensor.shape)}"
        )
    return weight if weight.dtype == tensor.dtype else CastWeight(weight, tensor.dtype)


def _renamed(model: Any, handles: Iterable[str]) -> dict[str, str]:
    """The checkpoint's names by those that transformers gives them today."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    table: dict[str, str] = {}
    for key in handles:
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        table[name] = key
    return table


def _is_ignored(model: Any, name: str, weight: Weight) -> bool:
    """Whether transformers leaves a tensor out unsaid, or it is no number that was trained."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return is_computed(name, weight) or any(re.search(pattern, name) for pattern in patterns)


def converts(model: Any) -> bool:
    """Whether transformers rearranges numbers, not only names, when it loads this family."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(t, WeightConverter) for t in get_model_conversion_mapping(model))


def spare_prefix(model: Any, names: Iterable[str]) -> str:
    """What the checkpoint's names begin with and the model's do not; empty if they would not fit
    without it either."""
    state, names = model.state_dict(keep_vars=True).keys(), list(names)
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    known = {form for name in state for form in (name, prefix + name, name.removeprefix(prefix))}
    spare = {f"{name.partition('.')[0]}." for name in names if name not in known}
    gains = {each: sum(name.startswith(each) and name.removeprefix(each) in known
                       for name in names) for each in sorted(spare)}  # fmt: skip
    best = max(gains, key=gains.__getitem__, default="")
    return best if best and 2 * gains[best] > len(names) else ""


def listed(names: Sequence[str]) -> str:
    """The first few names, and whether there are more."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _dtype(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _narrow(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 1 or not dtype.is_floating_point
