"""What tasks share that count right answers: the loop, the interval, the figures by type."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from .pictures import Exam, check_pictures
from .stats import wilson
from .subject import Subject
from .task import EvalResult, Finite, Setting, Task


class Accuracy(Task):
    """Share of samples whose most likely answer is the right one. Interval: Wilson."""

    headlines: ClassVar = {"accuracy": "higher"}
    proportions = ("accuracy",)
    unit: ClassVar[str]
    """What a sample is, in the plural."""

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        check_pictures(subject, setting)

    @abstractmethod
    def exam(self, subject: Subject, setting: Setting) -> Exam:
        """The samples, and what is right."""

    @abstractmethod
    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """``[samples, answers]``: a row of the model's ``logits`` for each sample of a batch."""

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        return [self.judge(subject, setting) for subject in subjects]

    def judge(self, subject: Subject, setting: Setting) -> EvalResult:
        """The result of one subject."""
        exam = self.exam(subject, setting)
        finite = Finite(self.name, subject, self.unit)
        hits: list[tuple[str, bool]] = []
        for batch, answers in zip(exam.batches, exam.answers, strict=True):
            setting.progress(f"{self.name} of {subject.name}", len(hits), exam.count)
            scores = self.scores(subject.run(batch)["logits"])
            for row, (kind, answer) in zip(scores, answers, strict=True):
                finite(row)
                hits.append((kind, int(row.argmax()) == answer))
        finite.settle()
        right = sum(hit for _, hit in hits)
        return EvalResult(
            self.name, {"accuracy": right / len(hits)}, {"accuracy": wilson(right, len(hits))},
            len(hits), self.unit, detail=_by_type(hits),
        )  # fmt: skip


def _by_type(hits: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """Accuracy, Wilson interval and number of samples of each type, sorted by type."""
    detail = {}
    for kind in sorted({kind for kind, _ in hits}):
        part = [hit for k, hit in hits if k == kind]
        ends = list(wilson(sum(part), len(part)))
        detail[kind] = {
            "accuracy": sum(part) / len(part), "interval": ends, "samples": len(part)
        }  # fmt: skip
    return detail
