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


def end_tokens(folder: str | Path | None) -> frozenset[int]:
    """The tokens that end a text, by the model's configs. ``BadInput`` where these hold others than
    numbers."""
    for name in ("generation_config.json", "config.json"):
        config = read_json(folder, name)
        ids = config.get("eos_token_id", text_settings(config).get("eos_token_id"))
        tokens = ids if isinstance(ids, list) else [ids]
        if ids is not None and not all(isinstance(token, int) for token in tokens):
            raise BadInput(f"{folder}/{name}: eos_token_id is {ids}, and must be numbers")
        if ids is not None:
            return frozenset(tokens)
    return frozenset()


def named_token(folder: str | Path | None, *names: str) -> str | None:
    """The first of ``names`` (``bos_token``, ``eos_token``) that ``tokenizer_config.json`` has."""
    config = read_json(folder, "tokenizer_config.json")
    for name in names:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def padding_token(folder: str | Path | None, tokenizer: Any) -> int:
    """The token that shorter rows are filled up with: a decoder that gives classes of a text finds
    the text's last token by it.

    By ``config.json``, else by the tokenizer's settings; 0 where neither names one of the model's.
    """
    settings = read_json(folder, "config.json")
    words = text_settings(settings).get("vocab_size")
    own = settings.get("pad_token_id", text_settings(settings).get("pad_token_id"))
    if own is None and (named := named_token(folder, "pad_token")):
        own = tokenizer.token_to_id(named)
    if not isinstance(own, int) or own < 0 or (isinstance(words, int) and own >= words):
        return 0
    return own
