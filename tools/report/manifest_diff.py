"""``optimize-model diff``: two manifests compared, what differs from run to run left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .manifest import Manifest
from .summary import merged_sites, site_groups

MEASURED = frozenset({"latency", "memory"})
"""Tasks of evaluation whose figures differ from run to run."""

Fact = tuple[tuple[str, str], Any]
"""A section and a name that is unique within it, and the value there."""


class Row(NamedTuple):
    """One difference of two manifests; a side that lacks the entry is ``None``."""

    section: str
    name: str
    a: Any
    b: Any


def diff(a: Manifest, b: Manifest) -> list[Row]:
    """The differences of two manifests in reading order, sites by group."""
    left, right = dict(_facts(a)), dict(_facts(b))
    keys = list(left) + [key for key in right if key not in left]
    order = {section: i for i, section in enumerate(dict.fromkeys(s for s, _ in keys))}
    rows = [Row(*key, left.get(key), right.get(key)) for key in keys]
    changed = [row for row in rows if row.a != row.b]
    return sorted(changed, key=lambda row: order[row.section])


def _facts(manifest: Manifest) -> Iterator[Fact]:
    yield ("recipe", "recipe"), manifest.recipe
    yield ("recipe", "target"), manifest.target
    parts = {"source": manifest.source, "original": manifest.original,
             "calibration": manifest.calibration}  # fmt: skip
    for section, entry in parts.items():
        # Where it lies tells nothing of what it is.
        yield from _named(section, "", entry.model_copy(update={"beside": ""}) if entry else {})
    sizes = manifest.sizes.model_dump(exclude={"tensors"}, exclude_unset=True)
    yield from _named("sizes", "", sizes)
    for part in manifest.sizes.tensors:
        yield ("tensors", f"{part.name} {part.dtype}"), part.bytes
    yield from _named("structure", "", manifest.structure or {})
    yield from _named("versions", "", manifest.versions)
    for row in manifest.costs.rows if manifest.costs else ():
        costs = {"macs": row.macs, "weight_bytes": row.weight_bytes, "kv_bytes": row.kv_bytes}
        yield from _named("costs", f"{row.name}: ", costs)
    checks = manifest.verification
    for output in checks.outputs:
        yield from _named("verification", f"{output.name}: ", output)
    for mode, error in checks.runtime:
        yield from _named("verification", f"runtime {mode}: ", error or {})
    for number, step in enumerate(manifest.passes, 1):
        label = f"{number} {step.name}: "
        yield from _named("passes", label, step.options)
        yield from _named("passes", label, step.error or {})
        yield ("passes", f"{label}sites"), len(step.sites)
        yield ("passes", f"{label}refused"), len(step.refused)
    for task, sides in (manifest.eval or {}).items():
        yield from _named("eval", f"{task}: ", sides.after.figures if task not in MEASURED else {})
    for group in site_groups(merged_sites(manifest)):
        section = f"sites {group.name}"
        yield (section, "count"), group.count
        yield (section, "bytes_after"), group.bytes_after
        yield (section, "bits_per_weight"), group.bits_per_weight
        yield (section, "rel_l2"), group.rel_l2


def _named(section: str, label: str, part: Any | Mapping[str, Any]) -> Iterator[Fact]:
    """A part's fields, those that were not set left out, each with ``label`` before its name."""
    fields = part if isinstance(part, Mapping) else part.model_dump(exclude_unset=True)
    for name, value in fields.items():
        yield (section, f"{label}{name}"), value
