"""``classify``: accuracy of a classifier of images or texts."""

from __future__ import annotations

import torch

from .accuracy import Accuracy
from .labelled import exam, labelled
from .pictures import Exam, shown
from .subject import IMAGE, TEXT_CLASSES, Subject
from .task import Setting, Task


class Classify(Accuracy):
    """Share of images or texts whose most likely class is the right one, by class.

    A sample is a line of ``--data FILE.jsonl``: ``text`` or ``image`` (a path from the file), and
    ``label``, a class's number or its name in ``config.json``. Without it an image (1000 of the
    test split of ``ir.load.zoo.scenes``), for the models that fit these. Interval: Wilson.
    """

    name = "classify"
    kinds = (IMAGE, TEXT_CLASSES)
    unit = "samples"

    def check(self, subject: Subject, setting: Setting) -> None:
        if setting.data is None and subject.kind == IMAGE:
            super().check(subject, setting)
            return
        Task.check(self, subject, setting)
        labelled(subject, setting)

    def exam(self, subject: Subject, setting: Setting) -> Exam:
        return shown(subject, setting) if setting.data is None else exam(subject, setting)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits
