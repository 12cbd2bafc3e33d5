"""``agreement``: whether a model still says what the original says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...ir.core.errors import BadInput
from .documents import check_text
from .pictures import check_pictures
from .probes import logits, probes
from .sentences import sentences
from .stats import bootstrap
from .subject import IMAGE, IMAGE_TEXT, READERS, TEXT, Subject
from .task import EvalResult, Finite, Setting, Task


class Agreement(Task):
    """Agreement with the original's distribution over the next token, or over classes.

    ``top1``: share of predictions whose most likely entry is the original's. ``kl``: mean of
    KL(original || model) in nats, in float64. A sample is a window of text (as ``perplexity``
    takes), a question, an image, or for models that give classes of a text or of its tokens a
    sentence (as ``embed`` takes). Intervals: bootstrap over the samples.
    """

    name = "agreement"
    kinds = (TEXT, IMAGE_TEXT, IMAGE, *READERS)
    needs_reference = True
    headlines: ClassVar = {"top1": "higher", "kl": "lower"}
    proportions = ("top1",)

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        if subject.kind == TEXT:
            check_text(subject, setting)
        elif subject.kind in READERS:
            subject.tokenizer_file()
            sentences(setting)
        else:
            check_pictures(subject, setting)

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        assert reference is not None
        for subject in subjects:
            if subject.head_tokens != reference.head_tokens:
                raise BadInput(
                    f"{subject.name} and {reference.name} do not say the same tokens: one has a "
                    "head of some of them. Judge both by perplexity, vqa or latency"
                )
        batches, samples, unit, notes = probes(reference, setting)
        count = 1 + max(place.unit for probe in batches for place in probe.places)
        sums = [np.zeros((3, count)) for _ in subjects]
        finite = [Finite(self.name, s, unit) for s in subjects]
        original = Finite(self.name, reference, unit)
        for done, probe in enumerate(batches):
            setting.progress(f"{self.name} with {reference.name}", done, len(batches))
            expected = logits(reference, probe)
            good = [original(e) for e in expected]
            for number, subject in enumerate(subjects):
                actual = expected if subject is reference else logits(subject, probe)
                for place, e, a, usable in zip(probe.places, expected, actual, good, strict=True):
                    if finite[number](a) and usable:
                        sums[number][:, place.unit] += _compared(subject, e, a)
        for counter in (original, *finite):
            counter.settle()
        return [self._result(s, samples, unit, notes, setting) for s in sums]

    def _result(
        self, sums: NDArray[np.float64], samples: int, unit: str,
        notes: Sequence[str], setting: Setting,
    ) -> EvalResult:  # fmt: skip
        total = sums.sum(axis=1)
        ends = {
            "top1": bootstrap(sums, lambda s: s[0] / s[2], setting.seed),
            "kl": bootstrap(sums, lambda s: s[1] / s[2], setting.seed),
        }
        return EvalResult(
            self.name, {"top1": float(total[0] / total[2]), "kl": float(total[1] / total[2])},
            {n: e for n, e in ends.items() if e is not None}, samples, unit,
            detail={"predictions": int(total[2])}, notes=tuple(notes),
        )  # fmt: skip


def _compared(
    subject: Subject, expected: torch.Tensor, actual: torch.Tensor
) -> tuple[int, float, int]:
    """(equal most likely entries, sum of KL in nats, positions) of ``[positions, classes]``."""
    if expected.shape != actual.shape:
        raise BadInput(
            f"{subject.name} gives {actual.shape[-1]} classes and the original "
            f"{expected.shape[-1]}: they are not versions of one model"
        )
    p, q = (x.double().log_softmax(-1) for x in (expected, actual))
    # Rounding makes the KL of equal distributions -1e-17 now and then.
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0.0)
    equal = expected.argmax(-1) == actual.argmax(-1)
    return int(equal.sum()), float(kl.sum()), expected.shape[0]
