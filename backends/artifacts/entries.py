"""Further entry graphs of an artifact: other paths through the blocks, over the same data file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import View
from ...ir.load.entry_files import entry_file
from ...ir.moves import Path as BlockPath
from ...ir.moves import follow
from ...ir.run.inputs import sample_inputs
from ...ir.run.truth import Reference, Truth
from ...ir.run.verify import Difference
from ...ir.structure.costs import weight_bytes
from ...ir.structure.recognize import last_tower, recognize
from ...ir.vocab.targets import CPU, Target
from ..onnx.lowering import lowered
from ..onnx.model_files import DATA_FILE, MODEL_FILE, save_beside
from .judging import Judge, check_artifact


@dataclass(frozen=True)
class Entry:
    """A path as it was written."""

    file: str
    blocks: str
    weight_bytes: int
    """Of the weights that it reads."""
    added_bytes: int
    """Of the data file, for what the whole model does not hold."""
    error: Difference
    """In the runtime, from its graph."""


def entry_fields(entry: Entry) -> dict[str, Any]:
    """As the manifest holds it."""
    return dataclasses.asdict(entry) | {"error": entry.error.to_dict()}


def parse_paths(texts: Mapping[str, str]) -> dict[str, BlockPath]:
    """Paths by name. Raises ``BadInput`` for a name that is none and a path that is none."""
    for name in texts:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            raise BadInput(
                f"the path's name {name!r} goes into a file's: small letters, digits, - and _"
            )
    return {name: BlockPath.parse(text) for name, text in texts.items()}


def branch(view: View, name: str, path: BlockPath) -> View:
    """The graph of another path through the blocks; ``view`` stays as it is. Raises ``BadInput``
    where it is none of this model's."""
    other = view.copy()
    canonicalize(other)
    try:
        follow(other, last_tower(recognize(other)), path, rule=f"path-{name}")
    except Refusal as refusal:
        raise BadInput(f"the path {name}: {refusal}") from None
    return other


def write_entries(
    view: View, folder: Path, texts: Mapping[str, str], target: Target = CPU
) -> dict[str, Entry]:
    """Write the paths beside ``model.onnx``, which is there already, and run each.

    Weights that the data file holds are read from there; what it does not hold is put behind them.
    Before the folder takes its place ONNX Runtime runs each, graph optimisation on and off, as
    ``export`` does the whole model. Raises as ``branch``, and ``BoundExceeded`` as ``Judge``.
    """
    entries = {}
    for name, path in parse_paths(texts).items():
        other = branch(view, name, path)
        file = folder / entry_file(name)
        added = save_beside(
            lowered(other, target).model, file, folder / MODEL_FILE, DATA_FILE
        )
        entries[name] = Entry(file.name, str(path), weight_bytes(other), added, _run(other, file))
    return entries


def _run(view: View, file: Path) -> Difference:
    batches = [sample_inputs(view)]
    judge = Judge(view, batches, Reference(view, batches, Truth()))
    return check_artifact(file.parent, view, judge, file=file.name).optimized
