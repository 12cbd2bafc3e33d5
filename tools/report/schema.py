"""The JSON Schema of the manifest, made from its models.

``python -m graphwright.tools.report.schema`` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from . import manifest

SCHEMA_FILE = Path(__file__).with_name("graphwright.schema.json")


class _Untitled(GenerateJsonSchema):
    """Without the titles that pydantic makes of field names: they repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def text() -> str:
    """The schema as its file holds it."""
    schema = manifest.Manifest.model_json_schema(schema_generator=_Untitled)
    schema = {
        "$schema": _Untitled.schema_dialect, **_unwrapped(schema), "title": manifest.FILE_NAME
    }  # fmt: skip
    return json.dumps(schema, indent=2) + "\n"


def _unwrapped(item: Any) -> Any:
    """Descriptions on one line each, however their docstrings are broken."""
    if isinstance(item, list):
        return [_unwrapped(part) for part in item]
    if not isinstance(item, dict):
        return item
    description = item.get("description")
    joined = {"description": " ".join(description.split())} if isinstance(description, str) else {}
    return {key: _unwrapped(value) for key, value in (item | joined).items()}


if __name__ == "__main__":
    SCHEMA_FILE.write_text(text(), encoding="utf-8")
