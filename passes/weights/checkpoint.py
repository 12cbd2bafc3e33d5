"""Tensors of other checkpoints by name, and the weights of a graph that bear the same names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from ...ir.core.errors import BadInput
from ...ir.core.view import Value, View
from ...ir.core.weights import Weight, read_safetensors_header

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_checkpoint(path: str, option: str) -> dict[str, Weight]:
    """Handles of all tensors of a safetensors file, or of a folder with ``model.safetensors`` or an
    index of shards; no tensor is read. ``option`` is for errors.

    Raises ``BadInput`` where there is none: pickled checkpoints are never unpickled.
    """
    place = Path(path).expanduser()
    if not path or not place.exists():
        raise BadInput(f"{option}={path or '(nothing)'}: there is no such file or folder")
    tensors: dict[str, Weight] = {}
    for file in _files(place, option):
        tensors.update(read_safetensors_header(file))
    return tensors


def _files(place: Path, option: str) -> list[Path]:
    if place.is_file():
        return [place]
    if (place / SINGLE).is_file():
        return [place / SINGLE]
    index = place / INDEX
    if not index.is_file():
        raise BadInput(
            f"{option}={place}: the folder holds neither {SINGLE} nor {INDEX}; of a pickled "
            "checkpoint (.bin, .pt) save safetensors first"
        )
    try:
        names = json.loads(index.read_text())["weight_map"].values()
        shards = sorted({str(name) for name in names})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index}: no weight_map is read from it ({error!r})") from None
    outside = [name for name in shards if Path(name).name != name]
    missing = [name for name in shards if not (place / name).is_file()]
    if outside or missing:
        raise BadInput(f"{index}: the shard {(outside or missing)[0]} is not in the folder")
    return [place / name for name in shards]


def parameters(view: View, exclude: tuple[str, ...]) -> Iterator[tuple[str, Value, Weight]]:
    """The float weights that nodes read, each once, by the names that checkpoints have for them."""
    seen: set[Value] = set()
    for node in view.nodes():
        for value in view.arguments(node):
            weight = None if value in seen else view.weight(value)
            seen.add(value)
            if weight is None or not weight.dtype.is_floating_point:
                continue
            name = view.name(value).removesuffix(".T")
            if not any(fnmatchcase(name, glob) for glob in exclude):
                yield name, value, weight


def counterpart(tensors: Mapping[str, Weight], name: str, weight: Weight, place: str) -> Weight:
    """The tensor of a name. Raises ``BadInput`` where it has another shape or is not a float."""
    tensor = tensors[name]
    if tensor.shape != weight.shape or not tensor.dtype.is_floating_point:
        raise BadInput(
            f"{place}: {name} is {tensor.dtype} {list(tensor.shape)} and {weight.dtype} "
            f"{list(weight.shape)} in the model: these are not checkpoints of one architecture"
        )
    return tensor
