"""What the report and the terminal both say about a manifest: sites, groups, numbers as text."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from rich.filesize import decimal

INDEX = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
"""An index in a dotted path: digits that are no part of a word, in ``h.3`` but not in ``fc1``."""


def pass_text(step: dict[str, Any]) -> str:
    """A pass with its options, as a recipe writes it."""
    if step.get("text"):
        return str(step["text"])
    options = " ".join(f"{name}={value}" for name, value in step["options"].items())
    return f"{step['name']}{{{options}}}" if options else str(step["name"])


def merged_sites(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Each site once, from before the first pass that touched it to after the last.

    Adds ``group`` (see ``group_name``) and ``passes``, the numbers of the passes that touched it.
    """
    merged: dict[str, dict[str, Any]] = {}
    for number, step in enumerate(manifest["passes"], 1):
        for site in step["sites"]:
            name = site["name"]
            old = merged.get(name, {"group": group_name(name), "passes": []})
            first = {key: old.get(key, site[key]) for key in ("bytes_before", "shape")}
            merged[name] = {**old, **site, **first, "passes": [*old["passes"], number]}
    return list(merged.values())


def with_weights(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sites that have bytes: where tokens are selected there are none."""
    return [site for site in sites if site["bytes_before"] or site["bytes_after"]]


def group_name(site: str) -> str:
    """The site's name with each index as ``*``: sites of equal role in all blocks share a group.

    >>> group_name("encoder.layer.11.output.dense"), group_name("h.3.mlp.fc1")
    ('encoder.layer.*.output.dense', 'h.*.mlp.fc1')
    """
    return INDEX.sub("*", site)


def block_index(name: str) -> str:
    """The first index in a site's name, as text; empty where it has none."""
    match = INDEX.search(name)
    return match.group() if match else ""


def split_name(name: str) -> tuple[str, str]:
    """A site's or group's name as that of its block and the rest; no block gives an empty one.

    >>> split_name("encoder.layer.11.output.dense"), split_name("lm_head")
    (('encoder.layer.11', 'output.dense'), ('', 'lm_head'))
    """
    parts = name.split(".")
    cuts = [i for i, part in enumerate(parts[:-1], 1) if part == "*" or part.isdigit()]
    cut = cuts[0] if cuts else 0
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def site_groups(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over each group, in the order of first appearance.

    ``rel_l2`` is the worst of the group, ``bits_per_weight`` the mean over its weights; both are
    ``None`` where no site says.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for site in sites:
        groups.setdefault(site["group"], []).append(site)
    return [_summary(name, members) for name, members in groups.items()]


def _summary(name: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [site["rel_l2"] for site in members if site.get("rel_l2") is not None]
    coded = [site for site in members if site.get("bits_per_weight") is not None]
    weights = sum(math.prod(site["shape"]) for site in coded)
    bits = sum(math.prod(site["shape"]) * site["bits_per_weight"] for site in coded)
    seconds = [site["seconds"] for site in members if site.get("seconds") is not None]
    return {
        "name": name,
        "count": len(members),
        "kinds": sorted({site["kind"] for site in members}),
        "bytes_before": sum(site["bytes_before"] for site in members),
        "bytes_after": sum(site["bytes_after"] for site in members),
        "bits_per_weight": bits / weights if weights else None,
        "rel_l2": max(errors, default=None),
        "seconds": sum(seconds) if seconds else None,
    }


def worst(errors: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The largest error of several outputs, number by number; ``None`` where there is none."""
    if not errors:
        return None

    def extreme(key: str, pick: Callable[[list[float]], float]) -> float | None:
        known = [error[key] for error in errors if error.get(key) is not None]
        return pick(known) if len(known) == len(errors) else None

    return {
        "rel_l2": extreme("rel_l2", max),
        "cosine": extreme("cosine", min),
        "max_abs": extreme("max_abs", max),
    }


# --- numbers as text -----------------------------------------------------------------------------


def counted(count: int, noun: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def size(amount: int | None) -> str:
    """Bytes in decimal units: ``22.7 MB``; a dash where unknown."""
    return "-" if amount is None else decimal(amount)


def number(value: float | None, digits: int) -> str:
    """Digits after the point; a dash where there is no number."""
    return "-" if value is None else f"{value:.{digits}f}"


def error_text(value: float | None) -> str:
    """Three significant digits, ``0`` for no error at all; a dash where there is no number."""
    return "-" if value is None else f"{value:#.3g}".removesuffix(".") if value else "0"


def duration(seconds: float) -> str:
    """``8 s``, ``3 min 20 s``, ``2 h 05 min``; rounded up, for it is a forecast."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def magnitude(value: int | None) -> str:
    """A large number with its unit: ``1.42 G``; a dash where unknown."""
    if value is None:
        return "-"
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return str(value)


def tokens_text(tokens: list[int | None]) -> str:
    """Tokens that enter each block, runs of equal ones joined.

    >>> tokens_text([145, 145, 152]), tokens_text([])
    ('145 x2, 152', '-')
    """
    runs = [(count, len(list(run))) for count, run in itertools.groupby(tokens)]
    parts = [("?" if n is None else str(n)) + (f" x{k}" if k > 1 else "") for n, k in runs]
    return ", ".join(parts) or "-"


def ratio(before: float, after: float) -> str:
    """How many times smaller ``after`` is; a dash where the question has no answer."""
    return f"{before / after:.2f}×" if before > 0 and after > 0 else "-"


def evaluated_text(result: Mapping[str, Any], name: str) -> str:
    """A figure and, on a line of its own, the ends of its interval; a dash where there is none."""
    value, ends = result["figures"].get(name), result["interval"].get(name)
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return size(int(value))
    text = f"{value:.4g}"
    return text if ends is None else f"{text}\n{_end(ends[0])}..{_end(ends[1])}"


def _end(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
