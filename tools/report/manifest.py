"""``graphwright.json``, the manifest of an artifact: read, check, compare, write.

The fields are described in ``graphwright.schema.json`` beside this file. A manifest is a plain
dict, as JSON holds it.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...ir.core.errors import BadInput, Missing
from ...ir.core.view import View
from .summary import merged_sites, site_groups

FILE_NAME = "graphwright.json"
SCHEMA = 1
SCHEMA_FILE = Path(__file__).with_name("graphwright.schema.json")

_REQUIRED = {
    "source": dict,
    "recipe": str,
    "versions": dict,
    "passes": list,
    "verification": dict,
    "sizes": dict,
}
_REQUIRED_OF_PASS = {
    "name": str,
    "options": dict,
    "exact": bool,
    "sites": list,
    "refused": list,
    "bytes_before": int,
    "bytes_after": int,
}
_REQUIRED_OF_SITE = {
    "name": str,
    "kind": str,
    "shape": list,
    "bytes_before": int,
    "bytes_after": int,
}
_REQUIRED_OF_CHECKS = {"outputs": list, "runtime": dict}
_REQUIRED_OF_SIZES = {"source_bytes": int, "artifact_bytes": int}
VOLATILE = frozenset({"created", "machine", "seconds", "peak_rss_bytes"})
"""Fields that differ between two runs of the same recipe on the same input."""

MEASURED = frozenset({"latency", "memory"})
"""Tasks of evaluation whose figures differ from run to run."""

Manifest = dict[str, Any]


class Row(NamedTuple):
    """One difference of two manifests; a side that lacks the entry is ``None``."""

    section: str
    name: str
    a: Any
    b: Any


def load(folder: Path | str) -> Manifest:
    """The manifest of the artifact in ``folder``.

    Raises ``BadInput`` where the folder is not a Graphwright artifact, or a newer version made it.
    """
    path = Path(folder)
    file = path if path.name == FILE_NAME else path / FILE_NAME
    if not file.is_file():
        why = f"it holds no {FILE_NAME}" if path.is_dir() else "there is no such folder"
        raise BadInput(f"{path}: not a Graphwright artifact: {why}")
    try:
        manifest = json.loads(file.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{file}: not JSON: {error}") from None
    check(manifest, str(file))
    found: Manifest = manifest
    return found


def check(manifest: object, where: str = FILE_NAME) -> None:
    """The cheap checks that every reader relies on; ``validate`` is the thorough one.

    Raises ``BadInput`` that names ``where`` and the first field that is wrong.
    """
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise BadInput(f"{where}: not a Graphwright manifest: it has no integer `schema`")
    version = manifest["schema"]
    if version > SCHEMA:
        raise BadInput(
            f"{where}: written in format {version}, and this Graphwright reads up to {SCHEMA}: "
            "upgrade it with `pip install -U graphwright`"
        )
    _require(manifest, _REQUIRED, where)
    _require(manifest["verification"], _REQUIRED_OF_CHECKS, f"{where}: verification")
    _require(manifest["sizes"], _REQUIRED_OF_SIZES, f"{where}: sizes")
    for number, step in enumerate(manifest["passes"], 1):
        _require(step, _REQUIRED_OF_PASS, f"{where}: pass {number}")
        for site in step["sites"]:
            _require(site, _REQUIRED_OF_SITE, f"{where}: a site of pass {number}")


def _require(item: object, fields: Mapping[str, type], where: str) -> None:
    if not isinstance(item, dict):
        raise BadInput(f"{where}: damaged: not an object")
    for key, kind in fields.items():
        if not isinstance(item.get(key), kind):
            raise BadInput(f"{where}: damaged: `{key}` is missing or is not a {kind.__name__}")


def validate(manifest: object) -> None:
    """Check a manifest against the whole JSON Schema.

    Needs the package ``jsonschema`` (``Missing`` without it). Raises ``BadInput`` that names the
    path of the offending field.
    """
    try:
        jsonschema = importlib.import_module("jsonschema")
    except ModuleNotFoundError:
        raise Missing("validating needs jsonschema: pip install jsonschema") from None
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    )
    if error is not None:
        raise BadInput(f"{FILE_NAME}: at {error.json_path}: {error.message}")


def write(folder: Path | str, manifest: Manifest) -> Path:
    """Write the manifest into ``folder``, keys sorted; the path of the file.

    JSON has no NaN and no infinity: such numbers are written as null. Raises ``BadInput`` where a
    required field is missing.
    """
    check(manifest)
    path = Path(folder) / FILE_NAME
    text = json.dumps(_finite(manifest), sort_keys=True, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _finite(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _finite(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [_finite(value) for value in item]
    return None if isinstance(item, float) and not math.isfinite(item) else item


def stable(item: Any) -> Any:
    """A manifest, or a part of one, without the fields that differ from run to run."""
    if isinstance(item, dict):
        return {key: stable(value) for key, value in item.items() if key not in VOLATILE}
    if isinstance(item, list):
        return [stable(value) for value in item]
    return item


# --- comparing -----------------------------------------------------------------------------------


def diff(a: Manifest, b: Manifest) -> list[Row]:
    """The differences of two manifests in reading order, sites by group; what differs from run to
    run is left out."""
    left, right = dict(_facts(stable(a))), dict(_facts(stable(b)))
    keys = list(left) + [key for key in right if key not in left]
    order = {section: i for i, section in enumerate(dict.fromkeys(s for s, _ in keys))}
    rows = [Row(*key, left.get(key), right.get(key)) for key in keys]
    changed = [row for row in rows if row.a != row.b]
    return sorted(changed, key=lambda row: order[row.section])


def _facts(manifest: Manifest) -> Iterator[tuple[tuple[str, str], Any]]:
    """The manifest's leaves, each under a section and a name that is unique within it."""
    yield ("recipe", "recipe"), manifest["recipe"]
    for section in ("source", "calibration", "sizes", "structure", "versions"):
        for name, value in (manifest.get(section) or {}).items():
            yield (section, name), value
    for row in (manifest.get("costs") or {}).get("rows", []):
        for name in ("macs", "weight_bytes", "kv_bytes"):
            yield ("costs", f"{row['name']}: {name}"), row[name]
    checks = manifest["verification"]
    for output in checks.get("outputs", []):
        for name, value in output.items():
            yield ("verification", f"{output['name']}: {name}"), value
    for mode, error in checks.get("runtime", {}).items():
        for name, value in (error or {}).items():
            yield ("verification", f"runtime {mode}: {name}"), value
    for number, step in enumerate(manifest["passes"], 1):
        label = f"{number} {step['name']}"
        for name, value in {**step["options"], **(step.get("error") or {})}.items():
            yield ("passes", f"{label}: {name}"), value
        yield ("passes", f"{label}: sites"), len(step["sites"])
        yield ("passes", f"{label}: refused"), len(step["refused"])
    for task, sides in (manifest.get("eval") or {}).items():
        for name, value in sides["after"]["figures"].items() if task not in MEASURED else ():
            yield ("eval", f"{task}: {name}"), value
    for group in site_groups(merged_sites(manifest)):
        for name in ("count", "bytes_after", "bits_per_weight", "rel_l2"):
            yield (f"sites {group['name']}", name), group[name]


# --- building ------------------------------------------------------------------------------------


def graph_tree(view: View) -> dict[str, Any]:
    """The graph by module path: ops and weight bytes of each module, as the schema's ``tree``.

    A weight that several modules share is counted where it is used first.
    """
    root: dict[str, Any] = {"name": "", "ops": {}, "params_bytes": 0, "children": []}
    by_path = {"": root}
    seen: set[Hashable] = set()
    for node in view.nodes():
        module = _module(by_path, view.scope(node))
        op = view.op(node)
        name = view.native_op(node) if op == "native" else op
        module["ops"][name] = module["ops"].get(name, 0) + 1
        for value in view.arguments(node):
            weight = view.weight(value)
            if weight is not None and weight.key not in seen:
                seen.add(weight.key)
                module["params_bytes"] += weight.nbytes
    return root


def _module(by_path: dict[str, dict[str, Any]], path: str) -> dict[str, Any]:
    """The tree's entry for a dotted path; missing ones are added from the root down."""
    parts = path.split(".") if path else []
    entry = by_path[""]
    for depth, part in enumerate(parts, 1):
        key = ".".join(parts[:depth])
        if key not in by_path:
            by_path[key] = {"name": part, "ops": {}, "params_bytes": 0, "children": []}
            entry["children"].append(by_path[key])
        entry = by_path[key]
    return entry
