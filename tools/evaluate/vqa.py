"""``vqa``: questions about images."""

from __future__ import annotations

import torch

from .accuracy import Accuracy
from .pictures import Exam, asked
from .subject import IMAGE_TEXT, Subject
from .task import Setting


class Vqa(Accuracy):
    """Share of questions about test images that are answered right, by question type.

    A sample is a question (500 of the test split of ``ir.load.zoo.scenes``). The answer is the most
    likely next token after the question. Interval: Wilson.
    """

    name = "vqa"
    kinds = (IMAGE_TEXT,)
    unit = "questions"

    def exam(self, subject: Subject, setting: Setting) -> Exam:
        return asked(subject, setting)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1]
