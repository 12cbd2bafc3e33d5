"""Which sizes of a graph's inputs may be 0, which nodes of ONNX Runtime do not take.

A step that goes on with a text has no pictures. A batch of texts, or of pictures alone, is never
empty.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from ....ir.core.dims import names_in
from ....ir.core.types import UNKNOWN_DIM, Dim, Type
from ....ir.core.view import View
from ....ir.structure.cache_slots import past_slot

_WORDS = "input_ids"


def never_none(view: View) -> frozenset[str]:
    """The sizes of inputs that are never 0: those of a text where there is one, else those of all
    inputs but caches."""
    given = {name: t for name, t in view.input_types().items() if past_slot(name) is None}
    words = [type_ for name, type_ in given.items() if name.endswith(_WORDS) and type_.rank == 2]
    rows = {(type_.shape or ())[0] for type_ in words}
    counted = [t for t in given.values() if not words or _is_counted(t, rows)]
    dims = {dim for type_ in counted for dim in type_.shape or () if isinstance(dim, str)}
    return frozenset(dim for dim in dims if dim != UNKNOWN_DIM and names_in(dim) == [dim])


def _is_counted(type_: Type, rows: Collection[Dim]) -> bool:
    """Whether an input has a number for each token of the rows of a text."""
    whole = type_.dtype in (torch.int64, torch.int32)
    return whole and type_.rank == 2 and (type_.shape or ())[0] in rows


def of_pictures(view: View) -> frozenset[str]:
    """The sizes of pictures beside a text, which may be 0. Whole numbers beside ``input_ids`` may
    be sizes of pictures."""
    texts: set[str] = set()
    whole: set[str] = set()
    pictures: set[str] = set()
    for name, type_ in view.input_types().items():
        if type_.dtype is None or not type_.shape:
            continue
        names = pictures if type_.dtype.is_floating_point else whole
        names = texts if name.endswith(_WORDS) else names
        names.update(names_in(type_.shape[0]))
    return frozenset(pictures - (texts or whole)) if texts or whole else frozenset()
