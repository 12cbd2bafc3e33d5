"""``classify``: accuracy of an image classifier."""

from __future__ import annotations

import torch

from .accuracy import Accuracy
from .pictures import Exam, shown
from .subject import IMAGE, Subject
from .task import Setting


class Classify(Accuracy):
    """Share of test images whose most likely class is the right one.

    A sample is an image (1000 of the test split of ``ir.load.zoo.scenes``). Interval: Wilson.
    """

    name = "classify"
    kinds = (IMAGE,)
    unit = "images"

    def exam(self, subject: Subject, setting: Setting) -> Exam:
        return shown(subject, setting)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits
