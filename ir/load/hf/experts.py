"""Experts as linears of their own: what transformers keeps in one stack is split, expert by expert.

A layer of experts runs a few of many gated feed-forwards for each token. In the graph each expert
runs on every token, and the router's weight of those that it did not pick is 0:

    out = sum over e of w_e * down_e(act(gate_e(x)) * up_e(x))

The sum is the library's to rounding. Each matrix is a linear like any other: it is listed, stored
in few bits, or given a path beside it. An artifact runs each expert on the rows that picked it, see
``backends.onnx.forms.expert_form``; what runs the graph itself pays for all experts' arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch

from ...core.errors import BadInput
from ...core.weights import FileWeight, Weight
from ..checkpoints.stored_linear import cut_stack

_OWN_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Mixtral's names of an expert's matrices, and those of everybody else."""
_ONE = re.compile(r"(.*\.experts\.\d+\.)(w[123])(\.weight)")
_STACK = re.compile(r"(.*\.experts\.)(gate_up_proj|up_proj|down_proj)(_bias)?")
_TURNED = re.compile(r"(.*\.experts\.\d+\.(?:gate_up_proj|down_proj))\.weight")
"""A linear's matrix [out, in] of an expert whose class has it [in, out]."""
_NUMBER = re.compile(r"\.experts\.(\d+)\.")


def split_experts(model: torch.nn.Module) -> None:
    """Split every stack of experts into modules named by number. Raises ``BadInput`` for experts
    that are no gated feed-forwards."""
    for part in list(model.modules()):
        stack = part._parameters.get("gate_up_proj", part._parameters.get("up_proj"))
        if stack is None or stack.dim() != 3 or not hasattr(part, "is_transposed"):
            continue
        joined = part.is_transposed or (part.is_concatenated and not part.has_bias)
        normed = getattr(part, "has_post_expert_norm", False)  # transformers 5.17 has no such
        if normed or not joined or not (part.has_gate or _is_plain(part)):
            raise BadInput(f"{type(part).__name__} has experts of a form that is not read")
        _split(part)


def expert_notes(model: torch.nn.Module) -> tuple[str, ...]:
    """What a person should know of a model that has been split."""
    split = [part for part in model.modules()
             if getattr(part.forward, "__func__", 0) is _run_all and part.has_gate]  # fmt: skip
    counts = sorted({int(part.num_experts) for part in split})  # type: ignore[arg-type]
    if not counts:
        return ()
    note = (
        f"an artifact runs each of {', '.join(map(str, counts))} experts on the tokens that the "
        "router picked it for; calibration and checks of the graph itself run all on every token"
    )
    return (note,)


def _is_plain(part: Any) -> bool:
    """Whether experts without a gate are two linears with a function between them."""
    return set(part._parameters) == {"up_proj", "down_proj"} and not part.is_transposed


def _split(part: Any) -> None:
    shapes = {name: tuple(parameter.shape[1:]) for name, parameter in part._parameters.items()}
    dtype = part.down_proj.dtype
    part._parameters.clear()

    def parameter(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), False)

    for index in range(part.num_experts):
        expert = torch.nn.Module()
        if part.is_transposed:
            for name, shape in shapes.items():
                expert.register_parameter(name, parameter(*shape))
        else:
            sizes = dict(shapes)
            if "gate_up_proj" in sizes:
                double, width = sizes.pop("gate_up_proj")
                sizes |= dict.fromkeys(("gate_proj", "up_proj"), (double // 2, width))
            for name, size in sizes.items():
                out, width = size
                expert.add_module(name, torch.nn.Linear(width, out, bias=False, device="meta"))
                getattr(expert, name).weight = parameter(*size)
        part.add_module(str(index), expert)
    part.forward = MethodType(_run_all, part)


def _run_all(
    self: Any, x: torch.Tensor, picked: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """``x`` ``[tokens, width]``; ``picked`` ``[tokens, k]`` i64, the experts of each token, and
    ``weights`` ``[tokens, k]`` theirs."""
    empty = weights.new_zeros(x.shape[0], self.num_experts)
    shares = empty.scatter(1, picked, weights).unsqueeze(-1)
    out = torch.zeros_like(x)
    for index in range(self.num_experts):
        expert = self._modules[str(index)]
        part = _gated(self, expert, x) if self.is_transposed else _joined(self, expert, x)
        out = out + (part * shares[:, index]).to(out.dtype)
    return out


_USUAL = "transformers.integrations.moe"
"""Where the gate lies that a class has which brings none of its own."""


class _Halves:
    """What a class's own gate takes apart, and what is apart already."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        self._halves = gate, up

    def chunk(self, chunks: int, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        return self._halves


def _joined(self: Any, expert: Any, x: torch.Tensor) -> torch.Tensor:
    """An expert that is of linears, with a gate or without."""
    inner = expert.up_proj(x)
    if not self.has_gate:
        inner = self.act_fn(inner)
    elif type(self)._apply_gate.__module__ == _USUAL:
        inner = self.act_fn(expert.gate_proj(x)) * inner
    else:  # which clamps both at a limit, for one (Hunyuan 4, DeepSeek-V4, MiniMax-M3)
        inner = self._apply_gate(_Halves(expert.gate_proj(x), inner))
    out: torch.Tensor = expert.down_proj(inner)
    return out


def _gated(self: Any, expert: Any, x: torch.Tensor) -> torch.Tensor:
    """An expert that is stored [in, out], gate and up together as its class takes them apart."""
    inner = x @ expert.gate_up_proj
    inner = self._apply_gate(inner + expert.gate_up_proj_bias if self.has_bias else inner)
    out: torch.Tensor = inner @ expert.down_proj
    return out + expert.down_proj_bias if self.has_bias else out


# --- checkpoints --------------------------------------------------------------------------------


def by_expert(state: Mapping[str, Any], handles: Mapping[str, Weight]) -> dict[str, Weight]:
    """A checkpoint's handles with experts by the names that a split model has in ``state``; stacks
    are cut where they lie in their file. Raises ``BadInput`` for more experts than it has."""
    count = _count(state)
    if not count:
        return dict(handles)
    as_stored = any(_TURNED.fullmatch(f"{name}.weight") for name in state)
    weights: dict[str, Weight] = {}
    for name, handle in handles.items():
        stack, one, turned = (form.fullmatch(name) for form in (_STACK, _ONE, _TURNED))
        if one is not None:
            weights[f"{one[1]}{_OWN_NAMES[one[2]]}{one[3]}"] = handle
        elif stack is not None and isinstance(handle, FileWeight):
            weights |= _cut(stack, handle, as_stored=as_stored)
        elif turned is not None and as_stored:
            weights[turned[1]] = handle.transposed()
        else:
            weights[name] = handle
    over = next((name for name in weights if _count((name,)) > count), None)
    if over is not None:
        raise BadInput(f"the checkpoint has {over!r}, and by the config there are {count} experts")
    return weights


def is_stack(name: str) -> bool:
    """Whether a tensor of this name holds a matrix of every expert."""
    return _STACK.fullmatch(name) is not None


def _count(names: Iterable[str]) -> int:
    """Experts that the names have, by the highest number; 0 without any."""
    matches = (_NUMBER.search(name) for name in names)
    return max((int(match[1]) + 1 for match in matches if match is not None), default=0)


def _cut(name: re.Match[str], stack: FileWeight, *, as_stored: bool) -> dict[str, Weight]:
    prefix, kind, bias = name[1], name[2], name[3] or ""
    weights: dict[str, Weight] = {}
    for i, whole in enumerate(cut_stack(stack)):
        if as_stored:
            weights[f"{prefix}{i}.{kind}{bias}"] = whole
            continue
        if kind != "gate_up_proj":
            weights[f"{prefix}{i}.{kind}.weight"] = whole
            continue
        rows, *rest = whole.shape
        for place, half in enumerate(("gate_proj", "up_proj")):
            cut = whole.part(place * whole.numel // 2, (rows // 2, *rest))
            weights[f"{prefix}{i}.{half}.weight"] = cut
    return weights


def fill(parameter: torch.Tensor, name: str, weights: Mapping[str, Weight]) -> None:
    """Write what ``weights`` have by the names of a split model into a parameter of the library's
    own, which may be a stack of experts."""
    if name in weights:
        parameter.copy_(weights[name].read())
        return
    path, _, kind = name.rpartition(".")
    halves = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    for index, expert in enumerate(parameter):
        stored = weights.get(f"{path}.{index}.{kind}")
        if stored is not None:
            expert.copy_(stored.read())
            continue
        for half, rows in zip(halves, expert.chunk(len(halves)), strict=True):
            rows.copy_(weights[f"{path}.{index}.{half}.weight"].read())
