"""``report.html``: one static file about an artifact, made from its manifest alone.

It loads nothing from anywhere: style, drawings and the one short script are inside, and a content
security policy forbids the rest.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2

from ...backends.artifacts.artifact import REPORT_FILE
from ..evaluate.plot import TEMPLATES
from ..report import plots
from ..report.manifest import ErrorEntry, MachineEntry, Manifest, TreeEntry
from ..report.meaning import kept, meaning, verdict
from ..report.panels import panels
from ..report.search_plots import BOUGHT, allocation, front
from ..report.summary import (
    ChangedSite,
    SiteGroup,
    counted,
    error_text,
    evaluated_text,
    heard,
    judged_on,
    magnitude,
    merged_sites,
    number,
    pass_text,
    runs,
    site_groups,
    size,
    size_change,
    split_name,
    tokens_text,
    with_weights,
    worst,
)
from ..report.visible import visible

BAR_ROWS = 40
"""More groups of sites than this are not drawn: the smallest share a bar."""

UNMEASURED = ErrorEntry(rel_l2=None, cosine=None, max_abs=None)

COPY_SCRIPT = """
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", () => {
    const source = document.getElementById(button.dataset.copy);
    const done = () => { button.textContent = "Copied"; };
    const select = () => { getSelection().selectAllChildren(source); };
    if (!navigator.clipboard) { select(); return; }
    navigator.clipboard.writeText(source.textContent).then(done, select);
  });
}
"""


def render(manifest: Manifest) -> str:
    """The report as HTML."""
    changed = merged_sites(manifest)
    sites, search = with_weights(changed), manifest.search
    script_hash = base64.b64encode(hashlib.sha256(COPY_SCRIPT.encode()).digest()).decode()
    template = _environment().get_template("report.html.j2")
    page = template.render(
        m=manifest,
        unmeasured=UNMEASURED,
        sentence=_sentence(manifest, changed),
        judged_on=judged_on(manifest.verification),
        heard=heard(manifest.verification),
        meaning=meaning(manifest),
        kept=kept(manifest),
        headlines=_headlines(manifest),
        sites=sites,
        bars=_bars(sites),
        refusals=_refusals(manifest),
        pass_plot=plots.error_by_pass(_pass_errors(manifest)),
        site_plot=plots.error_by_site(sites),
        front=None if search is None else front(search),
        bought=BOUGHT,
        bits=None if search is None else allocation(sites, manifest.passes),
        evaluated=_evaluated(manifest),
        cuts=panels(manifest.image_tokens, manifest.passes),
        pareto=_pareto(manifest),
        tree=_tree(manifest),
        runs=list(runs(manifest.verification)),
        machine=_machine(manifest.machine),
        command=_command(manifest),
        script=COPY_SCRIPT,
        script_hash=script_hash,
    )
    return visible(page)


def write(folder: Path | str, manifest: Manifest) -> Path:
    """Write the report into ``folder``; the path of the file."""
    path = Path(folder) / REPORT_FILE
    path.write_text(render(manifest), encoding="utf-8")
    return path


@cache
def _environment() -> jinja2.Environment:
    """Made once: it holds the compiled templates, of which a search writes many pages."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size,
        "number": error_text,
        "magnitude": magnitude,
        "size_change": size_change,
        "cosine": partial(number, digits=6),
        "pass_text": pass_text,
        "tokens": tokens_text,
    }
    return environment


# --- what the template is given ------------------------------------------------------------------


def _sentence(manifest: Manifest, sites: Sequence[ChangedSite]) -> str:
    names = list(dict.fromkeys(step.name for step in manifest.passes))
    before, after = manifest.sizes.source_bytes, manifest.sizes.artifact_bytes
    steps = f"{len(manifest.passes)} pass{'' if len(manifest.passes) == 1 else 'es'}"
    text = f"{steps} ({', '.join(names)}) changed {counted(len(sites), 'site')}"
    if before > 0 and after > 0:
        text += f"; {size(before)} of weights became an artifact of {size(after)}"
    return text + "."


def _headlines(manifest: Manifest) -> list[dict[str, str]]:
    """The cards: verdict, quality, size, speed."""
    before, after = manifest.sizes.source_bytes, manifest.sizes.artifact_bytes
    unchanged = kept(manifest)
    whole = "" if unchanged is None else f"; {size(unchanged.bytes_after)} kept as they were"
    return [
        {"label": "Verdict", "value": verdict(manifest), "note": _checked(manifest)},
        _quality(manifest),
        {"label": "Size", "value": f"{size(before)} → {size(after)}",
         "note": f"{size_change(before, after)}{whole}"},
        _speed(manifest),
    ]  # fmt: skip


def _checked(manifest: Manifest) -> str:
    runtime = manifest.verification.runtime
    if runtime.optimized is None or runtime.unoptimized is None:
        return "no artifact was run"
    return "ONNX Runtime gives what the graph gives, its optimisation on and off"


def _quality(manifest: Manifest) -> dict[str, str]:
    """The first figure of quality that was evaluated; else the distance to the source."""
    from ..evaluate import TASKS

    for task, sides in (manifest.eval or {}).items():
        if task not in TASKS or not TASKS[task].quality or not sides.after.figures:
            continue
        figure = next(iter(TASKS[task].headlines))
        old, new = (evaluated_text(s, figure).split("\n")[0] for s in (sides.before, sides.after))
        named = figure if figure == task else f"{task}: {figure}"
        return {"label": "Quality", "value": f"{old} → {new}",
                "note": f"{named}, on {sides.after.samples} {sides.after.unit}"}  # fmt: skip
    outputs = manifest.verification.outputs
    error = worst(outputs) or UNMEASURED
    over = "" if len(outputs) == 1 else f", worst of {len(outputs)} outputs"
    return {
        "label": "Quality", "value": f"cosine {number(error.cosine, 6)}",
        "note": f"relative L2 error {error_text(error.rel_l2)} to the source{over}",
    }  # fmt: skip


def _speed(manifest: Manifest) -> dict[str, str]:
    """Latency, where it was evaluated; else what a sample costs by its shapes."""
    timed = (manifest.eval or {}).get("latency")
    if timed is not None:
        old, new = (side.figures.get("median_ms") or 0.0 for side in (timed.before, timed.after))
        void = "; ".join(n for n in timed.after.notes if "void" in n)
        faster = f"{old / new:.2f}× as fast as the source in ONNX Runtime" if new else ""
        return {"label": "Speed", "value": f"{old:.3g} → {new:.3g} ms", "note": void or faster}
    rows = manifest.costs.rows if manifest.costs else []
    if not rows or rows[0].macs is None or rows[-1].macs is None:
        return {"label": "Speed", "value": "not measured", "note": "--eval latency measures it"}
    return {
        "label": "Speed", "value": f"{magnitude(rows[0].macs)} → {magnitude(rows[-1].macs)}",
        "note": "MACs of a sample; --eval latency measures milliseconds",
    }  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A row of the size chart."""

    label: str
    heading: str
    """The block that it stands under; empty for what lies outside of blocks."""
    count: int
    bytes_before: int
    bytes_after: int
    before_percent: float
    """Of the longest bar."""
    after_percent: float


def _bars(sites: Sequence[ChangedSite]) -> list[Bar]:
    """Rows of the size chart under headings: a role in all blocks each. Blocks are alike, and a bar
    for each of their sites would say the same many times."""
    groups = _largest(site_groups(sites))
    rows = [(split_name(g.name)[0], g.name, g.count, g.bytes_before, g.bytes_after) for g in groups]
    longest = max((max(before, after) for *_, before, after in rows), default=0) or 1
    return [
        Bar(
            name.removeprefix(heading + "."), heading, count, before, after,
            round(100 * before / longest, 2), round(100 * after / longest, 2),
        )
        for heading, name, count, before, after in rows
    ]  # fmt: skip


def _largest(groups: list[SiteGroup]) -> list[SiteGroup]:
    """At most ``BAR_ROWS`` groups: the largest, in their order, and one row for all others."""
    if len(groups) <= BAR_ROWS:
        return groups
    ranked = sorted(groups, key=lambda group: -group.bytes_before)
    kept = {group.name for group in ranked[: BAR_ROWS - 1]}
    rest = [group for group in groups if group.name not in kept]
    others = SiteGroup(
        f"{len(rest)} smaller groups", sum(g.count for g in rest),
        sum(g.bytes_before for g in rest), sum(g.bytes_after for g in rest),
        bits_per_weight=None, rel_l2=None, seconds=None,
    )  # fmt: skip
    return [*(group for group in groups if group.name in kept), others]


def _refusals(manifest: Manifest) -> list[dict[str, Any]]:
    """Refused sites of all passes, by pass and reason."""
    sites: dict[tuple[str, str], list[str]] = {}
    for order, step in enumerate(manifest.passes, 1):
        for refusal in step.refused:
            sites.setdefault((f"{order} {step.name}", refusal.reason), []).append(refusal.site)
    return [{"pass": step, "reason": reason, "sites": s} for (step, reason), s in sites.items()]


def _pass_errors(manifest: Manifest) -> list[tuple[str, float | None]]:
    rows = [
        (f"{order} {pass_text(step)}", step.error.rel_l2 if step.error else None)
        for order, step in enumerate(manifest.passes, 1)
    ]
    total = worst(manifest.verification.outputs)
    return [*rows, ("all passes, against the source", total.rel_l2 if total else None)]


def _machine(machine: MachineEntry | None) -> str:
    if machine is None:
        return ""
    parts = [
        machine.cpu,
        f"{machine.cores} cores" if machine.cores else "",
        size(machine.memory_bytes) if machine.memory_bytes else "",
        machine.platform,
        machine.device,
    ]
    return ", ".join(filter(None, parts))


def _command(manifest: Manifest) -> str:
    model, data = manifest.source.name or "MODEL", manifest.calibration
    text = f"optimize-model {shlex.quote(model)} -p {shlex.quote(manifest.recipe)} -o OUT"
    if data is None:
        return text
    chosen = f" --calib-select {shlex.quote(data.select)}" if data.select else ""
    cut = f" --calib-windows {data.windows}" if data.windows else ""
    return f"{text} --calib {shlex.quote(data.name)}{chosen}{cut}"


def _evaluated(manifest: Manifest) -> list[dict[str, Any]]:
    """A row for each figure of each task, with its text before and after."""
    return [
        {"task": task, "name": name, "samples": f"{sides.after.samples} {sides.after.unit}",
         "before": evaluated_text(sides.before, name).split("\n"),
         "after": evaluated_text(sides.after, name).split("\n")}
        for task, sides in (manifest.eval or {}).items()
        for name in sides.after.figures
    ]  # fmt: skip


def _pareto(manifest: Manifest) -> dict[str, Any] | None:
    """The last comparison that the artifact took part in, as table and plot."""
    compared = manifest.comparison
    if compared is None:
        return None
    from ..evaluate import TASKS
    from ..evaluate.plot import comparison

    rows = compared.rows
    columns = [(t, n) for t in rows[0].results if t in TASKS for n in TASKS[t].headlines]
    return {
        "this": compared.this, "reference": compared.reference,
        "plot": comparison(rows) if len(rows) > 1 else None,
        "columns": [n if n == t else f"{t}: {n}" for t, n in columns],
        "lines": [
            {"name": row.name, "bytes": row.bytes,
             "cells": [evaluated_text(row.results[t], n).split("\n") for t, n in columns]}
            for row in rows
        ],
    }  # fmt: skip


# --- the two graphs as one tree ------------------------------------------------------------------


@dataclass
class Side:
    """A module in one of the two graphs, and all that lies below it."""

    present: bool
    ops: Counter[str]
    """Of this very module."""
    own_bytes: int
    nodes: int
    """Of the module and all below it."""
    bytes: int
    chips: list[tuple[str, int, bool]] = field(default_factory=list)
    """Ops, how many, and whether the other graph has another number; the changed ones first."""

    @classmethod
    def of(cls, tree: TreeEntry | None) -> Side:
        if tree is None:
            return cls(False, Counter(), 0, 0, 0)
        ops = Counter(tree.ops)
        return cls(True, ops, tree.params_bytes, ops.total(), tree.params_bytes)

    def compare(self, other: Side) -> None:
        chips = [(op, count, count != other.ops[op]) for op, count in self.ops.items()]
        self.chips = sorted(chips, key=lambda chip: (not chip[2], -chip[1]))


@dataclass(frozen=True)
class Module:
    """A module as it was before and as it is after."""

    name: str
    before: Side
    after: Side
    own_changed: bool
    changed: bool
    """Here or below."""
    children: list[Module]


def _tree(manifest: Manifest) -> Module | None:
    before, after = manifest.graph_before, manifest.graph_after
    return None if before is None or after is None else _align(before.name, before, after)


def _align(name: str, before: TreeEntry | None, after: TreeEntry | None) -> Module:
    """Two trees as one: what each module held before and after, and whether that changed."""
    mine, theirs = Side.of(before), Side.of(after)
    old = {child.name: child for child in before.children} if before else {}
    new = {child.name: child for child in after.children} if after else {}
    children = [_align(n, old.get(n), new.get(n)) for n in dict.fromkeys([*old, *new])]
    if len(children) == 1 and name and not mine.ops and not theirs.ops:
        return replace(children[0], name=f"{name}.{children[0].name}")
    for child in children:
        mine.nodes += child.before.nodes
        mine.bytes += child.before.bytes
        theirs.nodes += child.after.nodes
        theirs.bytes += child.after.bytes
    mine.compare(theirs)
    theirs.compare(mine)
    changed = (mine.ops, mine.own_bytes) != (theirs.ops, theirs.own_bytes)
    below = any(child.changed for child in children)
    return Module(name, mine, theirs, changed, changed or below, children)
