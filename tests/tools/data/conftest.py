"""Data of every kind that calibration reads."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from graphwright.ir.core.view import View

from ...models import NET_SOURCE

WORDS = "The quick brown fox jumps over the lazy dog. " * 40
FACTORY = f"""{NET_SOURCE}
def make():
    return Net(), (torch.randn(2, 32),), None, {{"x": {{0: torch.export.Dim("batch")}}}}
"""
"""A module that ``optimize-model`` makes by its name."""


@pytest.fixture(scope="module")
def llama(language_graph: View) -> View:
    return language_graph


def jsonl(path: Path, *entries: Any) -> str:
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return str(path)


def picture(path: Path, size: tuple[int, int] = (30, 20), level: int = 128) -> Path:
    image: Any = importlib.import_module("PIL.Image")
    image.new("RGB", size, (level, 255 - level, 7)).save(path)
    return path
