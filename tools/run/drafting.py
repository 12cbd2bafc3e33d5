"""Which path of an artifact drafts for ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...backends import Executable
from ...backends import compile as compile_model
from ...backends.artifact import MANIFEST_FILE
from ...backends.speculate import Speculator
from ...ir.core.errors import BadInput, near_misses
from ...ir.load.entry_files import entry_file, entry_names

AUTO, PATH, NONE = "auto", "path", "none"


def speculator(model: Any, run: Executable, draft: str, device: str) -> Speculator | None:
    """What drafts for ``run``, which is compiled of ``model``; ``None`` where nothing does.

    ``path`` takes the path called ``draft``, else the one of the smallest graph; ``auto`` the same
    where there is one. Raises ``BadInput`` where there is none of that name, and as ``Speculator``.
    """
    if draft == NONE:
        return None
    folder = Path(model).expanduser() if isinstance(model, str | Path) else None
    names = [] if folder is None or not (folder / MANIFEST_FILE).is_file() else entry_names(folder)
    if draft == AUTO and not names:
        return None
    if not names or folder is None:
        raise BadInput(
            f"draft {draft}: there is no path to draft by: make an artifact that has one, with "
            "--path NAME=BLOCKS, such as --path draft=0-3,6-9"
        )
    chosen = draft
    if draft in (AUTO, PATH):
        smallest = min(names, key=lambda name: (folder / entry_file(name)).stat().st_size)
        chosen = "draft" if "draft" in names else smallest
    if chosen not in names:
        raise BadInput(
            f"draft {draft!r} is unknown; {near_misses(draft, [AUTO, PATH, NONE, *names])}"
        )
    other = compile_model(folder, path=chosen, device=device)
    return Speculator(run, other, always=draft != AUTO)
