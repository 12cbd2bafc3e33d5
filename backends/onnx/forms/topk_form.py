"""Where rows may be none, one of zeros is chosen from too, and left out of what was chosen.

topk(x) => topk(concat(x, 0))[:-1]

ONNX Runtime 1.30 divides by the number of rows that its ``TopK`` is given: a step without a picture
ended the process (SIGFPE), where image tokens are chosen. From 1.31 on it gives none for none.
"""

from __future__ import annotations

import torch

from ....ir.core.dims import names_in
from ....ir.core.types import UNKNOWN_DIM
from ....ir.core.view import Node, View
from ....ir.core.weights import MemoryWeight
from ....ir.vocab.builder import Builder
from .empty_sizes import of_pictures


def never_without_rows(view: View) -> int:
    """Give each ``topk`` of rows that may be none one of zeros, in place; how many had none."""
    chosen = [node for node in view.nodes() if view.op(node) == "topk"]
    pictures = of_pictures(view) if chosen else frozenset()
    done = [node for node in chosen if _has_rows(view, node, pictures)]
    for node in done:
        _pad(view, node)
    return len(done)


def _has_rows(view: View, node: Node, pictures: frozenset[str]) -> bool:
    """Whether ``node`` chooses along another dimension than that of pictures, which comes first."""
    shape = view.type(view.tensor(node)).shape
    if shape is None or view.attrs(node)["dim"] % len(shape) == 0:
        return False
    first, *rest = shape
    if not pictures or not all(isinstance(d, int) for d in rest):
        return False
    return first == UNKNOWN_DIM or not pictures.isdisjoint(names_in(first))


def _pad(view: View, node: Node) -> None:
    x = view.tensor(node)
    type_ = view.type(x)
    assert type_.shape is not None and type_.dtype is not None
    b = Builder(view, node)
    row = torch.zeros((1, *type_.shape[1:]), dtype=type_.dtype)  # type: ignore[arg-type]
    padded = b.concat(x, view.add_weight(f"{view.name(x)}_none", MemoryWeight(row)), dim=0)
    both = view.results(view.maker(b.topk(padded, **view.attrs(node))))
    for old, new in zip(view.results(node), both, strict=True):
        view.replace(old, b.slice(new, 0, -1, dim=0))
