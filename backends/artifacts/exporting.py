"""``export``: a graph as an artifact's folder, run before it takes its place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...ir.core.errors import BadInput
from ...ir.core.given import check_graph
from ...ir.core.types import TAKEN
from ...ir.core.version import __version__
from ...ir.core.view import View
from ...ir.load.intact import facts
from ...ir.run.inputs import sample_inputs
from ...ir.run.truth import Reference, Truth
from ...ir.structure.cache_slots import has_cache
from ...ir.structure.costs import weight_bytes
from ...ir.vocab.targets import CPU, find_target
from ..onnx.lowering import lowered, remarks
from ..onnx.model_files import MANIFEST_FILE, write_model
from ..runtimes.original import give_original
from .artifact import check_target, copy_side_files, model_bytes, publish
from .entries import entry_fields, parse_paths, write_entries
from .genai_pictures import write_genai
from .judging import Judge, check_artifact, checkable


def export(
    graph: View,
    out: str | Path,
    *,
    report: Any = None,
    samples: Sequence[Mapping[str, torch.Tensor]] | None = None,
    force: bool = False,
    target: str = CPU.name,
    paths: Mapping[str, str] | None = None,
) -> Path:
    """Write a graph as a folder that a stock ONNX Runtime loads; the folder's path.

    Before the folder takes its place ONNX Runtime runs it, graph optimisation on and off, on the
    first of ``samples``: the source's own where absent, or random inputs. ``report`` is that of
    ``optimize`` and makes the manifest; without it the manifest only says where the graph came
    from. ``optimize-model`` adds a page to look at. ``target`` names what it is written for:
    ``cpu``, ``cuda`` for half floats on a GPU, or ``portable`` for standard ONNX ops alone.
    ``paths`` are further entry graphs over the same data file: other paths through the blocks, by
    name (``{"fast": "0-3,5-9"}``), which ``load`` and ``compile`` take by ``path=``. Raises as
    ``publish``, ``BadInput`` where an op has no ONNX form or the runtime rejects what was written,
    and ``BoundExceeded`` where it computes something else.
    """
    check_graph(graph)
    if report is not None and not hasattr(report, "to_dict"):
        raise BadInput(f"report is a {type(report).__name__}, and must be that of optimize")
    if not isinstance(out, str | Path):
        raise BadInput(f"out is a {type(out).__name__}, and must be the name of a folder")
    parse_paths(paths or {})
    sources: list[str | Path] = [graph.source.folder or "", *graph.source.files]
    check_target(Path(out), force=force, sources=sources)
    onnx = lowered(graph, find_target(target))
    with publish(Path(out), force=force) as folder:
        write_model(onnx.model, folder)
        copy_side_files(graph.source.folder, folder)
        parts = write_genai(graph, onnx, folder, find_target(target))
        manifest = report.to_dict() if report is not None else _bare_manifest(graph)
        if has_cache(graph) and graph.source.kind in ("hf", "zoo"):
            manifest["source"]["cache"] = True  # so that `replay` loads the model with one
        manifest["verification"]["runtime"] = _run(graph, folder, samples)
        entries = write_entries(graph, folder, paths or {}, find_target(target))
        manifest |= {"paths": {n: entry_fields(e) for n, e in entries.items()}} if entries else {}
        manifest["target"] = target
        # Where a target prefers another float, a replay would take the source in that.
        taken = next((n for n, dtype in TAKEN.items() if dtype == graph.source.dtype), "")
        manifest |= {"dtype": taken} if taken else {}
        notes = [f"writing ONNX: {remark}" for remark in (*remarks(onnx), *parts)]
        manifest |= {"notes": notes} if notes else {}
        manifest["sizes"]["artifact_bytes"] = model_bytes(folder)
        manifest["files"] = facts(folder)
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return Path(out)


def _run(
    graph: View, folder: Path, samples: Sequence[Mapping[str, torch.Tensor]] | None
) -> dict[str, Any]:
    give_original(graph)
    sample = (samples or graph.source.samples or [sample_inputs(graph)])[:1]
    batches = checkable(folder, sample)
    judge = Judge(graph, batches, Reference(graph, batches, Truth()))
    return check_artifact(folder, graph, judge).to_dict()


def _bare_manifest(graph: View) -> dict[str, Any]:
    """Its fields without a default. The format is ``tools.report.manifest``, which lies above."""
    source = graph.source
    return {
        "schema": 1,
        "source": {"kind": source.kind, "name": source.name, "sha256": source.sha256},
        "recipe": "",
        "versions": {"graphwright": __version__},
        "passes": [],
        "verification": {"outputs": [], "runtime": {"optimized": None, "unoptimized": None}},
        "sizes": {"source_bytes": source.source_bytes or weight_bytes(graph), "artifact_bytes": 0},
    }
