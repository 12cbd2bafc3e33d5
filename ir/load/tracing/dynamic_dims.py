"""Which dimensions of a model's inputs are dynamic, what they are called, and how far they go."""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from ...structure.cache_slots import PAST_AXIS
from .limits import Limits


def _dynamic_dims(leaf: Any) -> dict[int, str]:
    if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
        return {}
    tokens = leaf.dim() == 2 and not (leaf.is_floating_point() or leaf.is_complex())
    return {0: "batch", 1: "seq"} if tokens else {0: "batch"}


def widen(leaf: Any) -> Any:
    """The tensor with two of what it has one of: the exporter takes a size of 1 for a constant."""
    for dim in _dynamic_dims(leaf):
        if leaf.shape[dim] == 1:
            leaf = torch.cat([leaf, leaf], dim)
    return leaf


def two_rows(leaf: Any) -> Any:
    """``widen`` along dimension 0 alone."""
    one = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == 1
    return torch.cat([leaf, leaf]) if one else leaf


def auto_shapes(
    bound: Mapping[str, Any], caches: Container[str], loose: Iterable[str] = ()
) -> dict[str, Any]:
    """Dynamic shapes for the inputs: equal sizes are one dimension, but for those named ``loose``.

    Of a loose dimension the exporter may make several, or a constant. ``caches`` names arguments
    whose tensors hold the tokens before.
    """
    sizes: dict[str, int] = {}
    dims = {name: Dim(name) for name in ("batch", "seq", "past")}

    def spec(leaf: Any, cached: bool) -> dict[int, Any] | None:
        axes: dict[int, Any] = {}
        of_cache = {0: "batch", PAST_AXIS: "past"}
        for index, name in (of_cache if cached else _dynamic_dims(leaf)).items():
            same = sizes.setdefault(name, leaf.shape[index]) == leaf.shape[index]
            axes[index] = dims[name] if same and name not in loose else Dim.AUTO
        return axes or None

    return {
        name: pytree.tree_map(functools.partial(spec, cached=name in caches), value)
        for name, value in bound.items()
    }


def loosened(
    bound: Mapping[str, Any], caches: Container[str], loose: set[str], message: str
) -> Any | None:
    """Shapes without those names that the exporter says are violated; ``None`` where none are."""
    named = re.search(r"Constraints violated \(([^)]*)\)", message)
    violated = set(named[1].split(", ")) & {"batch", "seq", "past"} if named else set()
    if not violated - loose:
        return None
    loose |= violated
    return auto_shapes(bound, caches, loose)


_ALONE = r"(\w+) = L\[.* guard (?:\(\((-?\d+)\) \+ )?L\[[^ ]+\)? != (\d+)\.?(?:\s|$)"
"""In the exporter's words, a dimension, and the one size of it that behaves as no other does: the
number behind ``!=``, less what is added before it."""


def bounded(shapes: Any, limits: Limits, tried: set[str], message: str) -> Any | None:
    """The shapes that are given, bounded as the exporter proposes; ``None`` where it does not.

    It proposes no bound where one size behaves as no other does: then that one is left out.
    """
    if message in tried or "Constraints violated" not in message:
        return None
    tried.add(message)
    most = {d.__name__: d.max for d in pytree.tree_leaves(shapes) if isinstance(d, Dim)}
    ranges = {
        name: dict(re.findall(r"(min|max)=(\d+)", bounds))
        for name, bounds in re.findall(r"^\s*(\w+) = Dim\('\w+'(.*)\)$", message, re.M)
        if name in most  # It proposes dims of its own too, that others are multiples of.
    }
    fixed = dict(re.findall(r"^\s*(\w+) = (\d+)$", message, re.M))
    for name, shift, number in re.findall(_ALONE, message):
        alone = int(number) - int(shift or 0)
        # Left out with what lies behind it on the side that is farther from the usual sizes.
        bound = {"max": alone - 1} if alone > most.get(name, 0) // 2 else {"min": alone + 1}
        ranges.setdefault(name, {key: str(size) for key, size in bound.items()})
    if not ranges and not fixed:
        return None
    sizes = {name: {key: int(size) for key, size in of.items()} for name, of in ranges.items()}
    limits.sizes |= sizes
    for name, size in fixed.items():
        limits.words[name] = f"the model's code fixes {name}: the graph is for {size} alone"

    def narrowed(dim: Any) -> Any:
        if not isinstance(dim, Dim):
            return dim
        name = dim.__name__
        if name in fixed:
            return None
        usual = {"min": getattr(dim, "min", None), "max": getattr(dim, "max", None)}
        bounds = usual | sizes.get(name, {})
        return Dim(name, **{key: size for key, size in bounds.items() if size is not None})

    return pytree.tree_map_only(Dim, narrowed, shapes)


def dim_names(program: ExportedProgram, dynamic_shapes: Any = None) -> dict[str, str]:
    """Names for the exporter's symbols: ``{"s43": "batch", "s53": "seq"}``.

    A ``torch.export.Dim`` keeps its name; other dimensions are named by their place.
    """
    inputs = set(program.graph_signature.user_inputs)
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.name in inputs}
    specs = dynamic_shapes if isinstance(dynamic_shapes, Mapping) else {}
    if isinstance(dynamic_shapes, list | tuple):
        specs = dict(zip(values, dynamic_shapes, strict=False))
    names: dict[str, str] = {}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            continue
        usual = _dynamic_dims(value)
        sizes: Sequence[int | torch.SymInt] = value.shape
        for index, size in enumerate(sizes):
            symbol = str(size)
            if isinstance(size, int) or not symbol.isidentifier() or symbol in names:
                continue
            base = _dim_name(_spec_of(specs, name), index) or usual.get(index, f"{name}_{index}")
            same = sum(n == base or n.startswith(f"{base}_") for n in names.values())
            names[symbol] = f"{base}_{same}" if same else base
    return names


def _spec_of(specs: Mapping[str, Any], name: str) -> Any:
    """The shape given for an input; one out of a list of an argument has its places in its name."""
    if name in specs:
        return specs[name]
    argument, _, places = re.sub(r"((?:_\d+)+)$", r" \1", name).partition(" _")
    spec = specs.get(argument)
    for place in places.split("_"):
        if not isinstance(spec, list | tuple) or int(place) >= len(spec):
            return None
        spec = spec[int(place)]
    return spec


def _dim_name(spec: Any, index: int) -> str | None:
    if isinstance(spec, Mapping):
        dim = spec.get(index)
    else:
        dim = spec[index] if isinstance(spec, list | tuple) and index < len(spec) else None
    return dim.__name__ if isinstance(dim, Dim) else None
