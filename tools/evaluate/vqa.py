"""``vqa``: questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from .classify import by_type
from .pictures import asked, check_pictures
from .stats import wilson
from .subject import IMAGE_TEXT, Subject
from .task import EvalResult, Finite, Setting, Task


class Vqa(Task):
    """Share of questions about test images that are answered right, by question type.

    A sample is a question (500 of the test split of ``ir.zoo.scenes``). The answer is the most
    likely next token after the question. Interval: Wilson.
    """

    name = "vqa"
    kinds = (IMAGE_TEXT,)
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
        questions = asked(subject, setting)
        finite = Finite(self.name, subject, "questions")
        hits: list[tuple[str, bool]] = []
        for number, batch in enumerate(questions.batches):
            setting.progress(f"{self.name} of {subject.name}", len(hits), questions.count)
            logits = subject.run(batch)["logits"][:, -1]
            for row, (kind, answer) in zip(logits, questions.answers[number], strict=True):
                finite(row)
                hits.append((kind, int(row.argmax()) == answer))
        finite.settle()
        right = sum(hit for _, hit in hits)
        return EvalResult(
            self.name, {"accuracy": right / len(hits)}, {"accuracy": wilson(right, len(hits))},
            len(hits), "questions", detail=by_type(hits),
        )  # fmt: skip
