"""``classify``: accuracy of an image classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from .pictures import check_pictures, shown
from .stats import wilson
from .subject import IMAGE, Subject
from .task import EvalResult, Finite, Setting, Task


class Classify(Task):
    """Share of test images whose most likely class is the right one.

    A sample is an image (1000 of the test split of ``ir.zoo.scenes``). Interval: Wilson.
    """

    name = "classify"
    kinds = (IMAGE,)
    headlines: ClassVar = {"accuracy": "higher"}
    proportions = ("accuracy",)

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        check_pictures(subject, setting)

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        return [self._judge(subject, setting) for subject in subjects]

    def _judge(self, subject: Subject, setting: Setting) -> EvalResult:
        images = shown(subject, setting)
        finite = Finite(self.name, subject, "images")
        hits: list[tuple[int, bool]] = []
        for batch, labels in zip(images.batches, images.labels, strict=True):
            setting.progress(f"{self.name} of {subject.name}", len(hits), images.count)
            logits = subject.run(batch)["logits"]
            for row, label in zip(logits, labels.tolist(), strict=True):
                finite(row)
                hits.append((label, int(row.argmax()) == label))
        finite.settle()
        return EvalResult(
            self.name, {"accuracy": sum(h for _, h in hits) / len(hits)},
            {"accuracy": wilson(sum(h for _, h in hits), len(hits))}, len(hits), "images",
            detail=by_type([(str(label), hit) for label, hit in hits]),
        )  # fmt: skip


def by_type(hits: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """Accuracy, Wilson interval and number of samples of each type, sorted by type."""
    detail = {}
    for kind in sorted({kind for kind, _ in hits}):
        part = [hit for k, hit in hits if k == kind]
        ends = list(wilson(sum(part), len(part)))
        detail[kind] = {
            "accuracy": sum(part) / len(part), "interval": ends, "samples": len(part)
        }  # fmt: skip
    return detail
