"""The files of an artifact that has several entry graphs: one for each path, over one data file."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import BadInput, near_misses

_FIRST, _LAST = "path-", ".onnx"
PATTERN = f"{_FIRST}*{_LAST}"
PARTS = ("vision.onnx", "embedding.onnx", "text.onnx")
"""Files of a model of images and text that hold a part of it."""
SOUND_FILE = "speech.onnx"
"""Beside them, of one that hears, too."""


def entry_file(name: str) -> str:
    """The file of the path of this name."""
    return f"{_FIRST}{name}{_LAST}"


def entry_names(folder: Path) -> list[str]:
    """The paths that an artifact has, beside the whole model."""
    files = sorted(path.name for path in folder.glob(PATTERN))
    return [file.removeprefix(_FIRST).removesuffix(_LAST) for file in files]


def entry_path(folder: Path, name: str) -> Path:
    """The file of a path of this artifact. Raises ``BadInput`` where it has none of that name."""
    names = entry_names(folder)
    if name not in names:
        near = near_misses(name, names) if names else "make it with --path NAME=BLOCKS"
        raise BadInput(f"{folder}: there is no path {name!r}; {near}")
    return folder / entry_file(name)
