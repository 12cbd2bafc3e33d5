"""What the report and the terminal both say about a manifest: sites, groups, numbers as text."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.filesize import decimal

from .manifest import ErrorEntry, EvaluatedEntry, Manifest, PassEntry, VerificationEntry

INDEX = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
"""An index in a dotted path: digits that are no part of a word, in ``h.3`` but not in ``fc1``."""


@dataclass(frozen=True)
class ChangedSite:
    """A site from before the first pass that touched it to after the last."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float | None
    rel_l2: float | None
    seconds: float | None
    group: str
    """See ``group_name``."""
    passes: tuple[int, ...]
    """Numbers of the passes that touched it."""


@dataclass(frozen=True)
class SiteGroup:
    """Sums over sites of equal role."""

    name: str
    count: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float | None
    """The mean over the group's weights; ``None`` where no site says."""
    rel_l2: float | None
    """The worst of the group; ``None`` where no site says."""
    seconds: float | None


def pass_text(step: PassEntry) -> str:
    """A pass with its options, as a recipe writes it."""
    if step.text:
        return step.text
    options = " ".join(f"{name}={value}" for name, value in step.options.items())
    return f"{step.name}{{{options}}}" if options else step.name


def merged_sites(manifest: Manifest) -> list[ChangedSite]:
    """Each changed site once, in the order of the first pass that touched it."""
    merged: dict[str, ChangedSite] = {}
    for number, step in enumerate(manifest.passes, 1):
        for site in step.sites:
            first = merged.get(site.name)
            merged[site.name] = ChangedSite(
                site.name, site.kind,
                shape=first.shape if first else tuple(site.shape),
                bytes_before=first.bytes_before if first else site.bytes_before,
                bytes_after=site.bytes_after,
                bits_per_weight=site.bits_per_weight, rel_l2=site.rel_l2, seconds=site.seconds,
                group=group_name(site.name), passes=(*(first.passes if first else ()), number),
            )  # fmt: skip
    return list(merged.values())


def with_weights(sites: Sequence[ChangedSite]) -> list[ChangedSite]:
    """The sites that have bytes: where tokens are selected there are none."""
    return [site for site in sites if site.bytes_before or site.bytes_after]


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


def site_groups(sites: Sequence[ChangedSite]) -> list[SiteGroup]:
    """Sums over each group, in the order of first appearance."""
    groups: dict[str, list[ChangedSite]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site)
    return [_summary(name, members) for name, members in groups.items()]


def _summary(name: str, members: Sequence[ChangedSite]) -> SiteGroup:
    coded = [(math.prod(s.shape), s.bits_per_weight) for s in members]
    weights = sum(count for count, bits in coded if bits is not None)
    bits = sum(count * bits for count, bits in coded if bits is not None)
    seconds = [site.seconds for site in members if site.seconds is not None]
    return SiteGroup(
        name,
        count=len(members),
        bytes_before=sum(site.bytes_before for site in members),
        bytes_after=sum(site.bytes_after for site in members),
        bits_per_weight=bits / weights if weights else None,
        rel_l2=max((s.rel_l2 for s in members if s.rel_l2 is not None), default=None),
        seconds=sum(seconds) if seconds else None,
    )


def worst(errors: Sequence[ErrorEntry]) -> ErrorEntry | None:
    """The largest error of several outputs, number by number; ``None`` where there is none."""
    if not errors:
        return None

    def extreme(
        figures: Sequence[float | None], pick: Callable[[list[float]], float]
    ) -> float | None:
        known = [figure for figure in figures if figure is not None]
        return pick(known) if len(known) == len(figures) else None

    return ErrorEntry(
        rel_l2=extreme([error.rel_l2 for error in errors], max),
        cosine=extreme([error.cosine for error in errors], min),
        max_abs=extreme([error.max_abs for error in errors], max),
    )


def judged_on(checks: VerificationEntry) -> str:
    """What the result was judged on: ``2 random inputs``, ``32 samples of zoo:tiny-llama``."""
    text = f"{checks.samples} {checks.data or 'samples'}"
    return re.sub(r"(input|sample)s", r"\1", text, count=1) if checks.samples == 1 else text


def heard(checks: VerificationEntry) -> str:
    """How the source itself was run beside our reading of it; empty where nothing says."""
    truth = checks.source
    if truth is None:
        return ""
    if not truth.by:
        return f"not held against the source itself: {truth.unheard}"
    also = f", {', '.join(truth.probes)}" if truth.probes else ""
    also += f" ({truth.unheard})" if truth.unheard else ""
    far = "" if truth.error is None else f": rel. L2 {error_text(truth.error.rel_l2)}"
    return f"read as {truth.by} gives it, on these samples{also}{far}"


def runs(checks: VerificationEntry) -> Iterator[tuple[str, ErrorEntry | None]]:
    """What was run to check an artifact, as a label, and its error; ``None`` where it was not."""
    runtime = checks.runtime
    yield f"ONNX Runtime, optimisation on{_unpacked(checks)}", runtime.optimized
    yield "ONNX Runtime, optimisation off", runtime.unoptimized
    if runtime.optimization is not None:
        yield "ONNX Runtime, on against off, nothing rounded", runtime.optimization
    yield from runtime.backends.items()


def _unpacked(checks: VerificationEntry) -> str:
    return "" if checks.prepacked else ", weights not repacked"


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


def tokens_text(tokens: Sequence[int | None]) -> str:
    """Tokens that enter each block, runs of equal ones joined.

    >>> tokens_text([145, 145, 152]), tokens_text([])
    ('145 x2, 152', '-')
    """
    runs = [(count, len(list(run))) for count, run in itertools.groupby(tokens)]
    parts = [("?" if n is None else str(n)) + (f" x{k}" if k > 1 else "") for n, k in runs]
    return ", ".join(parts) or "-"


def size_change(before: float, after: float, times: str = "×") -> str:
    """How much smaller or larger ``after`` is, in words; a dash where the question has no answer.

    >>> size_change(4, 2), size_change(2, 3), size_change(1000, 1001)
    ('2.00× smaller', '1.50× larger', 'no smaller')
    """
    if before <= 0 or after <= 0:
        return "-"
    larger = after > before
    factor = f"{after / before if larger else before / after:.2f}"
    if factor == "1.00":
        return "no smaller"
    return f"{factor}{times} {'larger' if larger else 'smaller'}"


def evaluated_text(result: EvaluatedEntry, name: str) -> str:
    """A figure and, on a line of its own, the ends of its interval; a dash where there is none."""
    value, ends = result.figures.get(name), result.interval.get(name)
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return size(int(value))
    text = f"{value:.4g}"
    return text if ends is None else f"{text}\n{_end(ends[0])}..{_end(ends[1])}"


def _end(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
