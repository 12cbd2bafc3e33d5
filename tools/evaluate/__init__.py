"""Evaluation: what judges every pass. ``evaluate`` for one subject, ``evaluate_all`` for several.

Tasks are listed in ``TASKS``; each class says what a sample is and which interval it gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...backends import Executable
from ...ir.core.errors import BadInput, near_misses
from ...ir.core.view import View
from .agreement import Agreement
from .answer import Answer
from .classify import Classify
from .embed import Embed
from .generate import Generate
from .latency import Latency
from .memory import Memory
from .outputs import Outputs
from .perplexity import Perplexity
from .recall import Recall
from .subject import Subject
from .task import EvalResult, Progress, Setting, Task, silent
from .transcribe import Transcribe
from .vqa import Vqa

__all__ = ["EvalResult", "Setting", "Subject", "TASKS", "evaluate", "evaluate_all", "task_names"]

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Perplexity(), Agreement(), Recall(), Vqa(), Classify(), Answer(), Transcribe(), Embed(),
        Generate(), Outputs(), Latency(), Memory(),
    )
}  # fmt: skip


def evaluate(
    subject: View | Executable | str | Path | Subject,
    tasks: str | Sequence[str],
    reference: View | Executable | str | Path | Subject | None = None,
    samples: int | None = None,
    *,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    batch: int = 1,
    length: int | None = None,
    interval: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, EvalResult]:
    """Judge a graph, a compiled executable, an artifact folder or a model by name.

    ``tasks`` are names, as text separated by commas or as a sequence; ``reference`` is the original
    that ``agreement``, ``embed`` and ``generate`` compare with; ``samples`` is a number in each
    task's own unit; ``interval`` is the widest half-width of a 95 % interval that will do, absolute
    for proportions and relative for other figures.

    Raises ``BadInput`` for an unknown task, one that does not fit the model, and where there are
    too few samples for the asked interval; ``Missing`` where data are not there; ``BoundExceeded``
    where outputs are NaN or infinite.
    """
    names = task_names(tasks)
    judged = Subject.of(subject, tokenizer=tokenizer)
    original = None
    if reference is not None:
        same = reference is subject
        original = judged if same else Subject.of(reference, tokenizer=tokenizer)
    setting = Setting(
        samples=samples, data=None if data is None else Path(data), batch=batch, length=length,
        seed=seed, progress=progress,
    )  # fmt: skip
    by_task = evaluate_all([judged], names, original, setting)
    results = {name: both[0] for name, both in by_task.items()}
    if interval is not None:
        wide = too_wide([judged], by_task, interval)
        if wide:
            raise BadInput("\n".join(wide))
    return results


def evaluate_all(
    subjects: Sequence[Subject], tasks: Sequence[str], reference: Subject | None, setting: Setting
) -> dict[str, list[EvalResult]]:
    """The results of each task, one for each subject in order. Raises as ``evaluate``."""
    if reference is not None:
        for subject in subjects:
            # An executable has no folder: it reads the original's tokenizer.
            subject.folder = subject.folder or reference.folder
    check_tasks(subjects, tasks, reference, setting)
    return {name: TASKS[name].timed(subjects, reference, setting) for name in tasks}


def check_tasks(
    subjects: Sequence[Subject], tasks: Sequence[str], reference: Subject | None, setting: Setting
) -> None:
    """Raise where a task cannot judge a subject, before anything costly is done."""
    everyone = [*subjects, *([] if reference is None or reference in subjects else [reference])]
    for name in tasks:
        task = TASKS[name]
        for subject in everyone:
            _check_fit(task, subject, reference is not None)
            task.check(subject, setting)
        if task.needs_reference and reference is None:
            raise BadInput(
                f"{name} compares with the original: give it with --reference (reference= in "
                "Python)"
            )


def _check_fit(task: Task, subject: Subject, referenced: bool) -> None:
    fitting = fitting_tasks(subject)
    if task.name not in fitting:
        raise BadInput(
            f"{task.name} does not fit {subject.describe()}; these do: {', '.join(fitting)}"
        )


def fitting_tasks(subject: Subject) -> list[str]:
    """The tasks that fit the kind of model that a subject is."""
    return [name for name, task in TASKS.items() if not task.kinds or subject.kind in task.kinds]


def task_names(text: str | Sequence[str]) -> list[str]:
    """Names of tasks from ``a,b`` or a sequence, each once. ``BadInput`` for unknown ones."""
    parts = text.split(",") if isinstance(text, str) else text
    names = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    for name in names:
        if name not in TASKS:
            raise BadInput(f"there is no task {name!r}; {near_misses(name, TASKS)}")
    if not names:
        raise BadInput(f"name at least one task: {', '.join(TASKS)}")
    return names


def too_wide(
    subjects: Sequence[Subject], by_task: Mapping[str, Sequence[EvalResult]], asked: float
) -> list[str]:
    """A sentence for each headline figure whose interval is wider than ``asked``.

    The half-width is absolute for proportions and relative to the figure for others. It shrinks
    with the root of the number of samples, which gives the number that would do.
    """
    sentences = []
    for name, results in by_task.items():
        task = TASKS[name]
        for subject, result in zip(subjects, results, strict=True):
            for figure in task.headlines:
                value, ends = result.figures.get(figure), result.interval.get(figure)
                if value is None or name == "memory":
                    continue
                where = f"{name} of {subject.name}: {figure}"
                if ends is None:
                    sentences.append(f"{where}: {result.samples} {result.unit} give no interval")
                    continue
                half = (ends[1] - ends[0]) / 2
                half /= 1.0 if figure in task.proportions else abs(value) or 1.0
                if half > asked:
                    need = int(result.samples * (half / asked) ** 2) + 1
                    sentences.append(
                        f"{where}: {result.samples} {result.unit} give ±{half:.3g}, more than the "
                        f"±{asked:g} asked for; about {need} would do (--samples {need})"
                    )
    return sentences
