"""Files that hold a recipe, as TOML or YAML: ``passes``, a list of tables with a ``name`` each."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from ..ir.core.errors import BadInput

SUFFIXES = (".toml", ".yaml", ".yml")
DEEPEST = 16
"""Of YAML; a recipe takes four. Its parser takes the square of the depth."""


def read_recipe_file(path: Path) -> dict[str, Any]:
    """The content of a file. Raises ``BadInput`` where it is not of its format or no table."""
    kind = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        content = _toml(path) if kind == "TOML" else _yaml(path)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, also
        raise BadInput(f"{path}: not a {kind} file: {error}") from None
    return content if isinstance(content, dict) else {}


def _toml(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return tomllib.load(file)


def _yaml(path: Path) -> Any:
    """Plain YAML: no tags that make objects, and no aliases, by which a short file is a large
    one."""
    import yaml

    text = path.read_bytes()
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases are not read: write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"lists and tables in each other, more than {DEEPEST} deep")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
