"""``optimize-model eval A B C``: several subjects, one table, one plot, and their reports."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...backends.artifacts import artifact
from ...backends.artifacts.claim import NEW, claimed, recover
from ...backends.onnx.model_files import MANIFEST_FILE
from ...ir.core.errors import BadInput
from ..evaluate import EvalResult, Setting, Subject, evaluate_all, fitting_tasks, task_names
from ..evaluate.plot import write_svg
from ..report import manifest
from ..report.manifest import ComparedEntry, ComparisonEntry
from . import report

DEFAULT_PLOT = Path("eval.svg")
OWN_TASKS = {
    "text-generation": ("perplexity", "agreement", "recall", "latency"),
    "image-text-to-text": ("vqa", "agreement", "latency"),
    "image-classification": ("classify", "agreement", "latency"),
    "text-embedding": ("embed", "latency"),
    "text-classification": ("agreement", "latency"),
    "token-classification": ("agreement", "latency"),
    "question-answering": ("agreement", "latency"),
    "automatic-speech-recognition": ("outputs", "latency", "memory"),
    "": ("outputs", "latency", "memory"),
}
"""The tasks of each kind of model where none are named."""


def judge(
    specs: Sequence[str], tasks: str, reference: str, setting: Setting, *, tokenizer: str = "",
    backend: str = "onnxruntime", device: str = "cpu", trust_remote_code: bool = False,
) -> tuple[list[Subject], dict[str, list[EvalResult]], Subject]:  # fmt: skip
    """The subjects, the results of each task in their order, and the original: ``reference``, or
    the first subject where it is empty. Raises as ``evaluate``."""
    if not specs:
        raise BadInput("name at least one artifact folder or model")
    names = task_names(tasks) if tasks else []
    by_spec: dict[str, Subject] = {}
    for number, spec in enumerate(dict.fromkeys([*specs, *([reference] if reference else [])])):
        setting.progress(f"loading {spec}", number, len(specs))
        by_spec[spec] = Subject.of(
            spec, tokenizer=tokenizer or None, backend=backend, device=device,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    subjects = [by_spec[spec] for spec in dict.fromkeys(specs)]
    original = by_spec[reference or specs[0]]
    chosen = names or [n for n in OWN_TASKS[original.kind] if n in fitting_tasks(original)]
    return subjects, evaluate_all(subjects, chosen, original, setting), original


def rows_of(
    subjects: Sequence[Subject], by_task: Mapping[str, Sequence[EvalResult]]
) -> list[ComparedEntry]:
    """The subjects with their results, as the manifest holds them."""
    return [
        ComparedEntry(
            name=subject.name, kind=subject.kind, backend=subject.backend, bytes=subject.bytes,
            results={task: results[number].entry() for task, results in by_task.items()},
        )
        for number, subject in enumerate(subjects)
    ]  # fmt: skip


def publish(
    rows: Sequence[ComparedEntry], reference: str, plot: Path | None
) -> tuple[list[str], list[str]]:
    """Write the plot, and the comparison into the report of each artifact among the subjects.

    What was written, and what could not be, as sentences.
    """
    written, failed = [], []
    if plot is not None and len(rows) > 1:
        if write_svg(plot, rows):
            written.append(str(plot))
        else:
            failed.append("nothing to plot: that takes a task of quality and a size or a latency")
    for row in rows:
        folder = Path(row.name)
        if not (folder / MANIFEST_FILE).is_file():
            continue
        try:
            written.append(str(_into_report(folder, rows, reference)))
        except OSError as error:
            failed.append(f"{folder}: the report was not changed: {error.strerror}")
    return written, failed


def _into_report(folder: Path, rows: Sequence[ComparedEntry], reference: str) -> Path:
    known = manifest.load(folder)
    known.comparison = ComparisonEntry(reference=reference, this=str(folder), rows=list(rows))
    with claimed(folder) as place, contextlib.ExitStack() as after:
        after.callback(recover, folder)
        scratch = place / NEW
        scratch.mkdir()
        files = [manifest.write(scratch, known), report.write(scratch, known)]
        for path in files:
            path.replace(folder / path.name)
    return folder / artifact.REPORT_FILE


def to_json(rows: Sequence[ComparedEntry], reference: str, setting: Setting) -> dict[str, Any]:
    """What ``eval --json`` prints."""
    subjects = [row.model_dump(mode="json") for row in rows]
    return {"reference": reference, "seed": setting.seed, "subjects": subjects}
