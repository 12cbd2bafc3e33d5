"""Sizes that a graph is for, where the code that it was traced from goes another way at others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from .errors import BadInput
from .types import Dim

SIZES_KEY = "graphwright.sizes"
"""Metadata: JSON, by the name of a dimension the least (``min``) and the greatest (``max``) size of
it that the graph computes as its source does. Runtimes do not know of it, and give other numbers
behind it."""
Bounds = Mapping[str, Mapping[str, int]]


def said(name: str, bounds: Mapping[str, int]) -> str:
    """For which sizes of a dimension a graph is, in words."""
    words = (("min", "at least"), ("max", "at most"))
    terms = [f"{word} {bounds[key]}" for key, word in words if key in bounds]
    return f"the graph is for sizes of {name} of {' and '.join(terms)}"


def sizes_metadata(bounds: Bounds) -> dict[str, str]:
    """What a graph's metadata says of them."""
    return {SIZES_KEY: json.dumps(bounds)} if bounds else {}


def read_sizes(metadata: Mapping[str, str]) -> Bounds:
    """The bounds by the name of a dimension; empty where a graph is for all sizes."""
    bounds: Bounds = json.loads(metadata.get(SIZES_KEY, "{}"))
    return bounds


def rename_sizes(metadata: dict[str, str], name: Callable[[str], str]) -> None:
    """Call dimensions by other names, in place."""
    bounds = {name(dim): of for dim, of in read_sizes(metadata).items()}
    metadata.update(sizes_metadata(bounds))


def check_sizes(
    bounds: Bounds, shapes: Mapping[str, tuple[Sequence[Dim], Sequence[int]]]
) -> None:  # fmt: skip
    """Raise ``BadInput`` where an input is of another size than the graph is for. ``shapes`` are
    the declared and the given shape of each input."""
    for name, (declared, shape) in shapes.items() if bounds else ():
        for dim, size in zip(declared, shape, strict=False):
            if not isinstance(dim, str) or dim not in bounds:
                continue
            of = bounds[dim]
            if not of.get("min", size) <= size <= of.get("max", size):
                raise BadInput(
                    f"input {name}: {dim} is {size}, and {said(dim, of)}: its numbers are others "
                    "behind that"
                )
