"""``--calib-select``: which samples of the data are used, instead of the first ones.

``zip-fit=FILE`` takes the windows of text nearest to a task's by compression, without a model
(ZIP-FIT, Obbad et al. 2024, arXiv 2410.18194); ``most-moved`` those on which rounding all weights
moves the model's outputs most (``tools.run.most_moved``).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...ir.core.errors import BadInput, Missing
from .text import read_texts

METHODS = "--calib-select takes zip-fit=FILE (a task's text, .txt or .jsonl) or most-moved"
POOL = 8
"""So many times the samples that are used are looked at."""
TASK_TEXTS = 32
"""Texts of the task that a window is compared with, at most, evenly spaced."""


@dataclass(frozen=True)
class Selection:
    """What ``--calib-select`` asks for; nothing, if it is empty."""

    text: str = ""

    def __post_init__(self) -> None:
        if self.text in ("", "most-moved") or self.text.startswith("zip-fit="):
            return
        raise BadInput(f"--calib-select {self.text}: there is no such way; {METHODS}")

    @property
    def by_model(self) -> bool:
        return self.text == "most-moved"

    def task(self, folder: str | Path | None = None) -> list[str]:
        """The texts of the task, where samples are chosen by one, with the chat template of
        ``folder``. Raises ``Missing`` and as ``read_texts``."""
        if not self.text.startswith("zip-fit="):
            return []
        path = Path(self.text.removeprefix("zip-fit=")).expanduser()
        if not path.is_file():
            raise Missing(f"{path}: no such file; {METHODS}")
        if path.suffix not in (".txt", ".jsonl"):
            raise BadInput(f"{path}: not a kind of text that is read; {METHODS}")
        return read_texts(path, folder)


def nearest(windows: Sequence[str], count: int, task: Sequence[str]) -> list[int]:
    """The numbers of the ``count`` windows nearest to the task's texts, the nearest first.

    By the mean over the task's texts of the normalized compression distance,
    ``(C(xy) - min(C(x), C(y))) / max(C(x), C(y))``, C the bytes that ``zlib`` makes of a text. A
    text of the task is cut to the length of the window: beyond it, it could only be far away.
    """
    step = max(1, len(task) // TASK_TEXTS)
    shown = [text.encode() for text in task[::step][:TASK_TEXTS]]
    distances = [_distance(window.encode(), shown) for window in windows]
    return sorted(range(len(windows)), key=distances.__getitem__)[:count]


def _distance(window: bytes, task: Sequence[bytes]) -> float:
    alone, total = _size(window), 0.0
    for text in task:
        part = text[: max(len(window), 1)]
        other = _size(part)
        joined = _size(part + window)
        total += (joined - min(alone, other)) / max(alone, other)
    return total / len(task)


def _size(text: bytes) -> int:
    return len(zlib.compress(text, 6))
