"""What a task of evaluation is: what it takes, what it gives, when it refuses."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...ir.core.errors import BadInput, BoundExceeded
from ..report.manifest import EvaluatedEntry
from .stats import Interval
from .subject import Subject

Progress = Callable[[str, int, int], None]


def silent(label: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class Setting:
    """What a person may choose. Every task states which of these it reads."""

    samples: int | None = None
    """How many samples, in the task's own unit; ``None`` for the task's own number."""
    data: Path | None = None
    """What a person judges on: text, plain or JSON lines with ``text``; labels, questions or inputs
    for the tasks that say so."""
    window: int | None = None
    """Tokens in a window of text; ``None``: 512, or what the model takes."""
    stride: int | None = None
    """Tokens between windows; ``None``: half a window. A whole window is most papers' convention:
    see ``documents.windows``."""
    batch: int = 1
    """Batch size of ``latency`` and ``memory``."""
    length: int | None = None
    """Sequence length of ``latency`` and ``memory``; ``None``: 128, or what the model takes."""
    rounds: int = 15
    """Timed rounds of ``latency``."""
    seed: int = 0
    progress: Progress = silent

    def __post_init__(self) -> None:
        for name in ("samples", "window", "stride", "batch", "length", "rounds"):
            value = getattr(self, name)
            least = 2 if name == "window" else 1
            if value is not None and value < least:
                raise BadInput(f"{name} {value} must be {least} or more")


@dataclass(frozen=True)
class EvalResult:
    """What one task says of one subject."""

    task: str
    figures: dict[str, float]
    interval: dict[str, Interval]
    """95 % confidence interval of each figure that has one."""
    samples: int
    unit: str
    """What a sample is: ``windows``, ``questions``, ``sentences``."""
    detail: dict[str, Any] = field(default_factory=dict)
    """Figures by kind of sample, and the setting they were taken in."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def entry(self) -> EvaluatedEntry:
        """As it stands in the manifest."""
        return EvaluatedEntry(
            figures=dict(self.figures),
            interval={name: list(ends) for name, ends in self.interval.items()},
            samples=self.samples,
            unit=self.unit,
            detail=self.detail,
            notes=list(self.notes),
            seconds=round(self.seconds, 3),
        )


class Task(ABC):
    """One way to judge models. Subclasses say in their docstring what a sample is."""

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ()
    """The kinds of model that it fits; empty for all."""
    needs_reference: ClassVar[bool] = False
    """Whether it compares with the original."""
    headlines: ClassVar[Mapping[str, str]]
    """The figures that tables show, each with what is better: ``higher`` or ``lower``."""
    proportions: ClassVar[tuple[str, ...]] = ()
    """Figures between 0 and 1: an asked interval is absolute for them, relative for others."""
    quality: ClassVar[bool] = True
    """Whether it judges what the model says, and not what it costs."""

    def check(self, subject: Subject, setting: Setting) -> None:
        """Raise where the task cannot judge the subject, before anything costly is done.

        ``BadInput`` where it does not fit, ``Missing`` where its data are not there.
        """
        if self.kinds and subject.kind not in self.kinds:
            raise BadInput(f"{self.name} does not fit {subject.describe()}")

    @abstractmethod
    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        """A result for each subject, in order. Raises as ``check``, and ``BoundExceeded`` where
        outputs are not finite."""

    def timed(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        """``run``, its wall time shared out among the subjects."""
        started = time.perf_counter()
        results = self.run(subjects, reference, setting)
        seconds = (time.perf_counter() - started) / max(1, len(results))
        return [replace(result, seconds=seconds) for result in results]


class Finite:
    """Counts samples whose outputs hold NaN or infinities: they never become a number."""

    def __init__(self, task: str, subject: Subject, unit: str) -> None:
        self._task, self._subject, self._unit = task, subject.name, unit
        self._seen = self._bad = 0

    def __call__(self, values: torch.Tensor) -> bool:
        """Whether all values of one sample are finite."""
        good = bool(torch.isfinite(values).all())
        self._seen += 1
        self._bad += not good
        return good

    def settle(self) -> None:
        """Raise ``BoundExceeded`` if any sample was bad."""
        if self._bad:
            raise BoundExceeded(
                f"{self._task}: {self._subject} gives NaN or infinite outputs on {self._bad} of "
                f"{self._seen} {self._unit}, so there is no figure. The weights may hold NaN, or a "
                "half-precision sum may overflow: try the model in float32, or another recipe"
            )


def limited(available: int, setting: Setting, default: int, unit: str) -> tuple[int, list[str]]:
    """How many samples to take, and a note where fewer are there than were asked for."""
    count = setting.samples or default
    if setting.samples is not None and count > available:
        return available, [f"{count} {unit} asked for, the data hold {available}"]
    return min(count, available), []
