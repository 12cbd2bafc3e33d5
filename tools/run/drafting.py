"""What drafts for ``generate``: a path of an artifact, or what the model said before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...backends import Executable
from ...backends import compile as compile_model
from ...backends.generation.draft_path import PathDraft
from ...backends.generation.draft_recycle import Recycled
from ...backends.generation.drafts import Drafter
from ...backends.generation.speculate import Speculator, check_takes_back, takes_back
from ...backends.onnx.model_files import MANIFEST_FILE, MODEL_FILE
from ...ir.core.errors import BadInput, near_misses
from ...ir.load.entry_files import entry_file, entry_names
from ...ir.load.side_files import read_json
from . import batch_costs

AUTO, PATH, RECYCLE, NONE = "auto", "path", "recycle", "none"


@dataclass(frozen=True)
class Drafting:
    """What continues texts, and where its costs are kept."""

    speculator: Speculator
    unknown: Mapping[str, batch_costs.Key]
    """Of the drafters whose costs are measured here; a graph that is no artifact has no keys."""

    def keep_costs(self) -> None:
        """Write down what was measured of this machine."""
        for name, key in self.unknown.items():
            if name in self.speculator.costs:
                batch_costs.keep(key, self.speculator.costs[name])


def chosen_path(model: Any, draft: str) -> str | None:
    """The path of an artifact that drafts: the one called ``draft``, for ``path`` and ``auto`` that
    of the name ``draft``, else of the smallest graph; ``None`` where no path does. Raises
    ``BadInput`` where there is none of that name, before anything is loaded."""
    folder = _artifact(model)
    names = [] if folder is None else entry_names(folder)
    if draft in (NONE, RECYCLE) or (draft == AUTO and not names):
        return None
    if folder is None or not names:
        raise BadInput(
            f"draft {draft}: there is no path to draft by: make an artifact that has one, with "
            "--path NAME=BLOCKS, such as --path draft=0-3,6-9"
        )
    if draft in (AUTO, PATH):
        smallest = min(names, key=lambda name: (folder / entry_file(name)).stat().st_size)
        return "draft" if "draft" in names else smallest
    if draft not in names:
        raise BadInput(
            f"draft {draft!r} is unknown; {near_misses(draft, [AUTO, PATH, RECYCLE, NONE, *names])}"
        )
    return draft


def drafting(
    model: Any, run: Executable, draft: str, device: str, words: int | None
) -> Drafting | None:
    """What drafts for ``run``, which is compiled of ``model``; ``None`` where nothing does.

    ``recycle`` is what was said before; ``auto`` a path where there is one and ``recycle`` where
    the graph takes trees, whichever of both is faster, or none: what is known to be slower on this
    machine, whatever it guesses, is not loaded. ``words`` is how many tokens the model reads, where
    that is known. A model with a state that holds all tokens takes no draft: ``auto`` is none.
    Raises ``BadInput`` as ``chosen_path``, ``check_takes_back``, ``PathDraft`` and ``Recycled``.
    """
    path, folder = chosen_path(model, draft), _artifact(model)
    if draft == AUTO and not takes_back(run):
        return None
    if draft != NONE:
        check_takes_back(run)
    if draft == RECYCLE and words is None:
        raise BadInput("draft recycle: how many words the model reads is not known")
    makers: dict[str, Callable[[], Drafter]] = {}
    if path is not None and folder is not None:
        makers[path] = lambda: PathDraft(run, compile_model(folder, path=path, device=device))
    takes_tree = draft == AUTO and getattr(run, "takes_tree", False)
    if words is not None and (draft == RECYCLE or takes_tree):
        makers[RECYCLE] = lambda: Recycled(run, words)
    if not makers:
        return None
    keys = {} if folder is None else {name: _key(folder, name, device) for name in makers}
    costs = {name: batch_costs.known(key) for name, key in keys.items() if key is not None}
    known = {name: cost for name, cost in costs.items() if cost is not None}
    slow = {name for name, cost in known.items() if draft == AUTO and not cost.may_pay}
    drafters = {name: make() for name, make in makers.items() if name not in slow}
    speculator = Speculator(run, drafters, always=draft != AUTO, costs=known)
    unknown = {n: key for n, key in keys.items() if key is not None and n not in known}
    return Drafting(speculator, unknown)


def _artifact(model: Any) -> Path | None:
    """The folder, where a model is an artifact."""
    folder = Path(model).expanduser() if isinstance(model, str | Path) else None
    return None if folder is None or not (folder / MANIFEST_FILE).is_file() else folder


def _key(folder: Path, label: str, device: str) -> batch_costs.Key | None:
    """By which the costs of an artifact are kept; ``None`` where its manifest has no hashes."""
    manifest = read_json(folder, MANIFEST_FILE)
    files = manifest.get("files") or {}
    names = [name for name in (MODEL_FILE, entry_file(label)) if name in files]
    hashes = [files[name]["sha256"][:16] for name in names]
    return (str(manifest.get("target")), device, label, *hashes) if hashes else None
