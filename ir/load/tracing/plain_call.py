"""A module's call in tensors alone, as a graph has it.

Libraries take numbers, flags and caches beside tensors, and return classes of outputs with caches
in them. What is not a tensor is bound to the call; a cache is given and taken as tensors; outputs
go by the names that their class gives them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...core.errors import BadInput
from ...structure.cache_slots import PARTS, past_name, present_name
from .fake import Inputs


@dataclass(frozen=True)
class PlainCall:
    """The tensors of a call, and what is bound to it."""

    inputs: Inputs
    """Tensors and plain containers of them; a cache is a list of pairs, keys and values."""
    bound: Mapping[str, Any]
    """Arguments that hold no tensor, by name."""
    caches: frozenset[str]
    """Arguments that are caches."""

    def run(self, called: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a module, or its forward, with ``inputs`` or others like them; plain outputs."""
        kwargs |= {name: cache_of(kwargs[name]) for name in self.caches & kwargs.keys()}
        # A copy: a cache without tokens is bound, and the call fills it.
        return plain_outputs(called(*args, **kwargs, **copy.deepcopy(dict(self.bound))))

    @contextlib.contextmanager
    def given_to(self, module: torch.nn.Module) -> Iterator[None]:
        """Meanwhile the module's own forward is this call."""
        forward, own = module.forward, "forward" in vars(module)
        signature = inspect.signature(forward)
        parameters = [p for name, p in signature.parameters.items() if name not in self.bound]
        loose = [name for name in self.inputs[1] if name not in signature.parameters]
        if loose:  # The exporter takes no dynamic shapes for what `**kwargs` gathers.
            named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in loose]
            parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD] + named

        @functools.wraps(forward)
        def plain(*args: Any, **kwargs: Any) -> Any:
            return self.run(forward, *args, **kwargs)

        plain.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        module.forward = plain
        try:
            yield
        finally:
            if own:
                module.forward = forward
            else:
                del module.forward

    def input_names(self, names: Sequence[str]) -> list[str]:
        """A graph's input names; those of a cache's tensors are the ones that exporters use."""
        slots = (past_name(i, part) for i in range(len(names)) for part in PARTS)
        return [next(slots) if self._in_cache(name) else name for name in names]

    def _in_cache(self, name: str) -> bool:
        return any(name.startswith(f"{cache}_") for cache in self.caches)


TENSORS = PlainCall(((), {}), {}, frozenset())
"""A call to which nothing is bound."""


def plain_call(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> PlainCall:
    """The call of ``module`` with these arguments.

    Raises ``BadInput`` where they do not fit its ``forward``.
    """
    kwargs = _cache_by_its_name(module, kwargs)
    arguments = bind(module, args, kwargs) | _whole_cache(module, kwargs)
    if all(_holds_tensors(value) for value in arguments.values()):
        return PlainCall((tuple(args), dict(kwargs)), {}, frozenset())
    signature = inspect.signature(module.forward)
    kinds = {name: p.kind for name, p in signature.parameters.items()}
    for name, value in arguments.items():
        if kinds[name] is inspect.Parameter.POSITIONAL_ONLY or (
            kinds[name] is inspect.Parameter.VAR_POSITIONAL and not _holds_tensors(value)
        ):
            raise BadInput(f"the input {name} is not a tensor, and has no name to be bound by")
    for name, kind in kinds.items():
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    rest = next((arguments.pop(n, ()) for n, k in kinds.items()
                 if k is inspect.Parameter.VAR_POSITIONAL), ())  # fmt: skip
    caches = {n: v for n, v in arguments.items() if is_cache(v) and _pairs(v)}
    bound = {n: v for n, v in arguments.items() if n not in caches and not _holds_tensors(v)}
    tensors = {n: v for n, v in arguments.items() if n not in bound}
    return PlainCall(
        (tuple(rest), tensors | {n: _pairs(v) for n, v in caches.items()}), bound, frozenset(caches)
    )


def check_module(module: object) -> None:
    """Raise ``BadInput`` for what is no module, with what makes a graph of it."""
    advice = ""
    if isinstance(module, torch.jit.ScriptModule):
        advice = "trace the module that it was scripted from"
    elif isinstance(module, torch.export.ExportedProgram):
        advice = "torch.export.save(it, 'model.pt2'), and gw.load('model.pt2') reads it"
    elif isinstance(module, type):
        advice = f"make one first: {module.__name__}(...)"
    elif isinstance(module, str):
        advice = "gw.load(NAME) takes names and folders"
    elif callable(module) and not isinstance(module, torch.nn.Module):
        advice = "call it from the forward of a module"
    elif not isinstance(module, torch.nn.Module):
        advice = "give the module itself"
    if advice:
        what = "a class" if isinstance(module, type) else f"a {type(module).__name__}"
        raise BadInput(f"a torch.nn.Module is traced, and this is {what}: {advice}")


def bind(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names that ``forward`` has for them. Raises as ``plain_call``."""
    signature = inspect.signature(module.forward)
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise BadInput(
            f"the inputs do not fit {type(module).__name__}.forward{signature}: {error}"
        ) from None


def _holds_tensors(value: Any) -> bool:
    leaves = [] if is_cache(value) else pytree.tree_leaves(value)
    return bool(leaves) and all(isinstance(leaf, torch.Tensor) for leaf in leaves)


# --- caches -------------------------------------------------------------------------------------


def cache_name(forward: Callable[..., Any]) -> str:
    """What a forward of transformers calls the cache that it takes: ``cache`` since 5.24,
    ``past_key_values`` before; empty where it takes none."""
    accepted = inspect.signature(forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in accepted), "")


def cache_argument(model: Any) -> str:
    """``cache_name`` of a model's class, or of the one with a head of its own inside, to which
    BLIP-2 passes what it does not know."""
    inner = getattr(model, "language_model", model)
    return cache_name(type(model).forward) or cache_name(type(inner).forward)


def _cache_by_its_name(module: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with a cache by the name that the signature has for it: a library that renamed
    it takes the old name among arguments of any name, which have no shapes of their own."""
    name, old = cache_name(module.forward), "past_key_values"
    if not name or name in kwargs or old not in kwargs:
        return dict(kwargs)
    return {name if key == old else key: value for key, value in kwargs.items()}


def _whole_cache(module: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An empty cache that keeps all tokens, for a model of transformers that would make one whose
    layers keep the last ones alone: how many there are is told by the length of a text."""
    config = getattr(module, "config", None)
    windows = getattr(config, "sliding_window", None) or getattr(config, "layer_types", None)
    name = cache_name(module.forward)
    if not windows or not name or name in kwargs:
        return {}
    if not kwargs.get("use_cache", getattr(config, "use_cache", False)):
        return {}
    return {name: cache_of(())}


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of transformers, which is not imported for it."""
    module = sys.modules.get("transformers.cache_utils")
    return module is not None and isinstance(value, module.Cache)


def cache_of(pairs: Sequence[Sequence[torch.Tensor]]) -> Any:
    """A library's cache that holds these keys and values, a pair ``[batch, heads, past, head_dim]``
    a layer; every layer keeps all that it has seen."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in pairs:
        # Filled by hand: `update` would first join the cache to an empty tensor.
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device
        cache.layers.append(layer)
    return cache


def presents(cache: Any) -> dict[str, torch.Tensor]:
    """Keys and values of a cache by the names that exporters give them."""
    both = [(getattr(cache, f"{attention}_attention_cache", None), of)
            for attention, of in (("self", "decoder"), ("cross", "encoder"))]  # fmt: skip
    halves = [(half, of) for half, of in both if half is not None] or [(cache, "")]
    return {
        present_name(slot, part, of): tensor
        for half, of in halves
        for slot, pair in enumerate(_pairs(half))
        for part, tensor in zip(PARTS, pair, strict=True)
    }


def _pairs(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the layers of a cache that have any; none of a cache of another kind."""
    layers = getattr(cache, "layers", ())
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    return [(k, v) for k, v in pairs if k is not None and v is not None]


# --- outputs ------------------------------------------------------------------------------------


def plain_outputs(output: Any) -> Any:
    """Tensors and plain containers of them as they are; of what else is returned the tensors by
    name: ``logits``, ``hidden_states.0``, ``present.0.key``."""
    if _is_plain(output):
        return output
    tensors: dict[str, torch.Tensor] = {}
    _collect(tensors, "", output)
    return tensors


def named_tensors(
    output: Mapping[str, Any], feeds: Container[str] = ()
) -> dict[str, torch.Tensor]:
    """Those of a library's output that are tensors, by name; where none is, those in its lists
    (``logits.0``). Not one of an input's name: a graph has one value of a name, and Parakeet's
    encoder gives a shorter mask back. Raises ``BadInput`` where there is none at all."""
    tensors = {
        name: value for name, value in output.items()
        if isinstance(value, torch.Tensor) and name not in feeds
    }  # fmt: skip
    if not tensors:
        _collect(tensors, "", dict(output))
    if not tensors:
        raise BadInput("the forward gives no tensor")
    return tensors


def _is_plain(output: Any) -> bool:
    if type(output) in (tuple, list):
        return all(map(_is_plain, output))
    if type(output) is dict:  # of what lies deeper the exporter keeps no names
        return all(isinstance(value, torch.Tensor) for value in output.values())
    return isinstance(output, torch.Tensor)


def _collect(tensors: dict[str, torch.Tensor], name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        tensors[name or "output"] = value
    elif is_cache(value):
        tensors.update(presents(value))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _collect(tensors, f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        _collect(tensors, name, value._asdict())
    elif isinstance(value, tuple | list):
        for index, inner in enumerate(value):
            _collect(tensors, f"{name}.{index}" if name else f"output_{index}", inner)
    elif is_dataclass(value):
        _collect(tensors, name, {field.name: getattr(value, field.name) for field in fields(value)})
