"""The lines of a person's own file of data, which a task takes by ``--data``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...ir.core.errors import BadInput, Missing
from ..data.text import read_lines


def lines_of(
    path: Path | None, task: str, form: str, keys: Sequence[str], needs: str = ""
) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, each with these keys as strings.

    ``form`` says what a line is, ``needs`` what the task cannot do without. Raises ``Missing``
    without a file, ``BadInput`` for an empty one and for a line that lacks something.
    """
    if path is None:
        raise Missing(f"{task} needs {needs}: give --data FILE.jsonl: {form}")
    if not path.is_file():
        raise Missing(f"{path}: no such file: --data of {task} takes {form}")
    lines = read_lines(path, keys)
    if not lines:
        raise BadInput(f"{path}: empty: it takes {form}")
    return lines
