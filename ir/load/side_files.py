"""Settings in the JSON files beside a model, whose values nothing has checked yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.errors import BadInput


def read_json(folder: str | Path | None, name: str) -> dict[str, Any]:
    """A JSON object of the model's folder; empty where there is no such file. Raises ``BadInput``
    where it is not JSON."""
    path = Path(folder) / name if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Of a model of images and text, the part on its text; else the whole."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and inner else config


def longest_text(folder: str | Path | None) -> int | None:
    """Tokens that a model takes at most, by its ``config.json``; ``None`` where that is silent."""
    settings = text_settings(read_json(folder, "config.json"))
    for key in ("max_position_embeddings", "n_positions"):
        if type(settings.get(key)) is int and settings[key] > 0:
            return int(settings[key])
    return None
