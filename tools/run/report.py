"""``report.html``: one static file about an artifact, made from its manifest alone.

It loads nothing from anywhere: style, drawings and the one short script are inside, and a content
security policy forbids the rest.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from ..evaluate.plot import TEMPLATES
from ..report import plots
from ..report.manifest import Manifest, check
from ..report.summary import (
    counted,
    error_text,
    evaluated_text,
    magnitude,
    merged_sites,
    number,
    pass_text,
    ratio,
    site_groups,
    size,
    split_name,
    tokens_text,
    with_weights,
    worst,
)

FILE_NAME = "report.html"
BAR_ROWS = 40
"""More sites than this are drawn one bar a group, and listed one by one in a folded table."""

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
    """The report as HTML. Raises ``BadInput`` where the manifest lacks a required field."""
    check(manifest)
    changed = merged_sites(manifest)
    sites = with_weights(changed)
    script_hash = base64.b64encode(hashlib.sha256(COPY_SCRIPT.encode()).digest()).decode()
    template = _environment().get_template("report.html.j2")
    return template.render(
        m=manifest,
        sentence=_sentence(manifest, changed),
        headlines=_headlines(manifest),
        sites=sites,
        bars=_bars(sites),
        refusals=_refusals(manifest),
        pass_plot=plots.error_by_pass(_pass_errors(manifest)),
        site_plot=plots.error_by_site(sites),
        evaluated=_evaluated(manifest),
        pareto=_pareto(manifest),
        tree=_tree(manifest),
        machine=_machine(manifest.get("machine") or {}),
        command=_command(manifest),
        script=COPY_SCRIPT,
        script_hash=script_hash,
    )


def write(folder: Path | str, manifest: Manifest) -> Path:
    """Write the report into ``folder``; the path of the file."""
    path = Path(folder) / FILE_NAME
    path.write_text(render(manifest), encoding="utf-8", errors="xmlcharrefreplace")
    return path


def _environment() -> jinja2.Environment:
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
        "ratio": ratio,
        "cosine": partial(number, digits=6),
        "pass_text": pass_text,
        "tokens": tokens_text,
    }
    return environment


# --- what the template is given ------------------------------------------------------------------


def _sentence(manifest: Manifest, sites: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(step["name"] for step in manifest["passes"]))
    before, after = manifest["sizes"]["source_bytes"], manifest["sizes"]["artifact_bytes"]
    steps = f"{len(manifest['passes'])} pass{'' if len(manifest['passes']) == 1 else 'es'}"
    text = f"{steps} ({', '.join(names)}) changed {counted(len(sites), 'site')}"
    if before > 0 and after > 0:
        text += f"; {size(before)} of weights became an artifact of {size(after)}"
    return text + "."


def _headlines(manifest: Manifest) -> list[dict[str, str]]:
    before, after = manifest["sizes"]["source_bytes"], manifest["sizes"]["artifact_bytes"]
    outputs = manifest["verification"]["outputs"]
    error = worst(outputs) or {"rel_l2": None, "cosine": None, "max_abs": None}
    over = "" if len(outputs) == 1 else f", worst of {len(outputs)} outputs"
    return [
        {"label": "Size", "value": f"{size(before)} → {size(after)}", "note": "source → artifact"},
        {"label": "Smaller by", "value": ratio(before, after), "note": "source / artifact"},
        {"label": "Cosine", "value": number(error["cosine"], 6), "note": f"to the source{over}"},
        {
            "label": "Relative L2 error",
            "value": error_text(error["rel_l2"]),
            "note": f"against the source{over}",
        },
    ]


def _bars(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the size chart under headings: a site each, or a group of sites each."""
    single = len(sites) <= BAR_ROWS
    if single:
        rows = [{**site, "count": 1, "heading": split_name(site["name"])[0]} for site in sites]
    else:
        rows = [{**group, "heading": ""} for group in _largest(site_groups(sites))]
    longest = max((max(r["bytes_before"], r["bytes_after"]) for r in rows), default=0) or 1
    for row in rows:
        row["label"] = row["name"].removeprefix(row["heading"] + ".")
        row["before_percent"] = round(100 * row["bytes_before"] / longest, 2)
        row["after_percent"] = round(100 * row["bytes_after"] / longest, 2)
    return rows


def _largest(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most ``BAR_ROWS`` groups: the largest, in their order, and one row for all others."""
    if len(groups) <= BAR_ROWS:
        return groups
    ranked = sorted(groups, key=lambda group: -group["bytes_before"])
    kept = {group["name"] for group in ranked[: BAR_ROWS - 1]}
    rest = [group for group in groups if group["name"] not in kept]
    total = {key: sum(g[key] for g in rest) for key in ("count", "bytes_before", "bytes_after")}
    others = {"name": f"{len(rest)} smaller groups", "rel_l2": None, "bits_per_weight": None}
    return [*(group for group in groups if group["name"] in kept), {**others, **total}]


def _refusals(manifest: Manifest) -> list[dict[str, Any]]:
    """Refused sites of all passes, by pass and reason."""
    found: dict[tuple[int, str], list[str]] = {}
    for order, step in enumerate(manifest["passes"], 1):
        for refusal in step["refused"]:
            found.setdefault((order, refusal["reason"]), []).append(refusal["site"])
    return [
        {"pass": f"{order} {manifest['passes'][order - 1]['name']}", "reason": reason, "sites": s}
        for (order, reason), s in found.items()
    ]


def _pass_errors(manifest: Manifest) -> list[tuple[str, float | None]]:
    rows = [
        (f"{order} {pass_text(step)}", (step.get("error") or {}).get("rel_l2"))
        for order, step in enumerate(manifest["passes"], 1)
    ]
    total = worst(manifest["verification"]["outputs"])
    return [*rows, ("all passes, against the source", total["rel_l2"] if total else None)]


def _machine(machine: dict[str, Any]) -> str:
    cores, memory = machine.get("cores"), machine.get("memory_bytes")
    parts = [
        machine.get("cpu"),
        f"{cores} cores" if cores else None,
        size(memory) if memory else None,
        machine.get("platform"),
        machine.get("device"),
    ]
    return ", ".join(str(part) for part in parts if part)


def _command(manifest: Manifest) -> str:
    model = manifest["source"].get("name") or "MODEL"
    data = manifest.get("calibration")
    text = f"optimize-model {shlex.quote(model)} -p {shlex.quote(manifest['recipe'])} -o OUT"
    return f"{text} --calib {shlex.quote(data['name'])}" if data else text


def _evaluated(manifest: Manifest) -> list[dict[str, Any]]:
    """A row for each figure of each task, with its text before and after."""
    return [
        {"task": task, "name": name, "samples": f"{sides['after']['samples']} "
         f"{sides['after']['unit']}",
         **{side: evaluated_text(sides[side], name).split("\n") for side in ("before", "after")}}
        for task, sides in (manifest.get("eval") or {}).items()
        for name in sides["after"]["figures"]
    ]  # fmt: skip


def _pareto(manifest: Manifest) -> dict[str, Any] | None:
    """The last comparison that the artifact took part in, as table and plot."""
    found = manifest.get("comparison")
    if not found:
        return None
    from ..evaluate import TASKS
    from ..evaluate.plot import comparison

    rows = found["rows"]
    columns = [(t, n) for t in rows[0]["results"] if t in TASKS for n in TASKS[t].headlines]
    return {
        **found, "plot": comparison(rows) if len(rows) > 1 else None,
        "columns": [n if n == t else f"{t}: {n}" for t, n in columns],
        "lines": [
            {"name": row["name"], "bytes": row["bytes"],
             "cells": [evaluated_text(row["results"][t], n).split("\n") for t, n in columns]}
            for row in rows
        ],
    }  # fmt: skip


# --- the two graphs as one tree ------------------------------------------------------------------


def _tree(manifest: Manifest) -> dict[str, Any] | None:
    before, after = manifest.get("graph_before"), manifest.get("graph_after")
    return None if before is None or after is None else _align(before, after)


def _align(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any]:
    """Two trees as one: what each module held before and after, and whether that changed."""
    either = before or after or {}
    mine, theirs = _own(before), _own(after)
    old = {child["name"]: child for child in before["children"]} if before else {}
    new = {child["name"]: child for child in after["children"]} if after else {}
    children = [_align(old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]
    only = children[0] if len(children) == 1 else None
    if only and either["name"] and not mine["ops"] and not theirs["ops"]:
        return {**only, "name": f"{either['name']}.{only['name']}"}
    for side, own in (("before", mine), ("after", theirs)):
        own["nodes"] = sum(own["ops"].values()) + sum(c[side]["nodes"] for c in children)
        own["bytes"] += sum(c[side]["bytes"] for c in children)
    changed = mine["ops"] != theirs["ops"] or mine["own_bytes"] != theirs["own_bytes"]
    return {
        "name": either["name"],
        "before": {**mine, "chips": _chips(mine["ops"], theirs["ops"])},
        "after": {**theirs, "chips": _chips(theirs["ops"], mine["ops"])},
        "own_changed": changed,
        "changed": changed or any(child["changed"] for child in children),
        "children": children,
    }


def _own(tree: dict[str, Any] | None) -> dict[str, Any]:
    if tree is None:
        return {"present": False, "ops": Counter(), "own_bytes": 0, "bytes": 0}
    own = tree["params_bytes"]
    return {"present": True, "ops": Counter(tree["ops"]), "own_bytes": own, "bytes": own}


def _chips(ops: Counter[str], others: Counter[str]) -> list[dict[str, Any]]:
    """Ops of one side, the changed ones first."""
    chips = [{"op": op, "count": n, "changed": n != others[op]} for op, n in ops.items()]
    return sorted(chips, key=lambda chip: (not chip["changed"], -math.log1p(chip["count"])))
